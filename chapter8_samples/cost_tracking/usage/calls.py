"""8.2.3 トレースから、LLM の呼び出しを二重に数えずに取り出す(本書にリストなし)。

使用量は、親のスパンにも子のスパンにも書かれていることがある(LangChain と OpenAI を両方計装した
ときなど)。単純に足すと 2 倍になり、ストリームの設定漏れは 0 に見える。数え方をここに 1 つだけ置く。

提供元ごとの形の違いも、根拠があるときだけここで直す。入力か出力か決められないトークンは、どちらかに
数えず ``reason`` に書く。Databricks のトレースでも属性の名前は同じなので、そのまま使える。
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, cast

from mlflow.entities import Span, SpanType

from .._internals import stored_attributes

USAGE_ATTRIBUTE, SPAN_TYPE = "mlflow.chat.tokenUsage", "mlflow.spanType"
STATUS_KEY = "cost.status"  # priced / partial / unpriced / missing_usage / cache_hit / rollup
UNATTRIBUTED = "(unattributed)"  # 親の合計にあり、どの呼び出しにもないトークン
_LLM_TYPES = (SpanType.LLM, SpanType.CHAT_MODEL, SpanType.EMBEDDING)
_KEYS = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "total_tokens": "total_tokens",
    "cache_read_tokens": "cache_read_input_tokens",
    "cache_write_tokens": "cache_creation_input_tokens",
    "cache_write_1h_tokens": "cache_creation_input_tokens_above_1hr",
}
_OTEL_TOTAL = "gen_ai.usage.total_tokens"  # Strands のスパン。親では、前のトレースからの通算になる
_OTEL_CACHE = {  # MLflow は、Strands の子のスパンのこの属性を読み残す
    "cache_read_input_tokens": "gen_ai.usage.cache_read_input_tokens",
    "cache_creation_input_tokens": "gen_ai.usage.cache_write_input_tokens",
}

_OTHER_UNITS = {  # 応答の usage の中の、料金表で表せない単位(OpenAI の音声、Anthropic の検索)
    "audio input tokens": ("prompt_tokens_details", "audio_tokens"),
    "audio output tokens": ("completion_tokens_details", "audio_tokens"),
    "web searches": ("server_tool_use", "web_search_requests"),
}


@dataclass(slots=True, kw_only=True)
class TokenUsage:
    """トークン数。``input_tokens`` は、キャッシュの読み込みと書き込みの分を含む。"""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0

    @classmethod
    def from_mlflow(cls, data: Mapping[str, Any]) -> TokenUsage:
        """``mlflow.chat.tokenUsage`` から、書かれたとおりに作る。整数でなければ ``ValueError``。"""
        counts = {name: data[key] for name, key in _KEYS.items() if data.get(key)}
        for name, count in counts.items():
            if type(count) is not int:
                counts[name] = _whole(name, count)
        usage = cls(**counts)
        usage.total_tokens = max(usage.total_tokens, usage.input_tokens + usage.output_tokens)
        return usage

    @property
    def known(self) -> int:
        """入力か出力か、分かっているトークンの数。"""
        return self.input_tokens + self.output_tokens

    @property
    def cached(self) -> int:
        """入力のうち、キャッシュから読んだ数と書いた数。"""
        return self.cache_read_tokens + self.cache_write_tokens

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(**{k: getattr(self, k) + getattr(other, k) for k in _KEYS})

    def __sub__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(**{k: getattr(self, k) - getattr(other, k) for k in _KEYS})


def _whole(name: str, count: Any) -> int:
    """整数が、保存先によっては小数(1000.0)で返り、numpy の値は MLflow が文字列にする。"""
    is_whole = isinstance(count, float) and count.is_integer()
    if is_whole or (isinstance(count, str) and count.isdecimal()):
        return int(count)
    raise ValueError(f"{name} must be an integer, got {count!r}")


@dataclass(slots=True)
class LlmCall:
    """トレースの中の、LLM の呼び出し 1 回。コストは ``price_call`` が書く(決まらなければ NaN)。"""

    span_id: str
    name: str
    model: str
    usage: TokenUsage | None  # None なら使用量が報告されていない
    started_at: datetime
    service_tier: str = ""
    cache_hit: bool = False  # フレームワークのキャッシュから答え、LLM を呼んでいない
    reason: str = ""  # すべての金額が決まらないときの、その理由
    status: str = ""  # 空なら、まだ計算していない
    prompt_usd: Decimal = Decimal("NaN")
    output_usd: Decimal = Decimal("NaN")
    matched_model: str = ""
    price_source: str = ""

    def changed(self, **changes: Any) -> LlmCall:
        """一部を変えた、まだ計算していない呼び出し。"""
        kept = (self.span_id, self.name, self.model, self.usage, self.started_at)
        fresh = LlmCall(*kept, service_tier=self.service_tier, cache_hit=self.cache_hit)
        return replace(fresh, **changes)

    @property
    def input_tokens(self) -> int:
        """入力トークン数。"""
        return self.usage.input_tokens if self.usage else 0

    @property
    def output_tokens(self) -> int:
        """出力トークン数。"""
        return self.usage.output_tokens if self.usage else 0

    @property
    def total_usd(self) -> Decimal:
        """入力側と出力の合計。``partial`` なら下限になる。"""
        return self.prompt_usd + self.output_usd

    @property
    def priced(self) -> bool:
        """すべてのトークンの金額が決まったか。"""
        return self.status in ("priced", "cache_hit")


def llm_calls(spans: Sequence[Span], known: Mapping[str, LlmCall] | None = None) -> list[LlmCall]:
    """LLM の呼び出しを、二重に数えずに取り出す。

    使用量を持つ子孫のないスパンだけを数える。子の合計より多い親のトークンは、キャッシュの内訳なら
    子に移し、ほかは ``UNATTRIBUTED`` の呼び出しにする。使用量のない LLM スパンは、子孫にも先祖にも
    ないときだけ「報告なし」として残す。失敗した呼び出しは課金されないので数えない。
    ``known`` は、もう読んだスパンの呼び出し。
    """
    by_id = {span.span_id: span for span in spans}
    read = {
        key: call
        for key, span in by_id.items()
        if (call := (known or {}).get(key) or read_call(span))
    }
    for key in _langchain_hits(by_id, read):
        read[key] = read[key].changed(cache_hit=True)
    above = {key: list(_ancestors(by_id, key)) for key in read}
    used = {key for key, call in read.items() if call.usage}
    silent = {key for key in read.keys() - used if used.isdisjoint(above[key])}
    parents = {parent for key in used for parent in above[key]}
    silent -= parents | {parent for key in silent for parent in above[key]}
    calls = {key: call for key, call in read.items() if key in silent | (used - parents)}
    for key in sorted(parents & used, key=lambda parent: -len(above[parent])):  # 内側から
        below = {leaf: call for leaf, call in calls.items() if call.usage and key in above[leaf]}
        calls |= _compare(read[key], below, by_id[key].get_attribute(_OTEL_TOTAL) is not None)
    return list(calls.values())


def _ancestors(spans: Mapping[str, Span], span_id: str) -> Iterator[str]:
    parent = spans[span_id].parent_id
    while parent is not None and parent in spans:
        yield parent
        parent = spans[parent].parent_id


def _compare(parent: LlmCall, below: dict[str, LlmCall], running: bool) -> dict[str, LlmCall]:
    """親の合計が子の合計より多いとき、その分を持つ呼び出し。"""
    total = sum((call.usage for call in below.values() if call.usage), TokenUsage())
    rest = (parent.usage or TokenUsage()) - total
    only_cache = rest.cached > 0 and not rest.output_tokens
    if only_cache and len(below) == 1 and rest.input_tokens in (0, rest.cached):
        return {key: call.changed(usage=parent.usage) for key, call in below.items()}
    if only_cache and not rest.input_tokens and len({call.model for call in below.values()}) == 1:
        return _share_cache(below, rest)
    missing = {name: n for name in _KEYS if (n := getattr(rest, name)) > 0}
    if running or not missing:
        return {}
    reason = f"{missing} of span {parent.name!r} are in no call below it"
    usage = TokenUsage(**missing)
    return {parent.span_id: parent.changed(model=UNATTRIBUTED, usage=usage, reason=reason)}


def _share_cache(below: dict[str, LlmCall], rest: TokenUsage) -> dict[str, LlmCall]:
    """親だけにあるキャッシュの内訳を、同じモデルの子に順に割り当てる(どう分けても金額は同じ)。"""
    found: dict[str, LlmCall] = {}
    for key, call in below.items():
        usage = call.usage or TokenUsage()
        read = min(usage.input_tokens - usage.cached, rest.cache_read_tokens)
        write = min(usage.input_tokens - usage.cached - read, rest.cache_write_tokens)
        hour = min(write, rest.cache_write_1h_tokens)
        more = TokenUsage(
            cache_read_tokens=read, cache_write_tokens=write, cache_write_1h_tokens=hour
        )
        found[key], rest = call.changed(usage=usage + more, reason=call.reason), rest - more
    return found


def read_call(span: Span) -> LlmCall | None:
    """スパン 1 つを読む。LLM の呼び出しでも、使用量の持ち主でもなければ ``None``。"""
    stored = stored_attributes(span)
    is_llm = _value(stored, SPAN_TYPE) in _LLM_TYPES
    if not is_llm and USAGE_ATTRIBUTE not in stored:
        return None
    outputs = _value(stored, "mlflow.spanOutputs")
    model = _value(stored, "mlflow.llm.model") or _input(stored, "model")
    usage, reason = _usage(stored, outputs, str(model).lower())
    if usage is None and (not is_llm or span.status.status_code.value == "ERROR"):
        return None
    return LlmCall(
        span.span_id,
        span.name,
        model if isinstance(model, str) and model else "(unknown)",
        usage,
        datetime.fromtimestamp(span.start_time_ns / 1e9, timezone.utc),
        _service_tier(stored, outputs),
        _is_cache_hit(stored, outputs),
        reason,
    )


def _value(stored: Mapping[str, Any], key: str) -> Any:
    """MLflow は属性を JSON の文字列で持つ。ほかの道具が書いた、JSON でない値もある。"""
    value = stored.get(key)
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _input(stored: Mapping[str, Any], key: str) -> Any:
    return _dig(_value(stored, "mlflow.spanInputs"), key)


def _usage(stored: Mapping[str, Any], outputs: Any, model: str) -> tuple[TokenUsage | None, str]:
    """使用量と、そのうち金額にできない部分。ほかの道具が書いた別の形は、報告がないのと同じ。"""
    data = _value(stored, USAGE_ATTRIBUTE)
    if not data and _value(stored, SPAN_TYPE) == SpanType.EMBEDDING:  # MLflow は拾わない
        tokens = _dig(outputs, "usage", "prompt_tokens")
        data = {"input_tokens": tokens} if tokens else None
    if not data or not isinstance(data, dict):
        return None, ""
    counts = cast("dict[str, Any]", data)
    if _OTEL_TOTAL in stored:
        counts = {key: _value(stored, name) for key, name in _OTEL_CACHE.items()} | counts
    try:
        usage = TokenUsage.from_mlflow(counts)
    except ValueError as error:
        return None, str(error)
    usage, reason = _repair(usage, outputs, "claude" in model)
    return usage, reason or _other_units(outputs)


def _other_units(outputs: Any) -> str:
    """文字のトークンの単価では計算しきれないもの。"""
    details = _dig(outputs, "usage")
    if not details:
        return ""
    counts = {name: _dig(details, *path) for name, path in _OTHER_UNITS.items()}
    found = [f"{count} {name}" for name, count in counts.items() if count]
    return f"{', '.join(found)} have no price in a price table" if found else ""


def _repair(usage: TokenUsage, outputs: Any, claude: bool) -> tuple[TokenUsage, str]:
    """入力にキャッシュを含めない形(合計か Anthropic の数え方で分かる)と、Gemini の合計を直す。"""
    gap, cached = usage.total_tokens - usage.known, usage.cached
    if (gap and gap == cached) or (claude and cached > usage.input_tokens):
        total = max(usage.total_tokens, usage.known + cached)
        return replace(usage, input_tokens=usage.input_tokens + cached, total_tokens=total), ""
    if not gap:
        return usage, ""
    details = _dig(outputs, "usage_metadata")
    tool = _dig(details, "tool_use_prompt_token_count") or 0  # ツールの結果を読んだ入力
    thought = _dig(details, "thoughts_token_count") or 0  # 思考の出力
    if tool + thought == gap:
        return usage + TokenUsage(input_tokens=tool, output_tokens=thought), ""
    return usage, f"{gap} of {usage.total_tokens} tokens are neither input nor output"


def _service_tier(stored: Mapping[str, Any], outputs: Any) -> str:
    """応答の値、なければ要求の値(OpenAI は応答の直下、Anthropic は ``usage`` の中)。"""
    found = _dig(outputs, "service_tier") or _dig(outputs, "usage", "service_tier")
    found = found or _value(stored, "service_tier") or _input(stored, "service_tier")
    return found if isinstance(found, str) else ""


def _is_cache_hit(stored: Mapping[str, Any], outputs: Any) -> bool:
    """自分で付けた印か、LangChain の印(キャッシュから答えたメッセージの ``total_cost`` は 0)。"""
    message = _dig(outputs, "generations", 0, 0, "message") or outputs
    free = bool(outputs) and _dig(message, "usage_metadata", "total_cost") == 0
    return free or _value(stored, STATUS_KEY) == "cache_hit"


def _langchain_hits(spans: Mapping[str, Span], calls: Iterable[str]) -> list[str]:
    """チェーンの印で分かるキャッシュの答え。

    MLflow はモデルのスパンから LangChain の印を捨てるが、チェーンの出力(最後の呼び出しの答え)には
    残す。チェーンの外の呼び出しは見分けられない。自分で ``cost.status`` を ``cache_hit`` にする。
    """
    langchain = (k for k in calls if spans[k].get_attribute("mlflow.message.format") == "langchain")
    last = {spans[key].parent_id or "": key for key in langchain}
    parents = {parent: spans[parent] for parent in last if parent in spans}
    return [
        last[parent]
        for parent, span in parents.items()
        if _is_cache_hit(stored_attributes(span), span.outputs)
    ]


def _dig(data: Any, *path: str | int) -> Any:
    """辞書とリストをたどる。途中になければ ``None``(例外より速い)。"""
    for key in path:
        if isinstance(data, dict):
            data = cast("dict[Any, Any]", data).get(key)
        elif isinstance(data, list) and data and key == 0:
            data = cast("list[Any]", data)[0]
        else:
            return None
    return data
