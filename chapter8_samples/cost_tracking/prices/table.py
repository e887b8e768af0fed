"""8.2.3 モデルの料金表(本書にリストなし)。

料金は日付で変わり、モデル名は提供元ごとに綴りが違う。前方一致で探すと gpt-4o-mini-2024-07-18 が
gpt-4o として 16.67 倍に計算される。だから、行に期間と出典を持たせ、名前は正確に照合する。

Databricks の従量課金エンドポイントは DBU 建てで、単価は契約で変わる。自社の単価を
``with_overrides`` で足して使う。

>>> table = PriceTable.default()
>>> for name in ("azure/gpt-4o", "us.anthropic.claude-3-5-haiku-20241022-v1:0"):
...     row = table.price_at(table.resolve(name).name)
...     print(table.resolve(name).name, row.input, row.output)
gpt-4o 2.50 10.00
claude-3-5-haiku 0.80 4.00
>>> print(table.price_at("claude-3-5-haiku", date(2024, 12, 2)).input)
1.00
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from .file import load_file, read_prices
from .model import (
    CostError,
    ModelPrice,
    PriceNotEffectiveError,
    PriceTableError,
    PriceTier,
    UnknownModelError,
    row_problems,
)

MatchKind = Literal["exact", "alias"]
_ZERO = Decimal(0)
_CACHE_LIMIT = 4096  # 名前の照合結果を覚える上限。名前が外から来ても、メモリーは増え続けない
_LONGEST_NAME = 300  # これより長い名前には、近い名前を探さない


@dataclass(frozen=True, slots=True)
class Match:
    """名前の照合結果。``name`` は料金表での名前。"""

    name: str
    kind: MatchKind


_PREFIX = re.compile(  # bedrock/us-east-1/ のような AWS のリージョンと、MLflow の openai:/ も
    r"^(?:bedrock/[a-z]{2}(?:-[a-z]+)+-\d|openai|azure|azure_ai|anthropic|bedrock|converse"
    r"|vertex_ai|gemini|google|models|databricks|litellm_proxy|openrouter):?/"
)
_RESOURCE = ("arn:", "projects/", "publishers/")  # AWS の ARN、Vertex AI のリソース名
_REGION = re.compile(r"^(?:us-gov|us|eu|apac|jp|au|ca|global)\.(?=[a-z]+\.)")
_VENDOR = re.compile(r"^(?:anthropic|meta|amazon|mistral|cohere)\.")
_BEDROCK_VERSION = re.compile(r"-v\d+(?::\d+)*$")
_VERTEX_DATE = re.compile(r"(?:-v\d)?@(\d{8})$")


def canonical_model_name(model: str) -> str:
    """提供元ごとの綴りを、料金表の綴りに直す(接頭辞、Bedrock の ID と ARN、Vertex の ``@日付``)。

    >>> canonical_model_name("us.anthropic.claude-3-5-sonnet-20241022-v2:0")
    'claude-3-5-sonnet-20241022'
    """
    name = model.strip().lower()
    while name != (shorter := _PREFIX.sub("", name)):
        name = shorter
    if name.startswith(_RESOURCE):
        name = name.rsplit("/", 1)[-1]
    name = _REGION.sub("", name)
    if _VENDOR.match(name):
        name = _BEDROCK_VERSION.sub("", _VENDOR.sub("", name))
    return _VERTEX_DATE.sub(r"-\1", name)


@dataclass(frozen=True)
class PriceTable:
    """モデル名と日付から料金の行を引く表。変更はせず、``with_overrides`` で新しい表を作る。"""

    rows: Mapping[str, tuple[ModelPrice, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str = "custom"
    _resolved: dict[str, Match] = field(
        default_factory=dict[str, Match], init=False, repr=False, compare=False
    )
    _near: dict[str, list[str]] = field(
        default_factory=dict[str, list[str]], init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        problems = [p for name, rows in self.rows.items() for p in row_problems(name, rows)]
        problems += [
            f"alias {alias!r} points to unknown model {target!r}"
            for alias, target in self.aliases.items()
            if target not in self.rows
        ]
        if problems:
            raise PriceTableError(problems)

    @classmethod
    def default(cls) -> PriceTable:
        """2024 年 12 月の公開料金。実際の請求の前に、提供元の料金ページで確かめること。"""
        return cls(*_default_rows(), "2024-12")

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, name: str = "custom") -> PriceTable:
        """辞書から作る。

        ``{"models": {...}}`` は USD / 100 万トークン(``"unit": "per_1k_tokens"`` なら 1,000)。
        ``{"gpt-4o": {"input": 0.0025, "output": 0.01}}`` のような平らな形は、本書と同じく
        USD / 1,000 トークンとして読む。誤りは ``PriceTableError`` にすべて並べる。
        """
        rows, aliases = read_prices(data)
        return cls(rows, aliases, name)

    @classmethod
    def from_file(cls, path: str | Path) -> PriceTable:
        """JSON または YAML のファイルから作る。形は ``from_mapping`` と同じ。"""
        return cls.from_mapping(load_file(path), name=Path(path).stem)

    def with_overrides(self, data: Mapping[str, Any] | str | Path) -> PriceTable:
        """同じ名前の行を置き換え、ない名前の行を足した、新しい表。

        ``data`` は ``from_mapping`` と同じ形の辞書か、その形の JSON または YAML のファイル。
        """
        found = load_file(data) if isinstance(data, (str, Path)) else data
        other = PriceTable.from_mapping(found, name=f"{self.name}+overrides")
        kept = {alias: to for alias, to in self.aliases.items() if alias not in other.rows}
        return PriceTable({**self.rows, **other.rows}, {**kept, **other.aliases}, other.name)

    def with_aliases(self, aliases: Mapping[str, str]) -> PriceTable:
        """別名(Azure のデプロイ名など)を足した、新しい表。``{"my-deployment": "gpt-4o"}``"""
        added = {
            alias.strip().lower(): self.resolve(target).name for alias, target in aliases.items()
        }
        return PriceTable(self.rows, {**self.aliases, **added}, self.name)

    def resolve(self, model: str) -> Match:
        """名前を料金表の行に結び付ける。完全一致か登録済みの別名だけで、前方一致はしない。

        Raises:
            UnknownModelError: 見つからないとき。
        """
        match = self._resolved.get(model)
        if match is None:
            match = self._look_up(model)
            _remember(self._resolved, model, match)
        return match

    def _look_up(self, model: str) -> Match:
        if not isinstance(model, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UnknownModelError(str(model))
        raw = model.strip().lower()
        name = canonical_model_name(model)
        for candidate in (raw, name):  # 利用者が登録した名前は、接頭辞付きのままでも引ける
            if candidate in self.aliases:
                return Match(self.aliases[candidate], "alias")
            if candidate in self.rows:
                return Match(candidate, "exact")
        if raw in self._near:
            raise UnknownModelError(model, self._near[raw])
        # 接頭辞付きで登録した別名は、接頭辞なしでも引ける(MLflow にはデプロイ名だけが残る)
        known = {to for alias, to in self.aliases.items() if canonical_model_name(alias) == raw}
        if len(known) == 1:
            return Match(known.pop(), "alias")
        raise UnknownModelError(model, self._near_names(raw, name))

    def _near_names(self, raw: str, name: str) -> list[str]:
        """綴りの近い名前。探すのは遅いので覚えておく(未知のモデルは、呼ぶたびに来る)。"""
        if len(raw) > _LONGEST_NAME:
            return []
        near = difflib.get_close_matches(name, [*self.rows, *self.aliases], 3)
        _remember(self._near, raw, near)
        return near

    def price_at(self, name: str, at: date | datetime | None = None) -> ModelPrice:
        """``resolve`` した名前の、その時点の行。``at=None`` は最新の行。

        Raises:
            PriceNotEffectiveError: その日に有効な行がないとき。
            CostError: ``at`` が日付でないか、時刻なのにタイムゾーンがないとき。
        """
        rows = self.rows[name]
        if at is None:
            return rows[-1]
        day = _utc_day(at)
        for row in reversed(rows):
            if row.covers(day):
                return row
        raise PriceNotEffectiveError(
            f"no price row of {name!r} covers {day} (rows: {', '.join(row.period for row in rows)})"
        )


def _remember(cache: dict[str, Any], key: str, value: Any) -> None:
    if len(cache) >= _CACHE_LIMIT:
        cache.clear()
    cache[key] = value


def _utc_day(at: date | datetime) -> date:
    if not isinstance(at, date):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CostError(f"at must be a date or a datetime, got {at!r}")
    if not isinstance(at, datetime):
        return at
    if at.tzinfo is None:  # 動かすコンピューターの時間帯によって、料金が変わってしまう
        raise CostError(f"at={at!r} has no time zone; use datetime(..., tzinfo=timezone.utc)")
    return at.astimezone(timezone.utc).date()


_COLUMNS = ("input", "cached_input", "cache_write", "output", "batch_input", "batch_output")
_LITELLM = "litellm 1.53.1-1.56.4 price map (2024-12 wheels); genai-prices at 2024-12-15"
_SOURCES = {
    "openai": f"{_LITELLM}; OpenAI pricing page",
    "anthropic": f"{_LITELLM}; claude.com/blog/trainium2-and-distillation (2024-12-03)",
    "google": f"{_LITELLM}; Google developers blog 2024-09-24; llm-prices",
}

# USD / 100 万トークン。- は「その割引がない」。期間の終わりの日は含まない。
# 次の行の = は同じ料金の名前、> は入力がその数を超えたリクエストの全トークンに使う単価。
_DECEMBER_2024 = """
# モデル               入力   キャッシュ 書込  出力  バッチ入 バッチ出 期間
[openai]
gpt-4o                 2.50   1.25    -     10.00 1.25  5.00   2024-10-02..
  = gpt-4o-2024-08-06 gpt-4o-2024-11-20
gpt-4o-2024-05-13      5.00   -       -     15.00 2.50  7.50   2024-05-13..
gpt-4o-mini            0.15   0.075   -     0.60  0.075 0.30   2024-07-18..
  = gpt-4o-mini-2024-07-18
gpt-4-turbo            10.00  -       -     30.00 5.00  15.00  2024-04-09..
  = gpt-4-turbo-2024-04-09 gpt-4-0125-preview gpt-4-1106-preview
gpt-4                  30.00  -       -     60.00 15.00 30.00  ..
  = gpt-4-0613
gpt-3.5-turbo          0.50   -       -     1.50  0.25  0.75   2024-02-16..
  = gpt-3.5-turbo-0125
o1                     15.00  7.50    -     60.00 -     -      2024-12-17..
  = o1-2024-12-17
o1-preview             15.00  7.50    -     60.00 -     -      2024-09-12..
  = o1-preview-2024-09-12
o1-mini                3.00   1.50    -     12.00 -     -      2024-09-12..2025-01-31
  = o1-mini-2024-09-12
text-embedding-3-small 0.02   -       -     0     0.01  0      2024-01-25..
text-embedding-3-large 0.13   -       -     0     0.065 0      2024-01-25..
[anthropic]
claude-3-5-sonnet      3.00   0.30    3.75  15.00 1.50  7.50   ..
  = claude-3-5-sonnet-20241022 claude-3-5-sonnet-20240620 claude-3-5-sonnet-latest
claude-3-5-haiku       1.00   0.10    1.25  5.00  -     -      2024-11-04..2024-12-03
claude-3-5-haiku       0.80   0.08    1.00  4.00  0.40  2.00   2024-12-03..
  = claude-3-5-haiku-20241022 claude-3-5-haiku-latest
claude-3-opus          15.00  1.50    18.75 75.00 7.50  37.50  ..
  = claude-3-opus-20240229 claude-3-opus-latest
claude-3-haiku         0.25   0.03    0.30  1.25  0.125 0.625  ..
  = claude-3-haiku-20240307
[google]
gemini-1.5-pro         1.25   0.3125  -     5.00  -     -      2024-10-01..
  > 128000             2.50   0.625   -     10.00
  = gemini-1.5-pro-002 gemini-1.5-pro-001
gemini-1.5-flash       0.075  0.01875 -     0.30  -     -      ..
  > 128000             0.15   0.0375  -     0.60
  = gemini-1.5-flash-002 gemini-1.5-flash-001
gemini-1.5-flash-8b    0.0375 0.01    -     0.15  -     -      2024-10-03..
  > 128000             0.075  0.02    -     0.30
  = gemini-1.5-flash-8b-001
"""


def _default_rows() -> tuple[dict[str, tuple[ModelPrice, ...]], dict[str, str]]:
    rows: dict[str, tuple[ModelPrice, ...]] = {}
    aliases: dict[str, str] = {}
    provider = name = ""
    for line in _DECEMBER_2024.strip().splitlines()[1:]:
        first, *words = line.split()
        if first.startswith("["):
            provider = first.strip("[]")
        elif first == "=":
            aliases.update(dict.fromkeys(words, name))
        elif first == ">":
            fresh, cached, _, output = map(_amount, words[1:])
            tier = PriceTier(int(words[0]), fresh or _ZERO, output or _ZERO, cached)
            rows[name] = (*rows[name][:-1], replace(rows[name][-1], tiers=(tier,)))
        else:
            name = first
            rows[name] = (*rows.get(name, ()), _row(provider, words))
    return rows, aliases


def _row(provider: str, words: Sequence[str]) -> ModelPrice:
    amounts = dict(zip(_COLUMNS, map(_amount, words[:-1]), strict=True))
    start, _, end = words[-1].partition("..")
    return ModelPrice(
        input=amounts.pop("input") or _ZERO,
        output=amounts.pop("output") or _ZERO,
        **amounts,
        effective_from=date.fromisoformat(start) if start else None,
        effective_to=date.fromisoformat(end) if end else None,
        provider=provider,
        source=_SOURCES[provider],
    )


def _amount(word: str) -> Decimal | None:
    return None if word == "-" else Decimal(word)
