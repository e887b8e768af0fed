"""8.2.3 自分の料金表を読み、誤りをまとめて報告する(本書にリストなし)。

料金表の書き間違いは、そのまま請求との差になる。読んだときに pydantic ですべて調べる。
pydantic の import は遅いので、このモジュールは料金表を読むときにだけ import する。

>>> rows, aliases, about = read_prices({"gpt-4o": {"input": 0.0025, "output": 0.01}})
>>> rows["gpt-4o"][0].input
Decimal('2.5000')
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .model import AMOUNTS, IMPORT_COMMAND, LEAST, Level, ModelPrice, PriceTableError, Rates

Rows = tuple[ModelPrice, ...]
_ROWS = TypeAdapter(Rows)
_LEAST_CACHED = Decimal("0.0001")
_AnyRates = TypeVar("_AnyRates", bound=Rates)


class _File(BaseModel):
    """ファイルのいちばん外側。"""

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    as_of: date | None = None
    unit: Literal["per_1m_tokens", "per_1k_tokens"] = "per_1m_tokens"
    not_carried: dict[str, str] = {}
    models: dict[str, Any] = {}


def load_file(path: str | Path) -> Mapping[str, Any]:
    """JSON のファイルを読む。数は 10 進数のまま読む。

    Raises:
        FileNotFoundError: その名前のファイルがない。
        PriceTableError: JSON として読めないか、中身が辞書でない。
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such price file; today's prices: {IMPORT_COMMAND}")
    text = path.read_text(encoding="utf-8-sig")  # メモ帳が付ける BOM は読み飛ばす
    try:
        data = json.loads(text, parse_float=Decimal, object_pairs_hook=_once)
    except ValueError as error:
        raise PriceTableError([f"{path}: {error}"]) from error
    if not isinstance(data, Mapping):
        raise PriceTableError([f"{path}: expected a mapping, got {type(data).__name__}"])
    return cast(Mapping[str, Any], data)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """2 度書かれた鍵は、そのまま読むと、最後の値だけが黙って残る。"""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


def read_prices(data: Mapping[str, Any]) -> tuple[dict[str, Rows], dict[str, str], _File]:
    """辞書を調べて、行と別名に直す。形は ``PriceTable.from_mapping`` のとおり。

    Raises:
        PriceTableError: 誤りがある。``problems`` にすべて並ぶ。
    """
    if not isinstance(data, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PriceTableError([f"expected a mapping of models, got {data!r:.60}"])
    data = {key: value for key, value in data.items() if not str(key).startswith("_")}  # 覚え書き
    if any("litellm_provider" in row for row in data.values() if isinstance(row, Mapping)):
        command = IMPORT_COMMAND.replace("genai-prices", "PATH")
        raise PriceTableError([f"this is litellm's price map; run `{command}` first"])
    if "models" not in data:
        data = {"unit": "per_1k_tokens", "models": data}  # 本書の形
    about, problems = _File(), list[str]()
    try:
        about = _File.model_validate(data)
    except ValidationError as error:
        problems += _explain("", error)
    rows: dict[str, Rows] = {}
    models = data["models"] if isinstance(data["models"], Mapping) else {}
    for key, value in cast(Mapping[object, Any], models).items():
        name = str(key).strip().lower()
        if name in rows:
            problems.append(f"{name}: given twice (names are not case-sensitive)")
        rows[name] = _rows(name, value, data.get("unit") == "per_1k_tokens", problems)
    aliases = _aliases(rows, problems)
    if problems:
        raise PriceTableError(problems)
    return rows, aliases, about


def _rows(name: str, value: Any, per_1k: bool, problems: list[str]) -> Rows:
    entries = cast(list[Any], value) if isinstance(value, list) else [value]
    try:
        rows = _ROWS.validate_python([_with_batch(entry) for entry in entries])
    except ValidationError as error:
        problems += _explain(name, error)
        return ()
    if per_1k:
        rows = [replace(_scaled(row), tiers=tuple(map(_scaled, row.tiers))) for row in rows]
    rows = tuple(sorted(rows, key=lambda row: row.effective_from or date.min))
    problems += _row_problems(name, rows, limit=200 if per_1k else 1000)
    return rows


def _with_batch(entry: Any) -> Any:
    """``batch_input`` の形で書かれたバッチの単価を、サービスティアに直す。"""
    if not isinstance(entry, Mapping):
        return entry
    row = dict(cast(Mapping[str, Any], entry))
    if isinstance(row.get("tiers"), list):
        row["tiers"] = [_with_batch(tier) for tier in row["tiers"]]
    batch = {key: row.pop(f"batch_{key}") for key in AMOUNTS if f"batch_{key}" in row}
    services = row.pop("service_tiers", {})
    if isinstance(services, Mapping):
        named = cast(Mapping[object, Any], services).items()
        services = {str(name).strip().lower(): rates for name, rates in named}
        if batch:
            services["batch"] = batch
    return {**row, "service_tiers": services}


def _scaled(rates: _AnyRates) -> _AnyRates:
    """1,000 トークンあたりの単価を、100 万トークンあたりに直す。"""
    prices = {key: getattr(rates, key) for key in AMOUNTS}
    changed: dict[str, Any] = {key: price and price * 1000 for key, price in prices.items()}
    if isinstance(rates, Level):
        changed["service_tiers"] = {key: _scaled(tier) for key, tier in rates.service_tiers.items()}
    return replace(rates, **changed)


def _aliases(rows: Mapping[str, Rows], problems: list[str]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for name, found in rows.items():
        for alias in (alias.strip().lower() for row in found for alias in row.aliases):
            if aliases.setdefault(alias, name) != name:
                problems.append(f"{name}.aliases: {alias!r} is already {aliases[alias]!r}")
            if alias in rows and alias != name:
                problems.append(f"{name}.aliases: {alias!r} is another model of this table")
    return aliases


def _row_problems(name: str, rows: Rows, limit: int) -> list[str]:
    """あるモデルの行の誤り。行がない、期間が逆、期間が重なる、段の数や単価がおかしい。"""
    problems = [] if rows else [f"{name}: no rows"]
    for row in rows:
        if (row.effective_from or date.min) >= (row.effective_to or date.max):
            problems.append(f"{name}: effective_to is not after effective_from ({row.period})")
        starts = [tier.above_input_tokens for tier in row.tiers]
        if len(set(starts)) < len(starts) or min(starts, default=1) < 1:
            problems.append(f"{name}.tiers.above_input_tokens: {starts} (each > 0, once)")
        for level in (row, *row.tiers):
            for rates in (level, *level.service_tiers.values()):
                problems += [f"{name}.{why}" for why in _absurd(rates, limit)]
    for earlier, later in pairwise(rows):
        if (earlier.effective_to or date.max) > (later.effective_from or date.min):
            problems.append(f"{name}: rows overlap ({earlier.period} / {later.period})")
    return problems


def _absurd(rates: Rates, limit: int) -> list[str]:
    """ありえない単価。単位の取り違えは、ここで分かる。"""
    problems: list[str] = []
    for key in AMOUNTS:
        price = getattr(rates, key)
        if price and not LEAST.get(key, _LEAST_CACHED) <= price <= limit:
            why = f"{price:f} USD per 1M tokens is not a price; check the sign and the unit"
            problems.append(f"{key}: {why}")
    return problems


def _explain(name: str, error: ValidationError) -> list[str]:
    problems: list[str] = []
    for item in error.errors(include_url=False):
        path = [name, *(part for part in item["loc"] if isinstance(part, str))]
        why = f"{item['msg']}, got {item['input']!r:.60}"
        if item["type"] == "missing":
            why = item["msg"]
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            why = "unknown key"
        problems.append(f"{'.'.join(filter(None, path))}: {why}")
    return problems
