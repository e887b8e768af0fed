"""8.1 テールサンプリングの仕組み(sampling_strategies.py の土台)。"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
import mlflow
import mlflow.tracing
import mlflow.tracing.provider as mlflow_provider
from mlflow.tracing.trace_manager import _Trace as LiveTrace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import Sampler
logger = logging.getLogger(__name__)
PROBABILITY_KEY = 'sampling.probability'
WEIGHT_KEY = 'sampling.weight'
RULE_KEY = 'sampling.rule'

@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """終わったトレースの要約。残すかどうかをこれで決める。"""
    trace_id: str
    name: str
    duration_ms: float
    is_error: bool
    'どれか 1 つのスパンでもエラーなら真。'
    num_spans: int = 1
    user: str | None = None
    session: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    feedback: Mapping[str, Any] = field(default_factory=dict[str, Any])
    'トレースの実行中に付いたフィードバック(名前 -> 値)。'

@dataclass(frozen=True)
class Decision:
    """残す確率 [0, 1] と、その理由。"""
    probability: float
    rule: str

    def __post_init__(self) -> None:
        ...
Policy = Callable[[TraceSummary], Decision]
Forward = Callable[[ReadableSpan], None]

@dataclass(frozen=True)
class SamplerStats:
    """``install()`` してからの件数。"""
    kept: int
    dropped: int
    by_rule: Mapping[str, tuple[int, int]]
    '規則 -> (残した件数, 捨てた件数)。'
    policy_errors: int
    '判断の関数が例外になった件数(トレースは残している)。'
    evicted: int
    '同時に開いているトレースが上限を超え、判断せずに残した件数。'
    open_traces: int
    '子スパンを預かっている、終わっていないトレースの数。'

def check_probability(name: str, value: float) -> None:
    """確率でなければ ``ValueError``(NaN も拒む)。"""

def unit_hash(trace_id: str, salt: str='tail') -> float:
    """トレース ID から決まる [0, 1) の値。先頭の間引きが見るビットとは独立。"""

class TailSampler:
    """トレースが終わってから残すかどうかを決め、MLflow の送信につなぐ。"""

    def __init__(self, policy: Policy, *, head_probability: float=1.0, max_open_traces: int=10000) -> None:
        """設定だけを行う。MLflow につなぐのは ``install()``。

        Args:
            policy: 終わったトレースの要約から ``Decision`` を返す関数。例外なら残す。
            head_probability: その前に先頭で残す割合。重みに反映される。1 のままなら、環境変数
                ``MLFLOW_TRACE_SAMPLING_RATIO`` の割合が使われ、それも重みに反映される。
            max_open_traces: 子スパンを預かるトレースの上限(超えた分は古い順に残す)。
        """
        self.head_probability = head_probability
        self._policy = policy
        self._max_open = max_open_traces
        self._hooks: _Hooks | None = None
        self._exports_otlp = False

    def install(self) -> TailSampler:
        """MLflow につなぐ。以後に終わるトレースから有効になる(2 回目は何もしない)。

        ``set_experiment`` などで MLflow がプロバイダーを作り直しても有効なまま残る。

        Raises:
            RuntimeError: 別のサンプラーが有効、または MLflow の内部が変わった。
        """

    def uninstall(self) -> None:
        """MLflow から外す。預かっている子スパンは、捨てずに渡す。"""

    def stats(self) -> SamplerStats:
        """いままでの件数。"""

    def _clear(self) -> None:
        ...

    def _count(self, rule: str, kept: bool) -> None:
        ...

    def _on_end(self, forward: Forward, span: ReadableSpan) -> None:
        """スパンの終わり。子は預かり、ルートが終わったら決めて、まとめて渡すか捨てる。"""

    def _end_child(self, forward: Forward, span: ReadableSpan) -> None:
        ...

    def _hold(self, trace_id: int, forward: Forward, span: ReadableSpan) -> list[tuple[Forward, ReadableSpan]]:
        """子を預かる。上限を超えたら、いちばん古いトレースを残すと決めて返す。"""

    def _remember(self, trace_id: int, keep: bool) -> None:
        ...

    def _end_root(self, forward: Forward, span: ReadableSpan) -> None:
        ...

    def _decide(self, span: ReadableSpan, children: list[ReadableSpan]) -> bool:
        ...

    def _ask(self, summary: TraceSummary) -> Decision:
        ...

    def _mark(self, span: ReadableSpan, trace: LiveTrace | None, decision: Decision) -> None:
        """残すトレースに確率・重み・規則を記す。OTLP にはメタデータが届かないので属性にも書く。"""

class _Hooks:
    """MLflow への取り付け。非公開の名前はここと、このファイルの下の 4 つの関数だけが使う。

    ``_get_span_processors`` と ``_get_trace_sampler`` は、MLflow がプロバイダーを作るたびに必ず
    通る 2 か所である。ここを包めば、作り直されても外れない。
    """
    NAMES = ('_get_span_processors', '_get_trace_sampler')

    def __init__(self, sampler: TailSampler) -> None:
        self._sampler = sampler
        self._gated: list[Any] = []
        self._provider: object = mlflow.tracing.get_bridged_tracer_provider()
        self._get_processors = mlflow_provider._get_span_processors
        self._get_sampler = mlflow_provider._get_trace_sampler
        mlflow_provider._get_span_processors = self._processors
        mlflow_provider._get_trace_sampler = self._head

    def remove(self) -> None:
        """取り付ける前に戻す。"""

    def _restore_sampler(self) -> None:
        ...

    def _attach_to_current(self) -> None:
        ...

    def _processors(self, disabled: bool=False) -> list[Any]:
        ...

    def _head(self) -> Sampler | None:
        ...

    def _weighted(self, original: Sampler | None) -> Sampler | None:
        """先頭で残した割合を重みに記すサンプラー。先頭では間引かないなら ``None``。"""

    def _gate(self, processors: Iterable[Any]) -> None:
        """送信の入り口(``on_end``)だけを差し替える。型や状態は MLflow のものがそのまま残る。"""

def main() -> None:
    """20 件のうちエラーだけを残し、データベースに何が届いたかを見る。"""
