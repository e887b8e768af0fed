"""8.3.5 採点の計画と結果: どのスコアラーを、どのトレースに、どれだけの速さと費用で使うか。

標本の選び方は MLflow サーバーの自動採点と同じで、同じトレースは何度でも同じ結果になる。
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TypeGuard

from mlflow.genai.scorers import Scorer

from .judges import JudgePrice, ScoringError

FINISHED_TRACES = "status = 'OK'"  # 失敗したトレースには出力がなく、採点してもエラーになるだけ


def is_sample_rate(rate: object) -> bool:
    """0 より大きく 1 以下の数か(MLflow は、真偽値や 5.0 も受け入れる)。"""
    return _is_number(rate) and 0 < rate <= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class ScoringTarget:
    """どのスコアラーを、どのトレースの何割に使うか。"""

    scorer: Scorer
    sample_rate: float = 1.0
    filter_string: str | None = FINISHED_TRACES

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ScoringError(f"scorer must be an MLflow scorer, got {self.scorer!r}")
        if not is_sample_rate(self.sample_rate):
            raise ScoringError(
                f"sample_rate of {self.name!r} must be in (0, 1], got {self.sample_rate!r}"
            )
        if self.scorer.is_session_level_scorer:
            raise ScoringError(
                f"{self.name!r} scores whole sessions, not single traces: pass the traces of the "
                "sessions to mlflow.genai.evaluate() instead"
            )

    @property
    def name(self) -> str:
        """スコアラーの名前。評価の名前でもある。"""
        return self.scorer.name


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """採点の進め方。"""

    concurrency: int = 8  # 同時に採点するトレースの数
    calls_per_second: float | None = None  # スコアラーを呼ぶ頻度の上限
    budget_usd: float | None = None  # ジャッジのコストがこれを超える見込みなら、新しく始めない
    judge_price: JudgePrice | None = None  # MLflow の価格カタログにないモデルの単価
    max_consecutive_failures: int = 10  # 続けてこれだけ失敗したスコアラーは、この実行ではやめる
    page_size: int = 100
    dry_run: bool = False  # 見積もるだけで、ジャッジを呼ばず、何も書かない

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_consecutive_failures", "page_size"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 1:
                raise ScoringError(f"{name} must be at least 1, got {value!r}")
        rate, budget = self.calls_per_second, self.budget_usd
        if rate is not None and (not _is_number(rate) or not rate > 0):
            raise ScoringError(f"calls_per_second must be positive, got {rate!r}")
        if budget is not None and (not _is_number(budget) or not budget >= 0):
            raise ScoringError(f"budget_usd must not be negative, got {budget!r}")


@dataclass
class ScorerCounts:
    """スコアラー 1 つの結果(単位はトレース)。``dry_run`` では、採点とコストの見積もり。"""

    scored: int = 0
    skipped: int = 0  # 採点済みだったので飛ばした
    sampled_out: int = 0  # 標本に選ばれなかった
    failed: int = 0  # 失敗した。エラーはトレースに残り、次の実行では後回しにして採点し直す
    empty: int = 0  # 評価を返さなかった(対象になるスパンがないなど)
    not_started: int = 0  # 予算か連続失敗のために、始めなかった
    judge_calls: int = 0
    unpriced: int = 0  # そのうち、コストが分からないもの
    cost_usd: Decimal = Decimal(0)
    past_costs: list[Decimal] = field(default_factory=list[Decimal])  # 飛ばした評価のコスト


@dataclass(kw_only=True)
class ScoringReport:
    """採点 1 回の結果。"""

    experiment_id: str
    start: datetime
    end: datetime
    traces: int = 0
    seconds: float = 0.0
    scorers: dict[str, ScorerCounts] = field(default_factory=dict[str, ScorerCounts])
    elsewhere: tuple[str, ...] = ()  # サーバーや Databricks が採点する、または休止中のもの
    not_run: dict[str, str] = field(default_factory=dict[str, str])
    """採点できなかったスコアラーと、その理由(英語)。"""
    stopped_by: str | None = None
    """途中でやめた理由(``budget`` / ``failures``)。"""

    @property
    def scored(self) -> int:
        """新しく採点した数(スコアラーの合計)。"""
        return sum(counts.scored for counts in self.scorers.values())

    @property
    def skipped(self) -> int:
        """採点済みで飛ばした数。"""
        return sum(counts.skipped for counts in self.scorers.values())

    @property
    def failed(self) -> int:
        """失敗した数。"""
        return sum(counts.failed for counts in self.scorers.values())

    @property
    def cost_usd(self) -> float:
        """ジャッジのコストの合計(USD)。答えを読めなかった呼び出しは、見込みの額で数える。"""
        return float(sum(counts.cost_usd for counts in self.scorers.values()))

    @property
    def judge_calls(self) -> int:
        """LLM ジャッジを呼んだ回数。"""
        return sum(counts.judge_calls for counts in self.scorers.values())

    @property
    def unpriced(self) -> tuple[str, ...]:
        """コストの分からない呼び出しがあるスコアラー。"""
        return tuple(name for name, counts in self.scorers.items() if counts.unpriced)


ProgressCallback = Callable[[ScoringReport], None]


def show_progress(report: ScoringReport) -> None:
    """``on_progress`` 用。標準エラーが端末なら、途中経過を 1 行で出す。終わったら改行する。"""
    if sys.stderr.isatty():
        done = f"scored {report.scored}, skipped {report.skipped}, failed {report.failed}"
        sys.stderr.write(f"\r{report.traces} traces: {done}" + "\n" * bool(report.seconds))
        sys.stderr.flush()


def sample(trace_id: str, targets: Sequence[ScoringTarget]) -> list[ScoringTarget]:
    """このトレースに使うスコアラー。MLflow サーバーの自動採点と同じ選び方をする。

    率の低いスコアラーは、率の高いスコアラーが選んだトレースの中から選ぶ(同じトレースに評価が
    そろうので、スコアラー同士を比べられる)。
    """
    chosen: list[ScoringTarget] = []
    previous = 1.0
    for target in sorted(targets, key=lambda t: t.sample_rate, reverse=True):
        digest = hashlib.sha256(f"{trace_id}:{target.name}".encode()).hexdigest()
        if int(digest, 16) / 2**256 > target.sample_rate / previous:
            break
        chosen.append(target)
        previous = target.sample_rate
    return chosen
