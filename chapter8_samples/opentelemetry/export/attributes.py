"""OTLP に渡すスパンに、MLflow の訳が落とす属性を足す。

会話とユーザー、タグ、標本の重み、キャッシュのトークン数、コスト、例外の型、プロンプトの名前と版は、
足さなければ届かない。
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from .._internals import tags_and_metadata

logger = logging.getLogger(__name__)


def with_export_attributes(span: ReadableSpan) -> ReadableSpan:
    """属性を足したコピー。

    opentelemetry-sdk 1.43 以降は終わったスパンの属性を書き換えられない。MLflow 3.17 は
    OTLP だけの送信でルートにタグを書こうとして失敗し、ルートスパンが黙って消える。
    """
    attributes: dict[str, Any] = dict(span.attributes or {})
    try:
        attributes = _extra(span, attributes) | attributes
        _keep_name(attributes)
        for name in _NUMBERS:
            if name in attributes:
                attributes[name] = float(attributes[name])
    except (AttributeError, KeyError, TypeError, ValueError):
        logger.warning("span %s is exported without extra attributes", span.name, exc_info=True)
    same: dict[str, Any] = {name: getattr(span, name) for name in _COPIED}
    return ReadableSpan(attributes=attributes, **same)


_COPIED = (
    *("name", "context", "parent", "resource", "events", "links", "kind"),
    *("instrumentation_scope", "status", "start_time", "end_time"),
)
_NUMBERS = ("sampling.probability", "sampling.weight", "gen_ai.response.time_to_first_chunk")
_TRANSLATED = {'"CHAT_MODEL"', '"LLM"', '"EMBEDDING"', '"TOOL"', '"AGENT"'}


def _keep_name(attributes: dict[str, Any]) -> None:
    """規約にない種類(CHAIN など)を外す。残すと MLflow がスパンの名前を種類名に変えてしまう。"""
    if os.environ.get("MLFLOW_ENABLE_OTEL_GENAI_SEMCONV") == "true":
        if attributes.get("mlflow.spanType") == '"RETRIEVER"':
            attributes["gen_ai.operation.name"] = "retrieval"
        if attributes.get("mlflow.spanType") not in _TRANSLATED:
            attributes.pop("mlflow.spanType", None)


def _extra(span: ReadableSpan, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """MLflow の訳が落とすもの: 会話とユーザー、タグ、標本の重み、キャッシュ、コスト、例外の型。"""
    tags, metadata = tags_and_metadata(span)
    session = metadata.get("mlflow.trace.session")
    extra: dict[str, Any] = {
        "session.id": session,
        "gen_ai.conversation.id": session,
        "user.id": metadata.get("mlflow.trace.user"),
        **_llm_attributes(attributes),
    }
    if attributes.get("mlflow.spanType") in ('"CHAT_MODEL"', '"LLM"'):
        extra |= _prompt(json.loads(tags.get("mlflow.linkedPrompts") or "[]"))
    if span.status.status_code is StatusCode.ERROR:
        types = (dict(e.attributes or {}).get("exception.type") for e in span.events)
        extra["error.type"] = next((name for name in types if name), "_OTHER")
    if span.parent is None:
        extra |= {f"mlflow.traceTag.{k}": v for k, v in tags.items() if not k.startswith("mlflow.")}
        extra |= {k: v for k, v in metadata.items() if not k.startswith("mlflow.")}
    return {name: value for name, value in extra.items() if value is not None}


def _prompt(linked: list[dict[str, Any]]) -> dict[str, str]:
    """トレースの中で読み込まれたプロンプト。2 つ以上なら、どの呼び出しのものかは分からない。"""
    if len(linked) != 1:
        return {}
    (prompt,) = linked
    return {
        "gen_ai.prompt.name": str(prompt["name"]),
        "gen_ai.prompt.version": str(prompt["version"]),
    }


def _llm_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    usage = json.loads(attributes.get("mlflow.chat.tokenUsage") or "{}")
    if not usage:
        return {}
    cost = json.loads(attributes.get("mlflow.llm.cost") or "{}")
    provider = attributes.get("mlflow.llm.provider") or attributes.get("mlflow.message.format")
    return {
        "gen_ai.usage.cache_read.input_tokens": usage.get("cache_read_input_tokens"),
        "gen_ai.usage.cache_write.input_tokens": usage.get("cache_creation_input_tokens"),
        "gen_ai.provider.name": json.loads(provider) if provider else None,
        "llm.cost.total_usd": cost.get("total_cost"),
    }
