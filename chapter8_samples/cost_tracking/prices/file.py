"""8.2.3 自分の料金表を読み、誤りをまとめて報告する(本書にリストなし)。

契約の単価や社内のモデルは、自分の料金表で渡す。料金表の書き間違いは、そのまま請求との差になる。
読んだときにすべて調べ、1 つずつではなく、見つかった誤りを全部並べる。

Databricks でも同じ。料金表のファイルは Unity Catalog のボリュームに置いて、パスで渡せる。

>>> read_prices({"gpt-4o": {"input": 0.0025, "output": 0.01}})[0]["gpt-4o"][0].input  # 本書の形
Decimal('2.5000')
>>> wrong = {"input": -1, "cached_imput": 1, "effective_from": "2024/12/03"}
>>> try:
...     read_prices({"models": {"my-model": wrong}})
... except PriceTableError as error:
...     for problem in error.problems:
...         print(problem)
my-model.cached_imput: unknown key (did you mean 'cached_input'?)
my-model.input: -1 is not a price (a number >= 0)
my-model.output: required
my-model.effective_from: '2024/12/03' is not a date like 2024-12-03
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, cast

from .model import ModelPrice, PriceTableError, PriceTier, row_problems

_COLUMNS = ("input", "cached_input", "cache_write", "output", "batch_input", "batch_output")
_AMOUNTS = (*_COLUMNS, "cache_write_1h")
_ROW_KEYS = (*_AMOUNTS, "aliases", "tiers", "effective_from", "effective_to", "provider", "source")
_TABLE_KEYS = ("models", "unit")
_TIER_KEYS = ("above_input_tokens", "input", "output", "cached_input")


def load_file(path: str | Path) -> Mapping[str, Any]:
    """JSON か YAML(拡張子 .yaml、.yml)のファイルを読む。数は 10 進数のまま読む。

    Raises:
        PriceTableError: JSON や YAML として読めないか、中身が辞書でない。
    """
    path = Path(path)
    parse = _parse_yaml if path.suffix.lower() in {".yaml", ".yml"} else _parse_json
    try:
        data = parse(path.read_text(encoding="utf-8-sig"))  # メモ帳が付ける BOM は読み飛ばす
    except ValueError as error:
        raise PriceTableError([f"{path}: {error}"]) from error
    if (table := _mapping(data)) is None:
        raise PriceTableError([f"{path}: expected a mapping, got {type(data).__name__}"])
    return table


class _FileMapping(dict[str, Any]):
    """ファイルの中の辞書。同じ鍵が 2 度書かれていたことを、読んだ後も覚えている。"""

    def __init__(self, pairs: Iterable[tuple[str, Any]], keys: Sequence[str]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(keys).items() if count > 1]


def _parse_json(text: str) -> Any:
    def keep(pairs: list[tuple[str, Any]]) -> _FileMapping:
        return _FileMapping(pairs, [key for key, _ in pairs])

    return json.loads(text, parse_float=Decimal, object_pairs_hook=keep)


def _parse_yaml(text: str) -> Any:
    import yaml  # 料金表を YAML で持つ人だけが使う

    class Loader(yaml.SafeLoader):
        pass

    def keep(loader: Any, node: Any) -> _FileMapping:
        keys = [str(key.value) for key, _ in node.value]  # << で取り込む前の、書かれた鍵
        return _FileMapping(loader.construct_mapping(node, deep=True).items(), keys)

    Loader.add_constructor("tag:yaml.org,2002:map", keep)
    try:
        return yaml.load(text, Loader)  # SafeLoader と同じく、任意のオブジェクトは作らない
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def _path(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def read_prices(
    data: Mapping[str, Any],
) -> tuple[dict[str, tuple[ModelPrice, ...]], dict[str, str]]:
    """辞書を、料金の行と別名に直す。形は ``PriceTable.from_mapping`` の説明のとおり。

    Raises:
        PriceTableError: 誤りがある。``problems`` にすべて並ぶ。
    """
    reader = _TableReader(data)
    found = reader.read()
    if reader.problems:
        raise PriceTableError(reader.problems)
    return found


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else None


class _TableReader:
    """辞書を行に直す。誤りは ``problems`` にためて、最後にまとめて報告する。"""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        if "models" in data:
            unit = data.get("unit", "per_1m_tokens")
            self.models: Any = data["models"]
            notes = {key for key in data if str(key).startswith("_")}  # _meta のような覚え書き
            self._reject_unknown_keys("", data, (*_TABLE_KEYS, *notes))
        else:
            unit, self.models = "per_1k_tokens", data  # 本書の形
        scales = {"per_1m_tokens": Decimal(1), "per_1k_tokens": Decimal(1000)}
        self.scale = scales.get(str(unit), Decimal(1))
        if str(unit) not in scales:
            self.problems.append(f"unit: {unit!r} is not one of {', '.join(scales)}")

    def read(self) -> tuple[dict[str, tuple[ModelPrice, ...]], dict[str, str]]:
        models = _mapping(self.models)
        if models is None:
            self.problems.append("models: expected a mapping of model name to price row(s)")
            return {}, {}
        self._reject_repeated_keys("", models)
        rows: dict[str, tuple[ModelPrice, ...]] = {}
        aliases: dict[str, str] = {}
        for key, value in models.items():
            name = str(key).strip().lower()
            if name in rows:
                self.problems.append(f"{name}: given twice (names are not case-sensitive)")
            entries = cast(list[Any], value) if isinstance(value, list) else [value]
            found = [row for entry in entries if (row := self._row(name, entry, aliases))]
            found.sort(key=lambda row: row.effective_from or date.min)
            if found or not entries:
                self.problems += row_problems(name, found)
                rows[name] = tuple(found)
        for alias, name in aliases.items():
            if alias in rows and alias != name:
                self.problems.append(f"{name}.aliases: {alias!r} is another model of this table")
        return rows, aliases

    def _row(self, name: str, value: Any, aliases: dict[str, str]) -> ModelPrice | None:
        if (entry := _mapping(value)) is None:
            self.problems.append(f"{name}: expected a mapping, got {value!r}")
            return None
        self._reject_unknown_keys(name, entry, _ROW_KEYS)
        self._add_aliases(name, entry, aliases)
        amounts = {key: self._amount(name, entry, key) for key in _AMOUNTS}
        required = amounts.pop("input"), amounts.pop("output")
        for key, amount in zip(("input", "output"), required, strict=True):
            if amount is None and entry.get(key) is None:
                self.problems.append(f"{name}.{key}: required")
        if (amounts["batch_input"] is None) != (amounts["batch_output"] is None):
            self.problems.append(f"{name}: batch_input and batch_output must be given together")
        return ModelPrice(
            input=required[0] or Decimal(0),
            output=required[1] or Decimal(0),
            **amounts,
            tiers=self._tiers(name, entry),
            effective_from=self._date(name, entry, "effective_from"),
            effective_to=self._date(name, entry, "effective_to"),
            provider=str(entry.get("provider") or ""),
            source=str(entry.get("source") or ""),
        )

    def _add_aliases(self, name: str, entry: Mapping[str, Any], aliases: dict[str, str]) -> None:
        for alias in self._list(name, entry, "aliases"):
            added = str(alias).strip().lower()
            if aliases.setdefault(added, name) != name:
                self.problems.append(f"{name}.aliases: {alias!r} is already {aliases[added]!r}")

    def _list(self, name: str, entry: Mapping[str, Any], key: str) -> list[Any]:
        value = entry.get(key)
        if value is None or isinstance(value, (list, tuple)):
            return list(cast("Iterable[Any]", value or ()))
        self.problems.append(f"{name}.{key}: expected a list, got {value!r}")
        return []

    def _reject_unknown_keys(
        self, name: str, entry: Mapping[str, Any], known: Sequence[str]
    ) -> None:
        for key in entry:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                self.problems.append(f"{_path(name, key)}: unknown key{hint}")
        self._reject_repeated_keys(name, entry)

    def _reject_repeated_keys(self, name: str, entry: Mapping[str, Any]) -> None:
        if isinstance(entry, _FileMapping):
            self.problems += [f"{_path(name, key)}: given twice" for key in entry.repeated]

    def _tiers(self, name: str, row: Mapping[str, Any]) -> tuple[PriceTier, ...]:
        tiers = [self._tier(f"{name}.tiers", value) for value in self._list(name, row, "tiers")]
        for above, count in Counter(tier.above_input_tokens for tier in tiers if tier).items():
            if count > 1:
                self.problems.append(f"{name}.tiers.above_input_tokens: {above} given twice")
        return tuple(tier for tier in tiers if tier)

    def _tier(self, name: str, value: Any) -> PriceTier | None:
        if (entry := _mapping(value)) is None:
            self.problems.append(f"{name}: expected a mapping, got {value!r}")
            return None
        self._reject_unknown_keys(name, entry, _TIER_KEYS)
        above = entry.get("above_input_tokens")
        if not isinstance(above, int) or isinstance(above, bool) or above < 1:
            self.problems.append(f"{name}.above_input_tokens: {above!r} is not > 0")
            return None
        amounts = [self._amount(name, entry, key) for key in _TIER_KEYS[1:]]
        if amounts[0] is None or amounts[1] is None:
            self.problems.append(f"{name}: input and output are required")
            return None
        return PriceTier(above, amounts[0], amounts[1], amounts[2])

    def _amount(self, name: str, entry: Mapping[str, Any], key: str) -> Decimal | None:
        value = entry.get(key)
        if value is None:
            return None
        try:
            amount = Decimal("NaN") if isinstance(value, bool) else Decimal(str(value))
        except InvalidOperation:
            amount = Decimal("NaN")
        if not amount.is_finite() or amount < 0:
            self.problems.append(f"{name}.{key}: {value!r} is not a price (a number >= 0)")
            return None
        return amount * self.scale

    def _date(self, name: str, entry: Mapping[str, Any], key: str) -> date | None:
        value = entry.get(key)
        if value is None:
            return None
        try:
            return date.fromisoformat(str(value))
        except ValueError:
            self.problems.append(f"{name}.{key}: {value!r} is not a date like 2024-12-03")
            return None
