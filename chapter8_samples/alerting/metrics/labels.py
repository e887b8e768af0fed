"""8.4.1 指標を、モデル、プロンプトの版、タグの値ごとに分ける。

分けた値が多すぎるラベル(ユーザーの ID など)は、その数だけアラートと系列を作るので拒否する。

Databricks でもそのまま使う(標準ライブラリーだけで動く)。
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from .measures import MetricSourceError, TraceRow

MAX_LABELS = 50
UNKNOWN = "unknown"
"""ラベルのないトレースの値。"""
MODELS_TAG = "cost.by_model"
"""8.2 が書く ``{"モデル": [回数, 入力, 出力, USD か null]}``。"""
PROMPTS_TAG = "mlflow.linkedPrompts"
VERSION_TAGS = ("prompt.version", "prompt_version")


def split_rows(rows: Iterable[TraceRow], by: str) -> dict[str, list[TraceRow]]:
    """ラベルの値 -> 行。二つのモデルを使ったトレースは、両方に入る(コストはそのモデルの分だけ)。

    Raises:
        MetricSourceError: 値の種類が ``MAX_LABELS`` を超えた。
    """
    found: dict[str, list[TraceRow]] = {}
    for row in rows:
        for label, part in _parts(row, by):
            found.setdefault(label, []).append(part)
    if len(found) > MAX_LABELS:
        raise MetricSourceError(
            f"by {by!r} has {len(found)} values; use a label with at most {MAX_LABELS}"
        )
    return found


def _parts(row: TraceRow, by: str) -> Iterator[tuple[str, TraceRow]]:
    if by == "model":
        yield from _models(row)
    elif by == "prompt_version":
        yield _prompt_version(row), row
    elif by.startswith("tag:"):
        yield row.tags.get(by.removeprefix("tag:")) or UNKNOWN, row
    else:
        raise MetricSourceError(f"by {by!r} is not model, prompt_version or tag:<name>")


def _models(row: TraceRow) -> list[tuple[str, TraceRow]]:
    try:
        models: dict[str, Any] = json.loads(row.tags.get(MODELS_TAG) or "{}")
        parts = [(model or UNKNOWN, _share(row, *use)) for model, use in models.items()]
    except (ValueError, TypeError, AttributeError):  # 途中で切られたか、ほかのものが書いたタグ
        parts = []
    return parts or [(UNKNOWN, row)]


def _share(row: TraceRow, calls: int, sent: float, received: float, usd: str | None) -> TraceRow:
    tokens = {"input_tokens": sent, "output_tokens": received, "total_tokens": sent + received}
    cost = None if usd is None else float(usd)
    if not math.isfinite(sum(tokens.values()) + (cost or 0)):
        raise ValueError(f"cost of {row.trace_id} is not a number")
    return replace(row, tokens=tokens, cost_usd=cost)


def _prompt_version(row: TraceRow) -> str:
    try:
        prompts: list[dict[str, Any]] = json.loads(row.tags.get(PROMPTS_TAG) or "[]")
        linked = ", ".join(f"{p['name']}/{p['version']}" for p in prompts)
    except (ValueError, TypeError, KeyError):
        linked = ""
    tagged = (row.tags[key] for key in VERSION_TAGS if row.tags.get(key))
    return linked or next(tagged, UNKNOWN)
