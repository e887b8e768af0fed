"""8.5.2 8.3 の評価(スコアラーの判定とフィードバック)を、規約のイベントとして OTLP で送る。

イベント ``gen_ai.evaluation.result`` は、評価したスパンに結び付いたログレコード。トレースと同じ
バックエンドで、点数を集計できる。MLflow のサーバーはログを受け付けない(評価は MLflow にある)。
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._internals import emit_event, make_logger_provider
from .sending import flush_in_time, last_results, make_exporter

EVENT = "gen_ai.evaluation.result"


def evaluation_attributes(assessment: Any) -> dict[str, Any] | None:
    """評価 1 件の、イベントの属性。期待値(expectation)と、上書きされた評価では None。

    真偽値は、点数(1.0 か 0.0)と言葉(``true`` か ``false``)の両方にする。
    """
    if getattr(assessment, "feedback", None) is None or assessment.valid is False:
        return None
    value, error = assessment.feedback.value, assessment.feedback.error
    found: dict[str, Any] = {
        "gen_ai.evaluation.name": assessment.name,
        "gen_ai.evaluation.explanation": assessment.rationale,
        "error.type": error and (error.error_code or "_OTHER"),
    }
    if isinstance(value, bool | int | float):
        found["gen_ai.evaluation.score.value"] = float(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str):
        found["gen_ai.evaluation.score.label"] = value
    return {name: one for name, one in found.items() if one not in (None, "")}


@dataclass(frozen=True)
class EvaluationEvents:
    """評価を送る口。``setup_evaluation_events`` が返す。"""

    provider: Any
    results: Sequence[Any]

    def emit(self, trace: Any) -> int:
        """トレース(``mlflow.get_trace`` などの結果)の評価を送り、その件数を返す。

        スパンの評価はそのスパンに、トレースの評価はルートスパンに結び付ける。同じトレースをもう一度
        渡せば、もう一度送る。
        """
        spans: list[Any] = trace.data.spans
        root = next((span.span_id for span in spans if span.parent_id is None), "0")
        sent = 0
        for one in trace.info.assessments:
            if (attributes := evaluation_attributes(one)) is not None:
                attributes |= _response_id(spans, one.span_id)
                trace_id = int(re.findall("[0-9a-f]{32}$", trace.info.trace_id)[0], 16)
                span_id = int(one.span_id or root, 16)
                created_ms = one.create_time_ms
                emit_event(self.provider, EVENT, attributes, trace_id, span_id, created_ms)
                sent += 1
        return sent

    def flush(self, timeout_seconds: float = 10.0) -> bool:
        """いままでの分を送り、受け取られたかを返す。``timeout_seconds`` 秒で必ず戻る。"""
        return flush_in_time(self.provider, self.results, timeout_seconds)

    def shutdown(self) -> None:
        """残りを送って終える。"""
        self.provider.shutdown()


def setup_evaluation_events(
    endpoint: str,
    service_name: str,
    protocol: str = "grpc",
    *,
    headers: Mapping[str, str] | None = None,
) -> EvaluationEvents:
    """評価のイベントを OTLP(ログ)で送る口を作る。引数は ``setup_genai_metrics`` と同じ。"""
    exporter = make_exporter("logs", endpoint, protocol, headers)
    results = last_results(exporter)
    return EvaluationEvents(make_logger_provider(exporter, service_name), results)


def _response_id(spans: list[Any], span_id: str | None) -> dict[str, str]:
    """評価した応答の id。トレースの評価では、応答が 1 つだけのとき。"""
    name = "gen_ai.response.id"
    chosen = [span for span in spans if span_id in (None, span.span_id)]
    ids = {str(found) for span in chosen if (found := span.get_attribute(name))}
    return {name: ids.pop()} if len(ids) == 1 else {}
