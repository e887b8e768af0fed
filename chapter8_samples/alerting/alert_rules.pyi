"""8.4.1 アラートのルール: しきい値、待ち時間、統計的な判定。"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import time, timedelta, tzinfo
from typing import Any, Literal, Protocol
Duration = str | timedelta
MAX_DURATION = timedelta(days=3650)
SEVERITIES = ('info', 'warning', 'error', 'critical')
DAYS = ('mon', 'tue', 'wed', 'thu', 'fri', 'sat', 'sun')
MAX_NUMBER = 1e+300

class AlertConfigError(ValueError):
    """設定の誤り。見つけたすべてを ``problems`` に持つ。"""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)

def parse_duration(value: Duration) -> timedelta:
    """期間を読む。読めなければ ``ValueError``。

    >>> parse_duration("1h30m"), parse_duration("500ms")
    (datetime.timedelta(seconds=5400), datetime.timedelta(microseconds=500000))
    """

def parse_clock(text: str) -> time:
    """一日の中の時刻を読む。読めなければ ``ValueError``。"""

def parse_zone(name: str) -> tzinfo:
    """時間帯の名前を読む。読めなければ ``ValueError``。"""

def refusals(checks: Iterable[tuple[str, Callable[[Any], object], Any]]) -> list[str]:
    """(名前, 読む関数, 値) のうち、読めなかったものの名前と理由。"""

def format_duration(value: Duration) -> str:
    """Prometheus と同じ書き方にする。

    >>> format_duration(timedelta(minutes=90))
    '1h30m'
    """

def wilson_bounds(successes: float, n: int, confidence: float) -> tuple[float, float]:
    """割合のウィルソン信頼区間の下限と上限。それぞれが片側 ``confidence`` で成り立つ。

    >>> low, high = wilson_bounds(3, 10, 0.95)
    >>> round(low, 3), round(high, 3)
    (0.127, 0.558)
    """

class Sample(Protocol):
    """判定に使う値(``MetricSample`` など)。"""

    @property
    def value(self) -> float | None:
        ...

    @property
    def n(self) -> int:
        ...

    @property
    def successes(self) -> float | None:
        ...

@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """二種類のルールに共通の項目。"""
    name: str
    metric: str = 'error_rate'
    for_: Duration = '0s'
    '越えた状態がこれだけ続いたら発報する。'
    keep_firing_for: Duration = '0s'
    '戻ってからこれだけ続いたら解消する。'
    min_samples: int = 0
    no_data: Literal['ok', 'keep', 'alert'] = 'keep'
    '標本がないとき: 正常とみなす、状態を変えない、異常とみなす(``for_`` は待つ)。'
    severity: str = 'warning'
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    summary: str = ''
    runbook_url: str | None = None
    action: Literal['rollback'] | None = None

    def __post_init__(self) -> None:
        ...

    def problems(self) -> list[str]:
        """項目の誤り(空なら正しい)。"""

    def _number_problems(self, *names: str) -> list[str]:
        ...

    def durations(self) -> tuple[str, ...]:
        """期間の項目の名前。"""

    def _duration_problem(self, name: str) -> str:
        ...

    def no_data_verdict(self) -> bool | None:
        """標本がないときの判定。``None`` は状態を変えない。"""

@dataclass(frozen=True, kw_only=True)
class AlertRule(BaseRule):
    """一つの指標を一つの窓でしきい値と比べるルール。

    Args:
        clear_threshold: 解消に使うしきい値。発報中は、信頼区間ではなく値そのものをこれと比べる。
        confidence: 0.5 から 1。割合の指標で、信頼区間の端がしきい値を越えたときに「越えた」とする。
    """
    window: Duration = '5m'
    op: Literal['>', '<'] = '>'
    threshold: float = 0.0
    clear_threshold: float | None = None
    confidence: float | None = None

    def durations(self) -> tuple[str, ...]:
        """期間の項目の名前。"""

    def problems(self) -> list[str]:
        """項目の誤り(空なら正しい)。"""

    def queries(self) -> list[tuple[str, timedelta]]:
        """判定に要る(指標, 窓)。"""

    def judge(self, samples: Sequence[Sample], firing: bool) -> bool | None:
        """越えているか。標本が足りなければ ``None``。"""

    def _beyond(self, value: float, threshold: float | None=None) -> bool:
        ...

    def _cautious(self, sample: Sample, value: float) -> float:
        ...

@dataclass(frozen=True, kw_only=True)
class BurnRateRule(BaseRule):
    """SLO のエラー予算を、長短二つの窓で速く使いすぎていないかを見るルール。

    ``objective=0.99``、``factor=14.4`` なら、エラー率が 14.4% を両方の窓で超えたら発報する
    (SRE ワークブック 5 章: 30 日の予算の 2% を 1 時間で使う速さ)。
    """
    objective: float = 0.99
    factor: float = 14.4
    long: Duration = '1h'
    short: Duration = '5m'

    @property
    def threshold(self) -> float:
        """両方の窓の割合と比べる値。"""

    @property
    def window(self) -> Duration:
        """長いほうの窓。"""

    def durations(self) -> tuple[str, ...]:
        """期間の項目の名前。"""

    def problems(self) -> list[str]:
        """項目の誤り(空なら正しい)。"""

    def queries(self) -> list[tuple[str, timedelta]]:
        """判定に要る(指標, 窓)。長い窓が先。"""

    def judge(self, samples: Sequence[Sample], firing: bool) -> bool | None:
        """両方の窓で越えているか。"""
Rule = AlertRule | BurnRateRule

def main() -> None:
    """70 件のうち何件の失敗から「5% を超えた」と言えるかを、二つの判定で比べる。"""
