"""8.2.3 モデルの料金表(本書にリストなし)。

料金は日付で変わり、モデル名は提供元ごとに綴りが違う。前方一致で探すと gpt-4o-mini-2024-07-18 が
gpt-4o として 16.67 倍に計算される。だから、行に期間を持たせ、名前は正確に照合する。

Databricks の従量課金エンドポイントは DBU 建てで、単価は契約で変わる。自社の単価を
``with_overrides`` で足して使う。

>>> table = PriceTable.default()
>>> table.resolve("us.anthropic.claude-3-5-haiku-20241022-v1:0").name
'claude-3-5-haiku'
>>> table.price_at("claude-3-5-haiku", date(2024, 12, 2)).input  # 翌日から 0.8
Decimal('1')
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timezone
from decimal import Decimal
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from .model import (
    CostError,
    ModelPrice,
    NoPriceError,
    PriceNotEffectiveError,
    PriceTableError,
    PriceTier,
    Rates,
    UnknownModelError,
)
from .names import MAKERS, RESELLERS, family, spellings, undated

Rows = tuple[ModelPrice, ...]
_BOOK = Path(__file__).with_name("book_2024_12.json")
_CACHE_LIMIT = 4096  # 名前の照合結果を覚える上限。名前が外から来ても、メモリーは増え続けない


@dataclass(frozen=True, slots=True)
class Match:
    """名前の照合結果。``name`` は料金表での名前。"""

    name: str
    kind: Literal["exact", "alias"]


@dataclass(frozen=True)
class PriceTable:
    """モデル名と日付から料金の行を引く表。変更はせず、``with_overrides`` で新しい表を作る。

    ``as_of`` は料金の日付。``not_carried`` は、単価をこの表で表せないモデルと、その理由。
    """

    rows: Mapping[str, Rows]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str = "custom"
    as_of: date | None = None
    not_carried: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def default(cls) -> PriceTable:
        """2024 年 12 月の公開料金。本書の計算例と合わせるため、新しくしない。"""
        text = _BOOK.read_text(encoding="utf-8")
        book = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        rows = {name: tuple(map(_book_row, found)) for name, found in book["models"].items()}
        aliases = {alias: name for name, found in rows.items() for alias in found[-1].aliases}
        return cls(rows, aliases, book["name"], date.fromisoformat(book["as_of"]))

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, name: str = "custom") -> PriceTable:
        """辞書から作る。

        ``{"models": {...}}`` は USD / 100 万トークン(``"unit": "per_1k_tokens"`` なら 1,000)。
        ``{"gpt-4o": {"input": 0.0025, "output": 0.01}}`` のような平らな形は、本書と同じく
        USD / 1,000 トークンとして読む。誤りは ``PriceTableError`` にすべて並べる。
        """
        from .file import read_prices  # pydantic の import は遅い

        rows, aliases, about = read_prices(data)
        return cls(rows, aliases, about.name or name, about.as_of, about.not_carried)

    @classmethod
    def from_file(cls, path: str | Path) -> PriceTable:
        """JSON のファイルから作る。形は ``from_mapping`` と同じ。"""
        from .file import load_file

        return cls.from_mapping(load_file(path), name=Path(path).stem)

    @classmethod
    def chosen(
        cls,
        pricing: PriceTable | Mapping[str, Any] | None,
        pricing_file: str | Path | None,
        aliases: Mapping[str, str],
    ) -> PriceTable:
        """``CostCalculator`` の引数に応じた表。"""
        if pricing is not None and pricing_file is not None:
            how = "PriceTable.from_file(pricing_file).with_overrides(pricing)"
            raise CostError(f"pass either pricing or pricing_file, not both; to add, pass {how}")
        if isinstance(pricing, PriceTable):
            table = pricing
        elif pricing_file:
            table = cls.from_file(pricing_file)
        elif pricing is None:
            table = cls.default()
        else:
            table = cls.default().with_overrides(pricing) if pricing else cls({})
        return table.with_aliases(aliases) if aliases else table

    def with_overrides(self, data: Mapping[str, Any]) -> PriceTable:
        """同じ名前の行を置き換え、ない名前の行を足した、新しい表。

        ``data`` の形は ``from_mapping`` と同じ。``effective_from`` のある行は、その日からの料金で、
        それより前は元の行で計算する。
        """
        other = PriceTable.from_mapping(data)
        rows, problems = dict(self.rows), list[str]()
        for name, new in other.rows.items():
            old = self._rows_of(name)
            problems += _jump(name, old, new)
            rows[name] = _with_history(old, new)
        if problems:
            raise PriceTableError(problems)
        aliases = {alias: name for alias, name in self.aliases.items() if alias not in other.rows}
        left = {name: why for name, why in self.not_carried.items() if name not in other.rows}
        name = f"{self.name}+overrides"
        return PriceTable(rows, {**aliases, **other.aliases}, name, self.as_of, left)

    def with_aliases(self, aliases: Mapping[str, str]) -> PriceTable:
        """別名(Azure のデプロイ名など)を足した、新しい表。``{"my-deployment": "gpt-4o"}``"""
        added = {name.strip().lower(): self.resolve(to).name for name, to in aliases.items()}
        return replace(self, aliases={**self.aliases, **added})

    def resolve(self, model: str) -> Match:
        """名前を料金表の行に結び付ける。完全一致か登録済みの別名だけで、前方一致はしない。

        Raises:
            UnknownModelError: 見つからないか、単価の違う行があって決められないとき。
        """
        found = self._look_up_once(model)
        if isinstance(found, Match):
            return found
        raise UnknownModelError(model, found, f"{self.name} (as of {self.as_of or 'unknown'})")

    def price_at(self, name: str, at: date | datetime | None = None) -> ModelPrice:
        """``resolve`` した名前の、その時点の行。``at=None`` は、今日までに始まった最新の行。

        Raises:
            NoPriceError: その日に有効な行がないか、単価をこの表で表せないモデルのとき。
            CostError: ``at`` が日付でないか、時刻なのにタイムゾーンがないとき。
        """
        rows = self.rows.get(name)
        if rows is None:
            raise NoPriceError(f"{name!r} in {self.name}: {self.not_carried[name]}")
        day = datetime.now(timezone.utc).date() if at is None else _utc_day(at)
        for row in reversed(rows):
            started = row.effective_from is None or row.effective_from <= day
            if started and (at is None or row.covers(day)):
                return row
        periods = ", ".join(row.period for row in rows)
        raise PriceNotEffectiveError(f"no price row of {name!r} covers {day} (rows: {periods})")

    def __getstate__(self) -> dict[str, Any]:
        """照合の記憶は、別のプロセスへ送れない。"""
        return {key: value for key, value in vars(self).items() if key != "_look_up_once"}

    @cached_property
    def _look_up_once(self) -> Callable[[str], Match | list[str]]:
        return lru_cache(_CACHE_LIMIT)(self._look_up)

    def _look_up(self, model: str) -> Match | list[str]:
        if not isinstance(model, str) or len(model) > 300:  # pyright: ignore[reportUnnecessaryIsInstance]
            return []
        names = spellings(model)
        for name in names:
            forms = (name, undated(name))
            match = self._exact(forms) or self._of_maker(forms)
            if match:
                return match
            sold = [full for form in forms for full in self._tails.get(form, ())]
            if sold and "/" not in model:  # 接頭辞が違えば、よその提供元の単価は使わない
                return self._only_price(list(dict.fromkeys(sold)))
        return self._near_names(names[-1])

    def _only_price(self, sold: list[str]) -> Match | list[str]:
        """その名前のモデルを売っている行。単価が 1 つに決まらなければ、名前を挙げるだけ。"""
        direct = [full for full in sold if not full.startswith(RESELLERS)]
        prices = [self.rows.get(full, full) for full in direct]
        if prices and prices.count(prices[0]) == len(prices):
            return Match(direct[0], "alias")
        return sold[:4]

    def _exact(self, names: Iterable[str]) -> Match | None:
        for name in names:
            if name in self.aliases:
                return Match(self.aliases[name], "alias")
            if name in self.rows or name in self.not_carried:
                return Match(name, "exact")
        return None

    def _of_maker(self, names: Iterable[str]) -> Match | None:
        """接頭辞のない名前を、そのモデルを作った会社の行から探す。"""
        for maker in MAKERS:
            found = self._exact(f"{maker}/{name}" for name in names if "/" not in name)
            if found and found.name.startswith(f"{maker}/"):
                return Match(found.name, "alias")
        return None

    @cached_property
    def _tails(self) -> dict[str, list[str]]:
        """``groq/llama-x`` を ``llama-x`` から引く表。MLflow には接頭辞のない名前が残る。"""
        tails: dict[str, list[str]] = {}
        for full in (*self.rows, *self.aliases, *self.not_carried):
            rest = full
            while "/" in rest:
                rest = rest.partition("/")[2]
                tails.setdefault(rest, []).append(self.aliases.get(full, full))
        return tails

    def _near_names(self, name: str) -> list[str]:
        """打ち間違いと思われる名前。世代の違うモデルや、微調整したモデルの元は挙げない。"""
        import difflib  # 起動のたびには待たない

        words, alike = family(name), range(len(name) * 3 // 4, len(name) * 4 // 3 + 1)
        known = dict.fromkeys((*self.rows, *self.aliases, *self._tails))
        near = [other for other in known if len(other) in alike and family(other) == words]
        return [] if "ft:" in name else difflib.get_close_matches(name, near, 3, 0.85)

    def _rows_of(self, name: str) -> Rows:
        found = self._look_up(name)
        return self.rows.get(found.name, ()) if isinstance(found, Match) else ()


def _with_history(old: Rows, new: Rows) -> Rows:
    start = new[0].effective_from or date.min
    kept = [row for row in old if (row.effective_from or date.min) < start]
    ended = [replace(row, effective_to=min(row.effective_to or start, start)) for row in kept]
    return (*ended, *new)


def _jump(name: str, old: Rows, new: Rows) -> list[str]:
    """元の 100 倍以上か 1/100 以下の単価は、単位の取り違えとみなす。"""
    before = old[-1].input if old else Decimal(0)
    after = new[-1].input if new else Decimal(0)
    if not before or not after or before / 100 < after < before * 100:
        return []
    return [f"{name}.input: {after:f} USD per 1M tokens (now {before:f}); check the unit"]


def _utc_day(at: date | datetime) -> date:
    if not isinstance(at, date):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CostError(f"at must be a date or a datetime, got {at!r}")
    if not isinstance(at, datetime):
        return at
    if at.tzinfo is None:  # 動かすコンピューターの時間帯によって、料金が変わってしまう
        raise CostError(f"at={at!r} has no time zone; use datetime(..., tzinfo=timezone.utc)")
    return at.astimezone(timezone.utc).date()


def _book_row(entry: dict[str, Any]) -> ModelPrice:
    """本書の表の 1 行。正しいと分かっているので、``file`` の検査は通さない。"""
    services = {name: Rates(**rates) for name, rates in entry.pop("service_tiers", {}).items()}
    tiers = tuple(PriceTier(**tier) for tier in entry.pop("tiers", ()))
    for key in {"effective_from", "effective_to"} & entry.keys():
        entry[key] = date.fromisoformat(entry[key])
    return ModelPrice(**entry, service_tiers=services, tiers=tiers)
