"""8.3.5 スコアラーを 1 回呼ぶ。何を返しても、何を投げても、保存できる評価にする。"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Sequence
from reprlib import repr as shortened
from typing import Any, cast

import mlflow
from google.protobuf.json_format import MessageToJson
from mlflow.entities import AssessmentError, AssessmentSource, Feedback, SpanType, Trace
from mlflow.genai import scorers as built_in
from mlflow.genai.judges import CategoricalRating
from mlflow.genai.scorers import Scorer

logger = logging.getLogger(__name__)

_NEED_RETRIEVER = (
    built_in.RetrievalGroundedness,
    built_in.RetrievalRelevance,
    built_in.RetrievalSufficiency,
)


def given(trace: Trace) -> dict[str, Any]:
    """スコアラーに渡す、トレースの入力、出力、人が付けた正解。"""
    root = next((span for span in trace.data.spans if span.parent_id is None), None)
    return {
        "inputs": root.inputs if root else None,
        "outputs": root.outputs if root else None,
        "expectations": {
            a.name: a.expectation.value for a in trace.info.assessments if a.expectation
        },
        "trace": trace,
    }


def call_scorer(scorer: Scorer, trace: Trace) -> Sequence[Feedback]:
    """スコアラーを 1 回呼ぶ。例外は、エラーの付いた評価として返す。トレースは残さない。"""
    retriever: Any = SpanType.RETRIEVER
    if isinstance(scorer, _NEED_RETRIEVER) and not trace.search_spans(span_type=retriever):
        return []  # 採点するものがない。失敗ではない
    # スコアラーの中で traced な関数が呼ばれても、監視対象のトレースに混ざらないようにする
    run: Callable[..., Any] = mlflow.trace(scorer.run, sampling_ratio_override=0.0)  # pyright: ignore
    try:
        result = run(**given(trace))
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        # 利用者のコードも含むので、何が起きるか分からない。1 件の失敗で全体を止めない
        logger.warning("scorer %r failed on %s: %s", scorer.name, trace.info.trace_id, _told(error))
        return [_failed(scorer, _told(error))]
    items = cast("list[Any]", result) if isinstance(result, list) else [result]
    return [_storable(scorer, item) for item in items if item is not None]


def _storable(scorer: Scorer, item: Any) -> Feedback:
    """判定がない、または HTTP で送れない評価(NaN、半端なサロゲートなど)は、失敗にする。"""
    feedback = item if isinstance(item, Feedback) else _feedback(scorer, value=item)
    value: Any = feedback.value
    if not feedback.error and (value is None or value is CategoricalRating.UNKNOWN):
        return _failed(scorer, "the judge gave no verdict", feedback.metadata)
    try:
        MessageToJson(feedback.to_proto())
    except Exception as error:  # 値の型によって、さまざまな例外になる
        reason = f"{shortened(value)} cannot be stored: {_told(error)}"
        return _failed(scorer, reason, feedback.metadata)
    return feedback


def _failed(scorer: Scorer, reason: str, metadata: dict[str, str] | None = None) -> Feedback:
    made = _feedback(scorer, error=AssessmentError("SCORER_ERROR", reason))
    # 失敗しても、かかったコストは残す
    made.metadata = {key: v for key, v in (metadata or {}).items() if key.startswith("mlflow.")}
    return made


def _feedback(scorer: Scorer, **fields: Any) -> Feedback:
    return Feedback(name=scorer.name, source=AssessmentSource("CODE", scorer.name), **fields)


def _told(error: BaseException) -> str:
    text = "".join(traceback.format_exception_only(error)).strip()  # str() が壊れた例外もある
    return text.encode(errors="replace").decode()  # 半端なサロゲートは、保存できない
