"""8.2.3 トークン使用量の自動追跡(リスト8.9)。"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal
import mlflow
from mlflow.entities import Trace
from .archive.parquet import enable_trace_archive as enable_trace_archive
from .archive.parquet import export_traces_to_parquet as export_traces_to_parquet
from .usage import PAGE_SIZE, Calculator, CostTracking, TokenUsage, TraceCost, Tracker

@dataclass(frozen=True, slots=True)
class ModelUsage:
    """モデル 1 つ分の合計。``calls_without_usage`` の分のトークンは、どこにも数えられていない。"""
    model: str
    calls: int
    calls_without_usage: int
    usage: TokenUsage

@dataclass(frozen=True, slots=True)
class TokenTracking:
    """``setup_token_tracking`` の結果。``costs`` は、コストも記録するときの ``CostTracking``。"""
    providers: tuple[str, ...]
    costs: CostTracking | None

def setup_token_tracking(providers: Sequence[str]=('openai',), *, include_cost: bool=True, calculator: Calculator | None=None, tracker: Tracker | None=None) -> TokenTracking:
    """各プロバイダーの自動トレースを有効にし、トークン数(とコスト)をトレースに残す。

    ``mlflow.set_tracking_uri`` と ``set_experiment`` のあとに呼ぶ。OpenAI のストリームは、
    ``stream_options={"include_usage": True}`` を付けないと使用量が返らない。

    Args:
        providers: ``mlflow.<名前>.autolog`` のある名前("openai"、"anthropic"、"langchain" など)。
        include_cost: ``setup_cost_tracking(calculator, tracker=tracker)`` も行うか。

    Raises:
        ValueError: 知らないプロバイダー名。
        ImportError: そのプロバイダーの SDK が入っていない。
    """

def setup_cost_tracking(calculator: Calculator | None=None, *, tracker: Tracker | None=None, current_user: Callable[[], str | None] | None=None) -> CostTracking:
    """LLM のスパンが終わるたびに、コストをトレースへ記録する。

    スパンに ``mlflow.llm.cost``、``cost.status``、``cost.price_source`` を、トレースに
    ``cost.status`` と ``cost.by_model`` を付ける。料金は呼び出しが始まった日のもの。
    ``set_experiment`` や ``set_tracking_uri`` の後も動き続ける。ほかの処理が
    ``mlflow.tracing.configure`` で上書きしたり ``mlflow.tracing.reset()`` で消したりすると外れ、
    ``installed`` か件数を読んだときに警告する。``install()`` をもう一度呼べばよい。
    ``setup_cost_tracking`` を二度呼ぶと、新しいほうに替わる。

    Args:
        calculator: 既定は ``CostCalculator()``(2024 年 12 月の公開料金)。
        tracker: 渡すと、同じコストを ``CostTracker`` にも足す。
        current_user: いまのユーザーを返す関数。ユーザー別の合計に使う。

    Returns:
        件数(``priced``、``unpriced``、``missing_usage``、``failed``)を持つ ``CostTracking``。
    """

def get_token_usage_from_trace(trace: Trace | str) -> TokenUsage | None:
    """トレース 1 件のトークン数。使用量がどこにも報告されていなければ ``None``(0 ではない)。

    Raises:
        TraceNotFoundError: ID のトレースがない。
    """

def usage_by_model(trace: Trace | str) -> list[ModelUsage]:
    """トレース 1 件の使用量をモデル別に。トークンの多い順。数え方は ``llm_calls``。"""

def price_trace(trace: Trace | str, calculator: Calculator | None=None, *, at: datetime | None=None) -> TraceCost:
    """保存済みのトレースを計算し直す。モデルの混在、入れ子、料金不明を正しく扱う。

    Args:
        calculator: 既定は 2024 年 12 月の公開料金。
        at: いつの料金か。``None`` は、それぞれの呼び出しが始まった日。

    Raises:
        TraceNotFoundError: ID のトレースがない。
        InvalidUsageError: 負の数など、ありえない使用量を持つスパンがある。
    """

@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTotals:
    """モデル 1 つ分の件数、トークン数、USD。"""
    calls: int = 0
    unpriced_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: Decimal = Decimal(0)

@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsageSummary:
    """期間の合計。金額は USD。

    ``weighted_*`` は、サンプリングで捨てた分を ``sampling.weight`` で補った推定値。
    ``traces_partly_priced`` は、自分の料金表で計算しきれなかったトレース(``cost.status`` が
    ``priced`` 以外)の数。MLflow が自前のカタログで補った金額が混ざっていることがある。
    ``by_model`` は、``setup_cost_tracking`` が内訳を残したトレースの分だけの、補わない実数。
    ``include_cost=False`` のとき、金額は NaN、金額についての件数は ``None``、内訳は空。
    """
    experiment_id: str
    trace_count: int = 0
    traces_without_usage: int = 0
    traces_without_cost: int | None = 0
    traces_partly_priced: int | None = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    weighted_trace_count: float = 0.0
    weighted_total_tokens: float = 0.0
    weighted_cost_usd: float = 0.0
    by_model: dict[str, ModelTotals] = field(default_factory=dict[str, ModelTotals])
    truncated: bool = False
    source: Literal['server_metrics', 'paged'] = 'paged'

def aggregate_token_usage_from_traces(experiment_name: str, start: datetime | None=None, end: datetime | None=None, *, filter_string: str | None=None, max_traces: int | None=None, page_size: int=PAGE_SIZE, include_cost: bool=True) -> TokenUsageSummary:
    """エクスペリメントのトークン数とコストを合計する。

    スパンを読まずにページをめくる。件数で黙って打ち切らず、メモリーは 1 ページ分しか使わない。
    金額が要らず、絞り込みも間引きもなければ、1 件も読まずに保存先の集計 API に足してもらう。
    集計 API の金額はスパンの合計しかなく、親子を二重に数えるので使わない(MLflow 3.17)。

    Args:
        start: この時刻から(タイムゾーン付き)。``None`` は最初から。
        end: この時刻の手前まで。``None`` は最後まで。
        filter_string: 追加の検索条件。``"tag.environment = 'production'"`` など。
        max_traces: この件数で止める。止めたときは ``truncated=True`` を返す。
        include_cost: 偽ならトークン数だけ。どちらで数えたかは、結果の ``source`` にある。

    Raises:
        ExperimentNotFoundError: エクスペリメントがない。
        ValueError: ``start`` か ``end`` にタイムゾーンがない。
    """

def main() -> None:
    ...

@mlflow.trace
def answer_with_two_models(client: Any, question: str) -> str:
    """小さいモデルで言い換えてから、大きいモデルで答える。ストリームは 2 通りの書き方で読む。"""

def sum_one_by_one(experiment_id: str) -> int:
    """避けるべき書き方: 一覧を取ってから、1 件ずつ読み直す。比べるためだけにある。"""
