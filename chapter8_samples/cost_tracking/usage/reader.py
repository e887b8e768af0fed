"""8.2.3 トレースを読み、LLM の呼び出しを二重に数えずに取り出す(本書にリストなし)。

使用量は、親のスパンにも子のスパンにも書かれていることがある(LangChain と OpenAI を両方計装した
ときなど)。単純に足すと 2 倍になり、ストリームの設定漏れは 0 に見える。数え方をここに 1 つだけ置く。

Databricks のトレースでも属性の名前は同じなので、そのまま使える。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, cast

import mlflow
from mlflow.entities import Span, SpanType, Trace, TraceInfo
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient  # MlflowClient は mlflow-tracing にない

USAGE_ATTRIBUTE = "mlflow.chat.tokenUsage"
MODEL_ATTRIBUTE = "mlflow.llm.model"
WEIGHT_KEY = "sampling.weight"  # サンプリングで残したトレース 1 件が、何件分を代表するか
UNKNOWN_MODEL = "(unknown)"
PAGE_SIZE = 500  # MLflow サーバーが 1 回に返す上限
_LLM_TYPES = (SpanType.LLM, SpanType.CHAT_MODEL, SpanType.EMBEDDING)


class ExperimentNotFoundError(LookupError):
    """その名前のエクスペリメントが、いまの接続先にない。"""


class TraceNotFoundError(LookupError):
    """その ID のトレースが、いまの接続先にない。"""


@dataclass(frozen=True, slots=True, kw_only=True)
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
        """``mlflow.chat.tokenUsage`` から作る。

        Gemini の思考トークンは合計にしか入っていないので、差を出力に数える。
        """
        keys = (
            "input_tokens", "output_tokens", "total_tokens", "cache_read_input_tokens",
            "cache_creation_input_tokens", "cache_creation_input_tokens_above_1hr",
        )  # fmt: skip
        prompt, completion, total, read, write, write_1h = (int(data.get(k) or 0) for k in keys)
        completion = max(completion, total - prompt)
        return cls(
            input_tokens=prompt,
            output_tokens=completion,
            total_tokens=prompt + completion,
            cache_read_tokens=read,
            cache_write_tokens=write,
            cache_write_1h_tokens=write_1h,
        )

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(**{k: getattr(self, k) + getattr(other, k) for k in self.__slots__})


@dataclass(frozen=True, slots=True)
class LlmCall:
    """トレースの中の、LLM の呼び出し 1 回。``usage`` が ``None`` なら使用量が報告されていない。"""

    span_id: str
    name: str
    model: str
    usage: TokenUsage | None
    started_at: datetime


def find_experiment_id(experiment_name: str) -> str:
    """エクスペリメントの ID。ないものを作らない。

    Raises:
        ExperimentNotFoundError: その名前のものがない。
    """
    experiment = cast(Any, TracingClient()).store.get_experiment_by_name(experiment_name)
    if experiment is None:
        raise ExperimentNotFoundError(
            f"no experiment {experiment_name!r} at {mlflow.get_tracking_uri()}; "
            "check the name and MLFLOW_TRACKING_URI"
        )
    return experiment.experiment_id


def iter_traces(
    experiment_id: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    filter_string: str | None = None,
    include_spans: bool = False,
    page_size: int = PAGE_SIZE,
) -> Iterator[Trace]:
    """期間のトレースを古い順に 1 件ずつ。1 件ごとに問い合わせず、ページ単位で読む。"""
    if page_size < 1:
        raise ValueError(f"page_size must be >= 1, got {page_size!r}")
    client = TracingClient()
    token: str | None = None
    while True:
        page = client.search_traces(
            locations=[experiment_id],
            filter_string=_time_filter(start, end, filter_string),
            max_results=page_size,
            order_by=["timestamp_ms ASC"],
            page_token=token,
            include_spans=include_spans,
        )
        yield from page
        token = cast("str | None", page.token)
        if not token:
            return


def _time_filter(start: datetime | None, end: datetime | None, extra: str | None) -> str | None:
    bounds = ((">=", "start", start), ("<", "end", end))
    parts = [f"timestamp_ms {op} {_millis(name, at)}" for op, name, at in bounds if at]
    return " AND ".join([*parts, *([extra] if extra else [])]) or None


def _millis(name: str, at: datetime) -> int:
    return round(with_time_zone(name, at).timestamp() * 1000)


def with_time_zone(name: str, at: datetime) -> datetime:
    """時刻をそのまま返す。タイムゾーンがなければ、どこの時刻か分からないので ``ValueError``。"""
    if at.tzinfo is None:
        raise ValueError(f"{name}={at!r} has no time zone; use datetime(..., tzinfo=timezone.utc)")
    return at


def sampling_weight(info: TraceInfo) -> float:
    """このトレースが代表する件数。ないものと壊れたものは 1 件分(cost_analysis.sql と同じ扱い)。"""
    try:
        weight = float(info.trace_metadata.get(WEIGHT_KEY) or 1)
    except ValueError:
        return 1.0
    return weight if 0 < weight < float("inf") else 1.0


@dataclass(frozen=True, slots=True)
class StoreTotals:
    """保存先が足した、期間の件数とトークン数。"""

    trace_count: int
    traces_with_usage: int
    usage: TokenUsage


def totals_from_store(
    experiment_id: str, start: datetime | None = None, end: datetime | None = None
) -> StoreTotals | None:
    """トレースを読まず、保存先の集計 API に足してもらう。

    1 件ずつ足したときと同じ数にならない恐れがあれば ``None``: サンプリングされたトレースがある、
    入力と出力の和が合計と違う(Gemini の思考トークンなど)、保存先が集計に対応していない。
    """
    period = _metric_period(start, end)
    if _has_weighted_trace(experiment_id, start, end):
        return None
    try:
        count = _ask_store(experiment_id, period, "trace_count", AggregationType.COUNT)
        totals = _ask_store(
            experiment_id, period, "total_tokens", AggregationType.SUM, AggregationType.AVG
        )
        names = ("input_tokens", "output_tokens")
        parts = [_ask_store(experiment_id, period, n, AggregationType.SUM) for n in names]
    except (MlflowException, NotImplementedError):  # 古いサーバー、Databricks、ファイルの保存先
        return None
    prompt, completion, total = (round(v.get("SUM") or 0) for v in (*parts, totals))
    reported = total / totals["AVG"] if totals.get("AVG") else 0.0  # 使用量のあるトレースの数
    unclear = bool(totals) and not reported  # 合計が 0 だと、報告の有無を見分けられない
    if prompt + completion != total or unclear or abs(reported - round(reported)) > 0.1:
        return None
    usage = TokenUsage(input_tokens=prompt, output_tokens=completion, total_tokens=total)
    return StoreTotals(round(count.get("COUNT") or 0), round(reported), usage)


def _metric_period(start: datetime | None, end: datetime | None) -> dict[str, int | None]:
    # 集計 API の期間は両端を含む。終わりを 1 ミリ秒手前にして [start, end) に合わせる
    return {
        "start_time_ms": _millis("start", start) if start else None,
        "end_time_ms": _millis("end", end) - 1 if end else None,
    }


def _has_weighted_trace(experiment_id: str, start: datetime | None, end: datetime | None) -> bool:
    sampled = f"metadata.`{WEIGHT_KEY}` IS NOT NULL"
    traces = iter_traces(experiment_id, start, end, filter_string=sampled, page_size=1)
    return next(traces, None) is not None


def _ask_store(
    experiment_id: str, period: dict[str, int | None], metric: str, *kinds: AggregationType
) -> dict[str, float]:
    points = cast(Any, TracingClient()).store.query_trace_metrics(
        experiment_ids=[experiment_id],
        view_type=MetricViewType.TRACES,
        metric_name=metric,
        aggregations=[MetricAggregation(aggregation_type=kind) for kind in kinds],
        **period,
    )
    return points[0].values if points else {}


def load_trace(trace: Trace | str) -> Trace:
    """ID なら読み込み、トレースならそのまま返す。

    Raises:
        TraceNotFoundError: ID のトレースがない。
    """
    found = mlflow.get_trace(trace) if isinstance(trace, str) else trace
    if found is None:
        raise TraceNotFoundError(f"no trace {trace!r} at {mlflow.get_tracking_uri()}")
    return found


def llm_calls(trace: Trace) -> list[LlmCall]:
    """LLM の呼び出しを、二重に数えずに取り出す。

    LangChain と OpenAI を両方計装すると、親子のスパンが同じ使用量を持つ。使用量を持つ子孫の
    ないスパンだけを数える。使用量のない LLM スパンは、子孫にも先祖にもないときだけ、
    「報告なし」として残す。失敗した呼び出しは課金されないので数えない。
    """
    spans = {span.span_id: span for span in trace.data.spans}
    usages = {key: usage for key, span in spans.items() if (usage := span_usage(span))}
    covered = {a for key in usages for a in _ancestors(spans, key)}
    calls: list[LlmCall] = []
    for key, span in spans.items():
        usage = usages.get(key)
        silent = usage is None and is_silent_call(span)
        if key in covered or not (usage or silent):
            continue
        if silent and any(a in usages for a in _ancestors(spans, key)):
            continue
        started = datetime.fromtimestamp(span.start_time_ns / 1e9, timezone.utc)
        calls.append(LlmCall(key, span.name, span_model(span), usage, started))
    return calls


def _ancestors(spans: Mapping[str, Span], span_id: str) -> Iterator[str]:
    parent = spans[span_id].parent_id
    while parent is not None and parent in spans:
        yield parent
        parent = spans[parent].parent_id


def span_usage(span: Span) -> TokenUsage | None:
    """スパンの使用量。埋め込みは MLflow が拾わないので、出力の ``usage`` から読む。"""
    data = span.get_attribute(USAGE_ATTRIBUTE)
    if data and isinstance(data, Mapping):  # ほかの道具が書いた別の形は、報告がないのと同じ
        return TokenUsage.from_mlflow(cast(Mapping[str, Any], data))
    if span.span_type != SpanType.EMBEDDING:
        return None
    tokens = _field(_field(span.outputs, "usage"), "prompt_tokens")
    if not isinstance(tokens, int):
        return None
    return TokenUsage(input_tokens=tokens, total_tokens=tokens)


def span_model(span: Span) -> str:
    """スパンのモデル名。分からなければ ``"(unknown)"``。"""
    model = span.get_attribute(MODEL_ATTRIBUTE) or _field(span.inputs, "model")
    return model if isinstance(model, str) and model else UNKNOWN_MODEL


def _field(data: Any, name: str) -> Any:
    return cast(dict[str, Any], data).get(name) if isinstance(data, dict) else None


def is_silent_call(span: Span) -> bool:
    """成功した LLM の呼び出しなのに、使用量の報告がないか。"""
    return span.span_type in _LLM_TYPES and span.status.status_code.value != "ERROR"
