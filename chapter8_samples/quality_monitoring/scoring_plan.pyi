"""8.3.5 採点の計画: どのスコアラーを、どのトレースに使い、どれを飛ばすか。"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple
from mlflow.entities import Assessment, AssessmentError
from mlflow.genai.scorers import Scorer
FINISHED_TRACES = "status = 'OK'"
SCORER_NAME = 'mlflow.assessment.scorerName'
TOKENS_PER_CALL = (600, 60)
DEFAULT_JUDGE = 'openai:/gpt-4.1-mini'

class ScoringError(Exception):
    """採点を始められない、または続けられない。"""

class JudgeNotConfiguredError(ScoringError):
    """ジャッジのモデルを呼ぶための設定が足りない。"""

class BudgetError(ScoringError):
    """予算の上限を守るための単価が分からない。"""

class JudgePrice(NamedTuple):
    """ジャッジの単価(USD / 100 万トークン)。"""
    input_usd: Decimal
    output_usd: Decimal

    def cost_usd(self, input_tokens: float, output_tokens: float) -> Decimal:
        """トークン数に対するコスト(USD)。"""
JUDGE_PRICES = {'openai:/gpt-4.1': JudgePrice(Decimal('2.00'), Decimal('8.00')), 'openai:/gpt-4.1-mini': JudgePrice(Decimal('0.40'), Decimal('1.60')), 'openai:/gpt-4.1-nano': JudgePrice(Decimal('0.10'), Decimal('0.40')), 'openai:/gpt-4o': JudgePrice(Decimal('2.50'), Decimal('10.00')), 'openai:/gpt-4o-mini': JudgePrice(Decimal('0.15'), Decimal('0.60'))}

@dataclass(frozen=True, kw_only=True)
class ScoringTarget:
    """どのスコアラーを、どのトレースの何割に使うか。"""
    scorer: Scorer
    sample_rate: float = 1.0
    filter_string: str | None = FINISHED_TRACES

    def __post_init__(self) -> None:
        ...

    @property
    def name(self) -> str:
        """スコアラーの名前。評価の名前でもある。"""

@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """採点の進め方。"""
    concurrency: int = 8
    '同時に採点するトレースの数。'
    calls_per_second: float | None = None
    'スコアラーの呼び出し頻度の上限(回 / 秒)。'
    budget_usd: float | None = None
    'ジャッジのコストがこの額(USD)を超える見込みになったら、新しい採点を始めない。'
    judge_price: JudgePrice | None = None
    'MLflow の価格カタログにないモデルの単価。'
    max_consecutive_failures: int = 10
    'あるスコアラーがこの回数続けて失敗したら、そのスコアラーをやめる。'
    page_size: int = 100
    dry_run: bool = False
    '真なら数えるだけで、ジャッジを呼ばず、何も書かない。'

    def __post_init__(self) -> None:
        ...

@dataclass
class ScorerCounts:
    """スコアラー 1 つの結果(単位はトレース)。"""
    scored: int = 0
    '新しく採点した。``dry_run`` では採点することになる数。'
    skipped: int = 0
    '採点済みだったので飛ばした。'
    sampled_out: int = 0
    '標本に選ばれなかった。'
    failed: int = 0
    '採点に失敗した。エラーはトレースに記録され、次の実行で採点し直す。\n\n    スパンを読めないトレースも含む(記録はせず、警告をログに出す)。\n    '
    empty: int = 0
    'スコアラーが評価を返さなかった(対象になるスパンがないなど)。'
    not_started: int = 0
    '予算か連続失敗のために、採点を始めなかった。'
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0
    'コストが分からないジャッジ呼び出しの数。'
    seen_calls: int = 0
    seen_cost_usd: Decimal = Decimal(0)
    '飛ばした評価に残っていた、ジャッジの回数とコスト(見積もりに使う)。'

@dataclass(kw_only=True)
class ScoringReport:
    """採点 1 回の結果。"""
    experiment_id: str
    start: datetime
    end: datetime
    dry_run: bool = False
    traces: int = 0
    seconds: float = 0.0
    scorers: dict[str, ScorerCounts] = field(default_factory=dict[str, ScorerCounts])
    elsewhere: tuple[str, ...] = ()
    'サーバーや Databricks が採点する、または休止中なので、ここでは採点しなかったスコアラー。'
    stopped_by: str | None = None
    '途中でやめた理由(``budget`` / ``failures``)。'

    @property
    def scored(self) -> int:
        """新しく採点した数(スコアラーの合計)。"""

    @property
    def skipped(self) -> int:
        """採点済みで飛ばした数。"""

    @property
    def failed(self) -> int:
        """失敗した数。"""

    @property
    def cost_usd(self) -> float:
        """分かっているジャッジのコストの合計(USD)。"""

def judge_model(scorer: Scorer) -> str | None:
    """LLM ジャッジが使うモデルの URI。コードのスコアラーは ``None``。"""

def missing_for(model: str) -> str | None:
    """ジャッジのモデルを呼ぶのに足りないもの(英語 1 文)。足りていれば ``None``。"""

def require_judges(scorers: Sequence[Scorer]) -> None:
    """ジャッジを呼べる設定があることを確かめる。なければ ``JudgeNotConfiguredError``。"""

def sample(trace_id: str, targets: Sequence[ScoringTarget]) -> list[ScoringTarget]:
    """このトレースに使うスコアラー。MLflow サーバーの自動採点と同じ選び方をする。

    同じトレースは何度でも同じ結果になる。率の低いスコアラーは、率の高いスコアラーが選んだ
    トレースの中から選ぶ(同じトレースに評価がそろうので、スコアラー同士を比べられる)。
    """

def identity(scorer: Scorer) -> dict[str, str]:
    """評価に残す、スコアラーの身元。登録済みなら名前と版、未登録なら名前と定義のハッシュ。"""

def error_of(assessment: Assessment) -> AssessmentError | None:
    ...

def scored_by(assessments: Sequence[Assessment], scorer_id: dict[str, str]) -> list[Assessment]:
    """この版のスコアラーが残した評価。人が訂正した(無効になった)評価も採点済みとみなす。"""

def show_progress(report: ScoringReport) -> None:
    """``on_progress`` 用。標準エラーが端末なら、途中経過を 1 行で出す。終わったら改行する。"""

def judge_cost(feedback: Assessment, price: JudgePrice | None) -> Decimal | None:
    ...

def judge_bill(report: ScoringReport, targets: Sequence[ScoringTarget], options: ScoringOptions) -> tuple[int, float | None, tuple[str, ...]]:
    """ジャッジの回数、コスト(USD)、単価の分からないスコアラー。``dry_run`` では、その見積もり。"""

class Throttle:
    """呼び出しの間隔を空ける(スレッド間で共有する)。"""

    def __init__(self, calls_per_second: float | None) -> None:
        self._interval = 1 / calls_per_second if calls_per_second else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """次に呼んでよい時刻まで待つ。"""

class Budget:
    """並列に呼んでも予算を超えないように、呼ぶ前に見込みのコスト(これまでの最大)を確保する。"""

    def __init__(self, limit_usd: float | None) -> None:
        self._limit = Decimal(str(limit_usd)) if limit_usd is not None else None
        self._committed = Decimal(0)
        self._largest: dict[str, Decimal] = {}
        self._probing: set[str] = set()
        self._changed = threading.Condition()

    def reserve(self, name: str) -> Decimal | None:
        """確保した額(USD)。足りなければ ``None``。コストの分からない最初の 1 回は 1 件ずつ。"""

    def settle(self, name: str, expected: Decimal, cost: Decimal) -> None:
        """確保した額を、実際のコストに直す。"""

def main() -> None:
    """サンプルを実行する。"""
