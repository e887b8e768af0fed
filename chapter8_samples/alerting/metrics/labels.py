"""8.4.1 指標を、モデル、プロンプトの版、タグの値ごとに分ける。

分けた値が多すぎるラベル(ユーザーの ID など)は、その数だけアラートと系列を作るので断る。

Databricks でもそのまま使う(標準ライブラリーだけで動く)。
"""

from __future__ import annotations

import json
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


def _models(row: TraceRow) -> Iterator[tuple[str, TraceRow]]:
    models = _json(row.tags.get(MODELS_TAG))
    if not isinstance(models, dict) or not models:
        yield UNKNOWN, row
        return
    for model, (_, sent, received, usd) in models.items():
        tokens = {"input_tokens": sent, "output_tokens": received, "total_tokens": sent + received}
        yield model, replace(row, tokens=tokens, cost_usd=float(usd) if usd else None)


def _prompt_version(row: TraceRow) -> str:
    linked = _json(row.tags.get(PROMPTS_TAG))
    if isinstance(linked, list) and linked:
        return ", ".join(f"{p.get('name')}/{p.get('version')}" for p in linked)
    return next((row.tags[key] for key in VERSION_TAGS if row.tags.get(key)), UNKNOWN)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:  # 長すぎて途中で切られたタグ
        return None
