"""8.2.3 スパンから、LLM の呼び出し 1 回を読む(本書にリストなし)。

使用量の形は提供元ごとに違う。根拠があるときだけここで直し、入力か出力か決められないトークンは、
どちらにも数えず ``reason`` に書く。属性の名前は Databricks のトレースでも同じである。
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, cast

from mlflow.entities import Span, SpanType

from .._internals import stored_attributes
from ..prices.call import PriceBreakdown

USAGE_ATTRIBUTE, SPAN_TYPE = "mlflow.chat.tokenUsage", "mlflow.spanType"
STATUS_KEY = "cost.status"  # priced / partial / unpriced / missing_usage / cache_hit / rollup
_decode = json.JSONDecoder().raw_decode
_LLM_TYPES = (SpanType.LLM, SpanType.CHAT_MODEL, SpanType.EMBEDDING)
COUNTS = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "total_tokens": "total_tokens",
    "cache_read_tokens": "cache_read_input_tokens",
    "cache_write_tokens": "cache_creation_input_tokens",
    "cache_write_1h_tokens": "cache_creation_input_tokens_above_1hr",
}
OTEL_TOTAL = "gen_ai.usage.total_tokens"  # Strands のスパン。親では、前のトレースからの通算になる
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
        counts: dict[str, int] = {}
        for name, key in COUNTS.items():
            count = data.get(key)
            if count:
                counts[name] = count if type(count) is int else _whole(name, count)
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
        return TokenUsage(**{k: getattr(self, k) + getattr(other, k) for k in COUNTS})

    def __sub__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(**{k: getattr(self, k) - getattr(other, k) for k in COUNTS})


def _whole(name: str, count: Any) -> int:
    """整数が、保存先によっては小数(1000.0)で返り、numpy の値は MLflow が文字列にする。"""
    is_whole = isinstance(count, float) and count.is_integer()
    if is_whole or (isinstance(count, str) and count.isdecimal()):
        return int(count)
    raise ValueError(f"{name} must be an integer, got {count!r}")


@dataclass(slots=True)
class LlmCall:
    """トレースの中の、LLM の呼び出し 1 回。"""

    span_id: str
    name: str
    model: str
    usage: TokenUsage | None  # None なら使用量が報告されていない
    started_at: datetime
    service_tier: str = ""
    cache_hit: bool = False  # フレームワークのキャッシュから答え、LLM を呼んでいない
    reason: str = ""  # すべての金額が決まらないときの、その理由
    cost: PriceBreakdown | None = None  # None なら、まだ計算していない

    def changed(self, **changes: Any) -> LlmCall:
        """一部を変えた、まだ計算していない呼び出し。"""
        return replace(self, cost=None, **changes)


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
        is_cache_hit(stored, outputs),
        reason,
    )


def _value(stored: Mapping[str, Any], key: str) -> Any:
    """MLflow は属性を JSON の文字列で持つ。ほかの道具が書いた、JSON でない値もある。"""
    text = stored.get(key)
    if not isinstance(text, str):
        return text
    try:
        value, end = _decode(text)  # json.loads の半分の時間で読める
    except ValueError:
        return text
    return value if end == len(text) else text


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
    if OTEL_TOTAL in stored:
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
    if isinstance(tool, int) and isinstance(thought, int) and tool + thought == gap:
        return usage + TokenUsage(input_tokens=tool, output_tokens=thought), ""
    return usage, f"{gap} of {usage.total_tokens} tokens are neither input nor output"


def _service_tier(stored: Mapping[str, Any], outputs: Any) -> str:
    """応答の値、なければ要求の値(OpenAI は応答の直下、Anthropic は ``usage`` の中)。"""
    found = _dig(outputs, "service_tier") or _dig(outputs, "usage", "service_tier")
    found = found or _value(stored, "service_tier") or _input(stored, "service_tier")
    return found if isinstance(found, str) else ""


def is_cache_hit(stored: Mapping[str, Any], outputs: Any) -> bool:
    """自分で付けた印か、LangChain の印(キャッシュから答えたメッセージの ``total_cost`` は 0)。"""
    message = _dig(outputs, "generations", 0, 0, "message") or outputs
    free = bool(outputs) and _dig(message, "usage_metadata", "total_cost") == 0
    return free or _value(stored, STATUS_KEY) == "cache_hit"


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
