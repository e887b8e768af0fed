"""8.3.3 集めたフィードバックを数える。"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from mlflow.entities import TraceInfo
VERSION_KEYS = ('prompt.version', 'prompt_version', 'app.version', 'service.version')

@dataclass(frozen=True)
class Rate:
    """割合と、その 95% 信頼区間(Wilson)。すべて 0 から 1。"""
    positive: int
    total: int

    @property
    def value(self) -> float | None:
        """割合。1 件もなければ ``None``(0% ではない)。"""

    @property
    def interval(self) -> tuple[float, float]:
        """信頼区間。1 件もなければ 0 から 1(何も分からない)。"""

@dataclass(frozen=True, kw_only=True)
class FeedbackSummary:
    """期間のフィードバックの集計。"""
    traces: int = 0
    '期間のトレースの数。'
    rated_traces: int = 0
    'フィードバックが 1 件でもあったトレースの数。'
    thumbs: Rate = field(default_factory=lambda: Rate(0, 0))
    ratings: tuple[float, ...] = ()
    issues: Mapping[str, int] = field(default_factory=dict[str, int])
    comments: int = 0
    corrections: int = 0
    by_version: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    'プロンプトの版ごとの、良い評価の割合。'
    by_user: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    by_day: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    '日(``2026-01-31`` の形)ごとの、良い評価の割合。'

    @property
    def mean_rating(self) -> float | None:
        """点数の平均。1 件もなければ ``None``。"""

def summarize_feedback(experiment: str, start: datetime | None=None, end: datetime | None=None, *, tz: str='Asia/Tokyo') -> FeedbackSummary:
    """期間 ``[start, end)`` に始まったトレースの、有効なフィードバックを集計する。

    Args:
        experiment: エクスペリメントの名前か ID。
        start: 開始(タイムゾーン付き)。省くと終了の 7 日前。
        end: 終了(タイムゾーン付き)。省くと現在。
        tz: ``by_day`` の日の区切り。

    Raises:
        ValueError: エクスペリメントがない、時刻にタイムゾーンがない、期間が逆。
    """

def summarize(infos: Iterable[TraceInfo], *, tz: str='Asia/Tokyo') -> FeedbackSummary:
    """読み込み済みのトレースのフィードバックを集計する。"""

def version_of(info: TraceInfo) -> str | None:
    """トレースのプロンプトの版: 使ったプロンプトの登録名と番号、なければ版を表すタグ。"""

def main() -> None:
    """サンプルを実行する。"""
