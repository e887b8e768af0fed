"""8.1.6 トレースに付ける値の検査、検索式、OTLP だけで送るときの付け方。"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow

from ._internals import scope_metadata

logger = logging.getLogger(__name__)

# ユーザー・セッション・リクエスト ID の上限。超えるとトレース情報が保存されない
MAX_METADATA_CHARS = 250
MAX_TAG_CHARS = 4096


def check_context(values: Mapping[str, Any]) -> None:
    """``RequestContext`` の値が保存できるかを確かめる(``ValueError`` が、値と直し方を示す)。"""
    for name, value in values.items():
        is_id = name in ("user_id", "session_id", "request_id")
        if name != "extra_tags" and (value is not None or name == "request_id"):
            _check_text(name, value, MAX_METADATA_CHARS if is_id else MAX_TAG_CHARS)
    for key, value in values["extra_tags"].items():
        _check_text(f"key of extra_tags {key!r}", key, MAX_METADATA_CHARS)
        _check_text(f"extra_tags[{key!r}]", value, MAX_TAG_CHARS)
        if key.startswith("mlflow."):
            raise ValueError(f"extra_tags[{key!r}]: names starting with 'mlflow.' are reserved")


def _check_text(name: str, value: object, max_chars: int) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r} must be a non-empty string")
    if len(value) > max_chars:
        raise ValueError(f"{name} has {len(value)} characters; MLflow keeps at most {max_chars}")
    if re.search(r"[\ud800-\udfff]", value):
        raise ValueError(f"{name}={value!r} cannot be stored: half a surrogate pair")


def filter_string(equal: Mapping[str, str | None], min_latency_ms: int | None = None) -> str | None:
    """すべてを満たす検索式(``None`` の条件は除く)。条件がなければ ``None``。"""
    parts = [f"{key} = {_quote(value)}" for key, value in equal.items() if value is not None]
    if min_latency_ms is not None:
        parts.append(f"execution_time_ms >= {int(min_latency_ms)}")
    return " AND ".join(parts) or None


def tag_field(key: str) -> str:
    """検索式での、タグの書き方。"""
    if "`" in key:
        raise ValueError(f"tag key {key!r} contains a backquote; MLflow filters cannot express it")
    return f"tags.`{key}`"


def _quote(value: object) -> str:
    """MLflow の検索式には引用符のエスケープがないので、含まれないほうの引用符で囲む。"""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be a string")
    if "'" in value and '"' in value:
        raise ValueError(f"{value!r} contains both quotes; MLflow filters cannot express it")
    return f'"{value}"' if "'" in value else f"'{value}'"


def sends_only_otlp() -> bool:
    """OTLP だけで送っているか。そのときトレースのタグは届かず、付けるとルートスパンが失われる。"""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    enabled = os.environ.get("MLFLOW_ENABLE_OTLP_EXPORTER", "true").lower() not in ("false", "0")
    dual = os.environ.get("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "").lower() in ("true", "1")
    return any(os.environ.get(name) for name in names) and enabled and not dual


def add_root_attributes(tags: Mapping[str, str], user: str | None, session: str | None) -> bool:
    """ルートスパンの属性に書く。MLflow サーバーが、タグ・ユーザー・セッションに直す。"""
    span = mlflow.get_current_active_span()
    if span is None or span.parent_id is not None:
        name = span and span.name
        logger.warning("over OTLP call add_trace_metadata() in the root span, not %r", name)
        return False
    values = {f"mlflow.traceTag.{key}": value for key, value in tags.items()}
    values |= {k: v for k, v in scope_metadata().items() if not k.startswith("mlflow.")}
    values |= {"user.id": user or "", "session.id": session or ""}
    span.set_attributes({key: value for key, value in values.items() if value})
    return True


def check_experiment_ids(ids: Sequence[str] | None) -> list[str] | None:
    """エクスペリメントの ID の一覧か。名前では、サーバーの 500 を MLflow が何分も再試行する。"""
    if ids is None:
        return None
    if isinstance(ids, str):  # "12" が、エクスペリメント 1 と 2 の検索になってしまう
        raise ValueError(f"experiment_ids={ids!r} must be a list of experiment ids")
    for one in ids:
        is_table = str(one).count(".") in (1, 2)  # Unity Catalog の場所
        if not (str(one).isdecimal() or is_table):
            raise ValueError(f"experiment_ids takes ids, not names: {one!r}")
    return list(ids)
