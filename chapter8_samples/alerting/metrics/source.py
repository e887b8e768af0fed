"""8.4.1 アラートの指標を MLflow から読む。

MLflow サーバーには集計させ(``/traces/metrics``)、サーバーがないか古いときは ``search_traces`` で
集めて数える。値は同じで、5,000 件なら集計は 50 ミリ秒ほど、検索は 2 秒ほどかかる。

Databricks では ``search_traces`` で数える。
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from functools import cache
from time import monotonic
from typing import Any

from .labels import split_rows
from .measures import (
    MetricSample,
    MetricSource,
    MetricSourceError,
    RowNumbers,
    Tally,
    TraceRow,
    measure,
    verdict,
)

logger = logging.getLogger(__name__)
_warn_once = cache(logger.warning)

MAX_TRACES = 50_000
"""一つの集計期間で集めるトレースの上限。"""
PAGE_SIZE = 500
"""``search_traces`` の 1 ページの上限。"""
WEIGHT_KEY = "sampling.weight"
"""間引いたトレースが代表する件数を書いたメタデータ(8.1 のサンプリング)。"""
FIRST_CHUNK_KEY = "stream.time_to_first_chunk_ms"
"""最初の断片までの時間を書いたメタデータ(8.1 の ``traced_stream``)。"""
RECHECK_SECONDS = 600.0
"""エクスペリメントの ID を、どれだけの間信じるか。"""
KEPT_ENDS = 6
"""集計期間の終わりの、いくつ分の答えを覚えておくか(いま、前日、先週など)。"""
ENDPOINT = "/api/3.0/mlflow/traces/metrics"
COUNT = {"aggregation_type": "COUNT"}
SUM = {"aggregation_type": "SUM"}


def to_row(info: Any) -> TraceRow:
    """``mlflow.entities.TraceInfo`` を行にする。"""
    cost: dict[str, float] = info.cost or {}
    feedback = [
        a for a in info.assessments if getattr(a, "feedback", None) and a.valid is not False
    ]
    return TraceRow(
        trace_id=info.trace_id,
        at_ms=info.request_time,
        state=str(getattr(info.state, "value", info.state)),
        latency_ms=info.execution_duration,
        first_chunk_ms=_number(info.trace_metadata.get(FIRST_CHUNK_KEY)),
        tokens=info.token_usage or {},
        cost_usd=cost.get("total_cost"),
        weight=_number(info.trace_metadata.get(WEIGHT_KEY)) or 1.0,
        assessments=tuple((a.name, verdict(a.feedback.value)) for a in feedback),
        tags={**info.trace_metadata, **info.tags},
    )


def _number(text: str | None) -> float | None:
    """0 以上の数。書かれていないものと壊れたものは ``None``。"""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


class RowSource:
    """行から数える出どころ。``numbers`` だけを書けばよい。"""

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        """集計期間 ``(at - window, at]`` の中の行。"""
        raise NotImplementedError

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""
        return measure(metric, window.total_seconds(), self.numbers(window, at))

    def split(
        self, metric: str, window: timedelta, at: datetime, by: str
    ) -> dict[str, MetricSample]:
        """``by`` の値 -> ``(at - window, at]`` の値。"""
        groups = split_rows(self.numbers(window, at).rows, by)
        seconds = window.total_seconds()
        return {label: measure(metric, seconds, RowNumbers(rows)) for label, rows in groups.items()}

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""
        return [row.trace_id for row in self.numbers(window, at).worst(metric)[:limit]]


class TraceSearch(RowSource):
    """``search_traces`` で集めて数える、どこでも動く出どころ。mlflow-tracing だけで動く。"""

    def __init__(self, experiment: str, tracking_uri: str | None = None) -> None:
        import mlflow
        from mlflow.tracing.client import TracingClient

        self.experiment = experiment
        self.tracking_uri: str = tracking_uri or mlflow.get_tracking_uri()
        self._client: Any = _guard(lambda: TracingClient(self.tracking_uri))
        self._known: dict[int, dict[str, Any]] = {}
        """集計期間の終わり -> 聞いたこと -> 答え。"""
        self._find()

    def _find(self) -> None:
        self._check_health()
        found = _guard(lambda: self._client.store.get_experiment_by_name(self.experiment))
        if found is None:
            place = hide_password(self.tracking_uri)
            raise MetricSourceError(
                f"experiment {self.experiment!r} does not exist at {place}; "
                "log a trace to it first, or fix the name"
            )
        if found.lifecycle_stage == "deleted":
            raise MetricSourceError(f"experiment {self.experiment!r} is deleted; restore it")
        self._id, self._find_again_at = str(found.experiment_id), monotonic() + RECHECK_SECONDS

    @property
    def experiment_id(self) -> str:
        """いまの ID。消されたエクスペリメントを読み続けないように、ときどき名前から引き直す。"""
        if monotonic() >= self._find_again_at:
            self._find()
        return self._id

    def _check_health(self) -> None:
        """先に短く聞く: MLflow の再試行に任せると、落ちたサーバーを何分も待つ。"""
        if _is_server(self.tracking_uri):
            _rest(self.tracking_uri, "/health", "GET")

    def trace_url(self, trace_id: str) -> str:
        """MLflow の UI でトレースを開く URL。接続先が HTTP のサーバーでなければ空。"""
        if not _is_server(self.tracking_uri):
            return ""
        path = f"#/experiments/{self._id}/traces?selectedEvaluationId={trace_id}"
        return f"{hide_password(self.tracking_uri, '').rstrip('/')}/{path}&traceId={trace_id}"

    def rows(
        self, start_ms: int, end_ms: int, where: str = "", limit: int | None = None
    ) -> list[TraceRow]:
        """``(start_ms, end_ms]`` に始まったトレース。新しいものから、多くて ``limit`` 件。"""
        from mlflow.store.entities import PagedList
        from mlflow.utils import get_results_from_paginated_fn

        query = f"attributes.timestamp_ms > {start_ms} AND attributes.timestamp_ms <= {end_ms}"
        query += f" AND {where}" if where else ""
        places = [self.experiment_id]

        def page(size: int, token: str | None) -> Any:
            found = self._client.search_traces(
                locations=places,
                filter_string=query,
                max_results=size,
                page_token=token,
                include_spans=False,
            )
            return PagedList([to_row(trace.info) for trace in found], found.token)

        self._check_health()
        most = limit or MAX_TRACES
        rows = _guard(lambda: get_results_from_paginated_fn(page, PAGE_SIZE, most))
        if len(rows) == MAX_TRACES:
            logger.warning("read only the newest %d traces; use shorter windows", MAX_TRACES)
        return rows

    def read(
        self, start_ms: int, end_ms: int, where: str = "", limit: int | None = None
    ) -> list[TraceRow]:
        """``rows`` と同じ。同じ時刻までの短い期間は、長い期間から読んだものの一部で済ませる。"""
        known = self.known_until(end_ms)
        if where not in known or start_ms < known[where][0]:
            known[where] = start_ms, self.rows(start_ms, end_ms, where, limit)
        return [row for row in known[where][1] if start_ms < row.at_ms]

    def known_until(self, end_ms: int) -> dict[str, Any]:
        """この時刻までについて、もう聞いたこと。"""
        self._known[end_ms] = self._known.pop(end_ms, {})  # 使ったものを後ろに置く
        while len(self._known) > KEPT_ENDS:
            del self._known[next(iter(self._known))]
        return self._known[end_ms]

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        """集計期間の中の行。"""
        return RowNumbers(self.read(*bounds(window, at)))


def _is_server(tracking_uri: str) -> bool:
    return tracking_uri.startswith(("http://", "https://"))


def _guard(call: Callable[[], Any]) -> Any:
    """MLflow、通信、データベースの例外を ``MetricSourceError`` にまとめる。"""
    try:
        return call()
    except Exception as error:  # 落ちたデータベースでは、SQLAlchemy の例外のまま来る
        raise MetricSourceError(hide_password(f"cannot read traces: {error}")) from error


def hide_password(text: str, mask: str = "***@") -> str:
    """接続先の URI に書かれたユーザー名とパスワードを隠す(誤りの文もリンクも、通知に載る)。

    >>> hide_password("postgresql://app:pw@db/mlflow"), hide_password("http://u:p@ml", "")
    ('postgresql://***@db/mlflow', 'http://ml')
    """
    return re.sub(r"(?<=://)[^/\s]*@", mask, text)


def bounds(window: timedelta, at: datetime) -> tuple[int, int]:
    """集計期間の(始まり, 終わり)。"""
    end = to_ms(at)
    return end - round(window.total_seconds() * 1000), end


def to_ms(at: datetime) -> int:
    """UTC のミリ秒。時差のない日時は ``MetricSourceError``。"""
    if at.tzinfo is None:
        raise MetricSourceError(f"{at!r} has no timezone; use datetime.now(timezone.utc)")
    return math.floor(at.timestamp() * 1000)


class EndpointMissingError(MetricSourceError):
    """このサーバーには集計の API がない。"""


class ServerNumbers:
    """``/traces/metrics`` の答えを、行から数えたときと同じ形にする。"""

    def __init__(self, search: TraceSearch, start_ms: int, end_ms: int) -> None:
        self._search, self._start_ms, self._end_ms = search, start_ms, end_ms

    def states(self) -> dict[str, Tally]:
        """状態ごとの件数。"""
        points = self._ask("TRACES", "trace_count", COUNT, dimensions=["trace_status"])
        return _tallies((p["dimensions"]["trace_status"], p["values"]["COUNT"]) for p in points)

    def latency_ms(self, q: float) -> float | None:
        """遅延の分位点(サーバー側で線形補間)。"""
        aggregation = {"aggregation_type": "PERCENTILE", "percentile_value": q}
        return self._number("TRACES", "latency", aggregation)

    def slower_than(self, milliseconds: float) -> Tally:
        """応答時間がこれを超えたトレース。集計の API では絞れないので、それだけを検索する。"""
        rows = self._rows(f"attributes.execution_time_ms > {math.floor(milliseconds)}")
        return Tally(len(rows), len(rows))

    def first_chunks(self) -> list[tuple[float, float]]:
        """最初の断片までの(ミリ秒, 重み)。集計の API にはないので、検索する。"""
        return RowNumbers(self._rows(f"metadata.`{FIRST_CHUNK_KEY}` IS NOT NULL")).first_chunks()

    def total(self, amount: str) -> float:
        """コスト(``cost_usd``)か、トークンの合計。コストはスパンに付いている。"""
        place = ("SPANS", "total_cost") if amount == "cost_usd" else ("TRACES", amount)
        return self._number(*place, SUM) or 0.0

    def verdicts(self, name: str) -> dict[str, Tally]:
        """評価の値ごとの件数。"""
        points = self._ask(
            "ASSESSMENTS",
            "assessment_count",
            COUNT,
            dimensions=["assessment_value"],
            filters=[f"assessment.name = {_quote(name)}", "assessment.type = 'feedback'"],
        )
        pairs = ((p["dimensions"]["assessment_value"], p["values"]["COUNT"]) for p in points)
        return _tallies((verdict(json.loads(raw or "null")), count) for raw, count in pairs)

    def _rows(self, where: str) -> list[TraceRow]:
        return self._search.read(self._start_ms, self._end_ms, where)

    def _number(self, view: str, metric: str, aggregation: Mapping[str, Any]) -> float | None:
        points = self._ask(view, metric, aggregation)
        return next((v for point in points for v in point.get("values", {}).values()), None)

    def _ask(
        self, view: str, metric: str, aggregation: Mapping[str, Any], **more: Any
    ) -> list[dict[str, Any]]:
        query = {
            "experiment_ids": [self._search.experiment_id],
            "start_time_ms": self._start_ms + 1,  # サーバーは両端を含める。(start, end] に合わせる
            "end_time_ms": self._end_ms,
            "view_type": view,
            "metric_name": metric,
            "aggregations": [aggregation],
            **more,
        }
        known, key = self._search.known_until(self._end_ms), json.dumps(query)
        if key not in known:
            known[key] = query_metrics(self._search.tracking_uri, query)
        return known[key]


def _quote(name: str) -> str:
    # サーバーの文法に引用符のエスケープはない。合わない引用符では、黙って 0 件になる
    mark = "'" if "'" not in name else '"'
    if mark in name:
        raise MetricSourceError(f"assessment name {name!r} mixes ' and \"; rename the scorer")
    return f"{mark}{name}{mark}"


def _tallies(counts: Iterable[tuple[str, float]]) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for key, count in counts:
        seen = found.get(key, Tally(0.0, 0))
        found[key] = Tally(seen.weight + count, seen.seen + int(count))
    return found


def query_metrics(tracking_uri: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """集計の API を呼ぶ。認証は MLflow の環境変数のものを使う。

    Raises:
        EndpointMissingError: このサーバーに API がない。
        MetricSourceError: 届かない、または拒否された。
    """
    answer = _rest(tracking_uri, ENDPOINT, "POST", json=dict(body))
    if answer.status_code in (404, 501) or "ENDPOINT_NOT_FOUND" in answer.text[:300]:
        raise EndpointMissingError(f"{hide_password(tracking_uri)} has no {ENDPOINT}")
    if answer.status_code != 200:
        text = answer.text[:200]
        raise MetricSourceError(f"{ENDPOINT} answered {answer.status_code}: {text}")
    return answer.json().get("data_points", [])


def _rest(tracking_uri: str, endpoint: str, method: str, **more: Any) -> Any:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    host = get_default_host_creds(tracking_uri)
    more |= {"max_retries": 1, "timeout": 10, "raise_on_status": False}
    return _guard(lambda: http_request(host, endpoint, method, **more))


class ServerMetricSource(TraceSearch):
    """サーバーに集計させ、できないときは検索して数える。

    ラベルごとの値と、間引いたトレース(``sampling.weight``)のある期間は、サーバーでは求められない。
    """

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""
        start, end = bounds(window, at)
        try:
            if not self.read(start, end, f"metadata.`{WEIGHT_KEY}` IS NOT NULL", limit=1):
                return measure(metric, window.total_seconds(), ServerNumbers(self, start, end))
        except EndpointMissingError as missing:  # 入れ替え中の 404 かもしれない。次もまた聞く
            _warn_once(f"{missing}; counting traces with search_traces instead")
        return super().sample(metric, window, at)


def samples_of(
    source: MetricSource,
    metric: str,
    window: timedelta,
    at: datetime,
    *,
    by: str | None = None,
    ago: timedelta | None = None,
) -> dict[str, list[MetricSample]]:
    """``by`` の値(分けなければ空)-> いまの値と、``ago`` があれば、それだけ前の値。"""
    ends = [at] if ago is None else [at, at - ago]
    if not by:
        return {"": [source.sample(metric, window, end) for end in ends]}
    splits = [source.split(metric, window, end, by) for end in ends]
    none = measure(metric, window.total_seconds(), RowNumbers([]))
    labels = sorted({label for split in splits for label in split})
    return {label: [split.get(label, none) for split in splits] for label in labels}


def metric_source(experiment: str, tracking_uri: str | None = None) -> TraceSearch:
    """接続先に合った出どころを選ぶ。HTTP のサーバーには集計させ、それ以外では検索して数える。

    Raises:
        MetricSourceError: エクスペリメントがない。「トラフィックが 0」とは区別する。
    """
    import mlflow

    uri = tracking_uri or mlflow.get_tracking_uri()
    made = ServerMetricSource if _is_server(uri) else TraceSearch
    return made(experiment, uri)
