"""8.4.1 アラートの指標を MLflow から読む。"""

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from .trace_metrics import MetricSample, MetricSource, MetricSourceError, RowNumbers, Tally, TraceRow
logger = logging.getLogger(__name__)
MAX_TRACES = 50000
PAGE_SIZE = 500
WEIGHT_KEY = 'sampling.weight'
ENDPOINT = '/api/3.0/mlflow/traces/metrics'
COUNT = {'aggregation_type': 'COUNT'}
SUM = {'aggregation_type': 'SUM'}

def to_row(info: Any) -> TraceRow:
    """``mlflow.entities.TraceInfo`` を行にする。"""

class TraceSearch:
    """``search_traces`` を、エクスペリメントと接続先を固定して呼ぶ。mlflow-tracing だけで動く。"""

    def __init__(self, experiment: str, tracking_uri: str | None=None) -> None:
        self.tracking_uri: str = tracking_uri or mlflow.get_tracking_uri()
        self._client: Any = TracingClient(self.tracking_uri)
        self.experiment, self.experiment_id = (experiment, str(found.experiment_id))

    def trace_url(self, trace_id: str) -> str:
        """MLflow の UI でトレースを開く URL。接続先が HTTP のサーバーでなければ空。"""

    def rows(self, start_ms: int, end_ms: int, *, where: str='', limit: int=MAX_TRACES) -> list[TraceRow]:
        """``(start_ms, end_ms]`` に始まったトレース。"""

    def _page(self, query: str, size: int, token: str | None) -> Any:
        ...

def hide_password(text: str, mask: str='***@') -> str:
    """接続先の URI に書かれたユーザー名とパスワードを隠す(誤りの文もリンクも、通知に載る)。

    >>> hide_password("postgresql://app:pw@db/mlflow"), hide_password("http://u:p@ml", "")
    ('postgresql://***@db/mlflow', 'http://ml')
    """

class SearchTracesMetricSource:
    """トレースを集めて数える、どこでも動く出どころ。一度集めた窓は、同じ時刻の間は使い回す。"""

    def __init__(self, search: TraceSearch) -> None:
        self.search = search
        self._end_ms, self._start_ms, self._rows = (0, 0, list[TraceRow]())

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        """窓の中の行。"""

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int=3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""

def to_ms(at: datetime) -> int:
    """UTC のミリ秒。時差のない日時は ``MetricSourceError``。"""

class EndpointMissingError(MetricSourceError):
    """このサーバーには集計の API がない。"""

class ServerNumbers:
    """``/traces/metrics`` の答えを、行から数えたときと同じ形にする。"""

    def __init__(self, tracking_uri: str, experiment_id: str, start_ms: int, end_ms: int) -> None:
        self._tracking_uri = tracking_uri
        self._body = {'experiment_ids': [experiment_id], 'start_time_ms': start_ms + 1, 'end_time_ms': end_ms}
        self._answers: dict[str, list[dict[str, Any]]] = {}

    def states(self) -> dict[str, Tally]:
        """状態ごとの件数。"""

    def latency_ms(self, what: str) -> float | None:
        """分位点(サーバー側で線形補間)か平均。"""

    def tokens(self, kind: str) -> float:
        """トークンの合計。"""

    def cost_usd(self) -> float:
        """スパンのコストの合計(USD)。"""

    def verdicts(self, name: str) -> dict[str, Tally]:
        """評価の値ごとの件数。"""

    def _number(self, view: str, metric: str, aggregation: Mapping[str, Any]) -> float | None:
        ...

    def _ask(self, view: str, metric: str, aggregation: Mapping[str, Any], **more: Any) -> list[dict[str, Any]]:
        ...

def query_metrics(tracking_uri: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """集計の API を呼ぶ。認証は MLflow の環境変数のものを使う。

    Raises:
        EndpointMissingError: このサーバーに API がない。
        MetricSourceError: 届かない、または断られた。
    """

class ServerMetricSource:
    """サーバーに集計させ、できないときは検索して数える。

    間引いたトレース(``sampling.weight``)はサーバーでは補正できないので、その窓も検索して数える。
    """

    def __init__(self, search: TraceSearch, fallback: SearchTracesMetricSource) -> None:
        self._search, self._fallback = (search, fallback)
        self.falls_back = False
        self._windows: dict[tuple[int, int], ServerNumbers | None] = {}

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int=3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""

    def _numbers(self, window: timedelta, at: datetime) -> ServerNumbers | None:
        ...

def metric_source(experiment: str | TraceSearch, tracking_uri: str | None=None) -> MetricSource:
    """接続先に合った出どころを選ぶ。HTTP のサーバーには集計させ、それ以外では検索して数える。

    Raises:
        MetricSourceError: エクスペリメントがない。「トラフィックが 0」とは区別する。
    """

def main() -> None:
    """本物のトレースと評価を記録し、指標を読み戻す。存在しないエクスペリメントは誤りになる。"""
