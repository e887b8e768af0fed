"""8.3.5 採点の計画と結果: どのスコアラーを、どのトレースに、どれだけの費用で使うか。

標本の選び方は MLflow サーバーの自動採点と同じで、同じトレースは何度でも同じ結果になる。
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import TypeGuard

from mlflow.genai.scorers import Scorer

from .judges import JudgePrice, ScorerSetupError, ScoringError

FINISHED_TRACES = "status = 'OK'"  # 失敗したトレースには出力がなく、採点してもエラーになるだけ


def check_sample_rate(name: str, rate: object) -> None:
    """割合が 0 より大きく 1 以下の数であることを確かめる(MLflow は真偽値や 5.0 も受け入れる)。"""
    if not is_number(rate) or not 0 < rate <= 1:
        raise ScorerSetupError(
            f"sample_rate of {name!r} must be in (0, 1] (or pause it), got {rate!r}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """数か。真偽値は数ではない。"""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class ScorerPlan:
    """どのスコアラーを、どのトレースの何割に使うか。"""

    scorer: Scorer
    sample_rate: float = 1.0
    filter_string: str | None = FINISHED_TRACES

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ScorerSetupError(f"scorer must be an MLflow scorer, got {self.scorer!r}")
        check_sample_rate(self.name, self.sample_rate)

    @property
    def name(self) -> str:
        """スコアラーの名前。評価の名前でもある。"""
        return self.scorer.name


class ScoringTarget(ScorerPlan):
    """トレースを 1 件ずつ採点できる ``ScorerPlan``。"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer.is_session_level_scorer:
            raise ScoringError(
                f"{self.name!r} scores whole sessions, not single traces: pass the traces of the "
                "sessions to mlflow.genai.evaluate() instead"
            )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """採点の進め方。"""

    concurrency: int = 8  # 同時に採点するトレースの数
    budget_usd: float | None = None  # ジャッジのコストがこれを超える見込みなら、新しく始めない
    judge_price: JudgePrice | None = None  # MLflow の価格カタログにないモデルの単価
    max_consecutive_failures: int = 10  # 続けてこれだけ失敗したスコアラーは、この実行ではやめる

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "max_consecutive_failures": 1}
        if self.budget_usd is not None:
            least["budget_usd"] = 0
        for name, limit in least.items():
            value = getattr(self, name)
            if not is_number(value) or not value >= limit:  # NaN もここで拒否する
                raise ScoringError(f"{name} must be a number of at least {limit}, got {value!r}")


@dataclass
class ScorerCounts:
    """スコアラー 1 つの結果(単位はトレース)。見積もりでは、採点とコストの見込み。"""

    scored: int = 0
    skipped: int = 0  # 採点済みだったので飛ばした
    sampled_out: int = 0  # 標本に選ばれなかった
    failed: int = 0  # 失敗した。エラーはトレースに残り、次の実行では後回しにして採点し直す
    empty: int = 0  # 評価を返さなかった(対象になるスパンがないなど)
    not_started: int = 0  # 予算か連続失敗のために、始めなかった
    judge_calls: int = 0
    unpriced: int = 0  # そのうち、コストが分からないもの
    cost_usd: Decimal = Decimal(0)

    def charge(self, cost_usd: Decimal | None) -> None:
        """ジャッジを 1 回呼んだ。"""
        self.judge_calls += 1
        if cost_usd is None:
            self.unpriced += 1
        else:
            self.cost_usd += cost_usd


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
    job_id: str | None = None
    """Databricks に登録したバックフィルのジョブ。採点はその中で進み、件数は 0 のままになる。"""

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
    def judge_calls(self) -> int:
        """LLM ジャッジを呼んだ回数。"""
        return sum(counts.judge_calls for counts in self.scorers.values())

    @property
    def unpriced(self) -> tuple[str, ...]:
        """コストの分からない呼び出しがあるスコアラー。"""
        return tuple(name for name, counts in self.scorers.items() if counts.unpriced)

    @property
    def cost_usd(self) -> float | None:
        """ジャッジのコストの合計(USD)。答えを読めなかった呼び出しは、見込みの額で数える。

        コストの分からない呼び出し(``unpriced``)があるときと、Databricks のジョブでは ``None``。
        """
        if self.unpriced or self.job_id:
            return None
        return float(sum(counts.cost_usd for counts in self.scorers.values()))


ProgressCallback = Callable[[ScoringReport], None]


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
