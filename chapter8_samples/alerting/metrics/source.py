"""8.4.1 アラートの指標を MLflow から読む。

MLflow サーバーには集計させ(``/traces/metrics``)、サーバーがないか古いときは ``search_traces`` で
集めて数える。値は同じで、5,000 件なら集計は 50 ミリ秒ほど、検索は 2 秒ほどかかる。

Databricks では ``search_traces`` で数える(集計の API がないと分かった時点で切り替わる)。
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from .labels import split_rows
from .measures import (
    MetricSample,
    MetricSource,
    MetricSourceError,
    Numbers,
    RowNumbers,
    Tally,
    TraceRow,
    measure,
    verdict,
)

logger = logging.getLogger(__name__)

MAX_TRACES = 50_000
"""一つの集計期間で集めるトレースの上限。"""
PAGE_SIZE = 500
"""``search_traces`` の 1 ページの上限。"""
WEIGHT_KEY = "sampling.weight"
"""間引いたトレースが代表する件数を書いたメタデータ(8.1 のサンプリング)。"""
FIRST_CHUNK_KEY = "stream.time_to_first_chunk_ms"
"""最初の断片までの時間を書いたメタデータ(8.1 の ``traced_stream``)。"""
RECHECK_SECONDS = 600.0
"""エクスペリメントの ID と、集計の API がないことを、どれだけの間信じるか。"""
KEPT_READS, KEPT_WINDOWS = 4, 64
"""前に読んだものを、いくつまで覚えておくか。"""
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


class TraceSearch:
    """``search_traces`` を、エクスペリメントと接続先を固定して呼ぶ。mlflow-tracing だけで動く。"""

    def __init__(self, experiment: str, tracking_uri: str | None = None) -> None:
        import mlflow
        from mlflow.tracing.client import TracingClient

        self.experiment = experiment
        self.tracking_uri: str = tracking_uri or mlflow.get_tracking_uri()
        self._client: Any = _guard(lambda: TracingClient(self.tracking_uri))
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
        if self.tracking_uri.startswith(("http://", "https://")):
            _rest(self.tracking_uri, "/health", "GET")

    def trace_url(self, trace_id: str) -> str:
        """MLflow の UI でトレースを開く URL。接続先が HTTP のサーバーでなければ空。"""
        if not self.tracking_uri.startswith(("http://", "https://")):
            return ""
        path = f"#/experiments/{self._id}/traces?selectedEvaluationId={trace_id}"
        return f"{hide_password(self.tracking_uri, '').rstrip('/')}/{path}&traceId={trace_id}"

    def rows(self, start_ms: int, end_ms: int, where: str = "") -> list[TraceRow]:
        """``(start_ms, end_ms]`` に始まったトレース。"""
        query = _filter(start_ms, end_ms, where)
        found: list[TraceRow] = []
        token: str | None = None
        while len(found) < MAX_TRACES:
            page = self._page(query, min(PAGE_SIZE, MAX_TRACES - len(found)), token)
            found += [to_row(trace.info) for trace in page]
            token = page.token
            if not token:
                return found
        logger.warning("read only the newest %d traces; use shorter windows", MAX_TRACES)
        return found

    def has_any(self, start_ms: int, end_ms: int, where: str) -> bool:
        """条件に合うトレースがあるか。"""
        return bool(self._page(_filter(start_ms, end_ms, where), 1, None))

    def _page(self, query: str, size: int, token: str | None) -> Any:
        experiment = self.experiment_id
        if token is None:
            self._check_health()
        return _guard(
            lambda: self._client.search_traces(
                locations=[experiment],
                filter_string=query,
                max_results=size,
                page_token=token,
                include_spans=False,
            )
        )


def _filter(start_ms: int, end_ms: int, where: str) -> str:
    clause = f"attributes.timestamp_ms > {start_ms} AND attributes.timestamp_ms <= {end_ms}"
    return f"{clause} AND {where}" if where else clause


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


class RowSource:
    """行から数える出どころ。``numbers`` だけを書けばよい。"""

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        """集計期間 ``(at - window, at]`` の中の行。"""
        raise NotImplementedError

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""
        return sample_of(metric, window, at, self.numbers(window, at))

    def split(self, metric: str, window: timedelta, at: datetime, by: str) -> list[MetricSample]:
        """``by`` の値ごとの、``(at - window, at]`` の値。"""
        groups = split_rows(self.numbers(window, at).rows, by)
        return [
            sample_of(metric, window, at, RowNumbers(rows), label) for label, rows in groups.items()
        ]

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""
        return [row.trace_id for row in self.numbers(window, at).worst(metric)[:limit]]


class SearchTracesMetricSource(RowSource):
    """トレースを集めて数える、どこでも動く出どころ。一度集めた期間は、同じ時刻の間は使い回す。"""

    def __init__(self, search: TraceSearch) -> None:
        self.search = search
        self._reads: dict[int, tuple[int, list[TraceRow]]] = {}
        """集計期間の終わり -> (始まり, 行)。"""

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        """集計期間の中の行。"""
        start, end = bounds(window, at)
        if end not in self._reads or start < self._reads[end][0]:
            self._reads.pop(end, None)
            self._reads[end] = start, self.search.rows(start, end)
            _forget_oldest(self._reads, KEPT_READS)
        return RowNumbers([row for row in self._reads[end][1] if start < row.at_ms <= end])


def _forget_oldest(cache: dict[Any, Any], limit: int) -> None:
    while len(cache) > limit:
        del cache[next(iter(cache))]


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
        # サーバーは両端を含めるので、始まりを 1 ミリ秒だけ後ろにして (start, end] に合わせる
        self._body = {
            "experiment_ids": [search.experiment_id],
            "start_time_ms": start_ms + 1,
            "end_time_ms": end_ms,
        }
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._found: dict[str, list[TraceRow]] = {}

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
        rows = self._rows(f"attributes.execution_time_ms > {milliseconds:.0f}")
        return Tally(len(rows), len(rows))

    def first_chunks(self) -> list[tuple[float, float]]:
        """最初の断片までの(ミリ秒, 重み)。集計の API にはないので、検索する。"""
        return RowNumbers(self._rows(f"metadata.`{FIRST_CHUNK_KEY}` IS NOT NULL")).first_chunks()

    def _rows(self, where: str) -> list[TraceRow]:
        if where not in self._found:
            self._found[where] = self._search.rows(self._start_ms, self._end_ms, where)
        return self._found[where]

    def tokens(self, kind: str) -> float:
        """トークンの合計。"""
        return self._number("TRACES", kind, SUM) or 0.0

    def cost_usd(self) -> float:
        """スパンのコストの合計(USD)。"""
        return self._number("SPANS", "total_cost", SUM) or 0.0

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

    def _number(self, view: str, metric: str, aggregation: Mapping[str, Any]) -> float | None:
        points = self._ask(view, metric, aggregation)
        values = list(points[0].get("values", {}).values()) if points else []
        return values[0] if values else None

    def _ask(
        self, view: str, metric: str, aggregation: Mapping[str, Any], **more: Any
    ) -> list[dict[str, Any]]:
        query = {"view_type": view, "metric_name": metric, "aggregations": [aggregation], **more}
        key = json.dumps(query, sort_keys=True)
        if key not in self._answers:
            self._answers[key] = query_metrics(self._search.tracking_uri, {**self._body, **query})
        return self._answers[key]


def _quote(name: str) -> str:
    # サーバーの文法に引用符のエスケープはない。合わない引用符では、黙って 0 件になる
    mark = "'" if "'" not in name else '"'
    if mark in name:
        raise MetricSourceError(f"assessment name {name!r} mixes ' and \"; rename the scorer")
    return f"{mark}{name}{mark}"


def _tallies(pairs: Any) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for key, count in pairs:
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


class ServerMetricSource(SearchTracesMetricSource):
    """サーバーに集計させ、できないときは検索して数える。

    ラベルごとの値と、間引いたトレース(``sampling.weight``)のある期間は、サーバーでは求められない。
    """

    def __init__(self, search: TraceSearch) -> None:
        super().__init__(search)
        self.searches_until = 0.0
        """この時刻までは検索する。集計の API がないという答えは、入れ替え中の 404 かもしれない。"""
        self._windows: dict[tuple[int, int], ServerNumbers | None] = {}

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""
        try:
            searches = monotonic() < self.searches_until
            numbers = None if searches else self._server_numbers(window, at)
            if numbers is not None:
                return sample_of(metric, window, at, numbers)
        except EndpointMissingError as missing:
            logger.warning("%s; counting traces with search_traces instead", missing)
            self.searches_until = monotonic() + RECHECK_SECONDS
        return super().sample(metric, window, at)

    def _server_numbers(self, window: timedelta, at: datetime) -> ServerNumbers | None:
        """サーバーの集計。間引いたトレースがあって使えなければ ``None``。"""
        start, end = bounds(window, at)
        if (start, end) not in self._windows:
            numbers = ServerNumbers(self.search, start, end)
            numbers.states()  # 検索より先に聞く: 落ちたサーバーなら、ここですぐに分かる
            self._windows[start, end] = None if self._has_weights(start, end) else numbers
            _forget_oldest(self._windows, KEPT_WINDOWS)
        return self._windows[start, end]

    def _has_weights(self, start: int, end: int) -> bool:
        for (known_start, known_end), numbers in self._windows.items():
            if numbers is not None and known_start <= start and end <= known_end:
                return False
        return self.search.has_any(start, end, f"metadata.`{WEIGHT_KEY}` IS NOT NULL")


def sample_of(
    metric: str, window: timedelta, at: datetime, numbers: Numbers, label: str = ""
) -> MetricSample:
    """集計値から求めた、一つの集計期間の指標。"""
    value, n, successes = measure(metric, window.total_seconds(), numbers)
    return MetricSample(
        metric=metric,
        value=value,
        n=n,
        start=at - window,
        end=at,
        successes=successes,
        label=label,
    )


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
    splits = [{s.label: s for s in source.split(metric, window, end, by)} for end in ends]
    found: dict[str, list[MetricSample]] = {}
    for label in sorted(set().union(*splits)):
        found[label] = [
            split.get(label) or sample_of(metric, window, end, RowNumbers([]), label)
            for end, split in zip(ends, splits, strict=True)
        ]
    return found


def metric_source(experiment: str | TraceSearch, tracking_uri: str | None = None) -> MetricSource:
    """接続先に合った出どころを選ぶ。HTTP のサーバーには集計させ、それ以外では検索して数える。

    Raises:
        MetricSourceError: エクスペリメントがない。「トラフィックが 0」とは区別する。
    """
    search = experiment
    if not isinstance(search, TraceSearch):
        search = TraceSearch(search, tracking_uri)
    if search.tracking_uri.startswith(("http://", "https://")):
        return ServerMetricSource(search)
    return SearchTracesMetricSource(search)
