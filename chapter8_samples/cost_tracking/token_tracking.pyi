"""8.2.3 トークン使用量の自動追跡(リスト8.9)。"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
import mlflow
from mlflow.entities import Trace
from .archive import parquet
from .tracker import BaseCostTracker, Calculator
from .usage import reader
from .usage.calls import TokenUsage
from .usage.pricing import TraceCost
from .usage.span_costs import CostTracking
from .usage.summary import TokenUsageSummary
logger = logging.getLogger(__name__)
export_traces_to_parquet = parquet.export_traces_to_parquet
OTEL_NATIVE = ('haystack', 'semantic_kernel', 'strands')

@dataclass(frozen=True, slots=True)
class TokenTracking:
    """``setup_token_tracking`` の結果。``unseen`` のコストは ``price_trace`` で計算する。"""
    costs: CostTracking | None
    unseen: tuple[str, ...] = ()

def setup_token_tracking(providers: Sequence[str]=('openai',), *, include_cost: bool=True, calculator: Calculator | None=None, tracker: BaseCostTracker | None=None) -> TokenTracking:
    """各プロバイダーの自動トレースを有効にし、トークン数(とコスト)をトレースに残す。

    ``set_experiment`` (または ``setup_production_tracing``)のあとに呼ぶ。OpenAI のストリームは、
    ``stream_options={"include_usage": True}`` を付けないと使用量が返らない。

    Args:
        providers: ``mlflow.<名前>.autolog`` のある名前("openai"、"anthropic"、"langchain" など)。
        include_cost: ``setup_cost_tracking(calculator, tracker=tracker)`` も行うか。
    """

def setup_cost_tracking(calculator: Calculator | None=None, *, tracker: BaseCostTracker | None=None) -> CostTracking:
    """LLM のスパンが終わるたびに、コストをトレースへ記録する。料金は呼び出しが始まった日のもの。

    スパンに ``mlflow.llm.cost`` と ``cost.price_source``、トレースに ``cost.by_model``、両方に
    ``cost.status`` と ``cost.reason`` を付ける。``mlflow.set_tracking_uri`` と
    ``mlflow.tracing.configure`` はこの登録を消すので、そのあとに呼ぶ(消されたら、件数を読んだときに
    警告する)。
    二度呼ぶと新しいほうに替わる。LangChain がキャッシュから答えた呼び出しは、チェーンの最後のもの
    だけが自動で 0 円になる(ほかは、自分でスパンの ``cost.status`` を ``"cache_hit"`` にする)。

    Args:
        calculator: 既定は ``CostCalculator()``(2024 年 12 月の公開料金)。
        tracker: 同じコストを足す ``CostTracker``。
    """

def get_token_usage_from_trace(trace: Trace | str) -> TokenUsage | None:
    """トレース 1 件のトークン数。使用量がどこにも報告されていなければ ``None``(0 ではない)。"""

@dataclass(slots=True)
class ModelUsage:
    """モデル 1 つ分の合計。``calls_without_usage`` の分のトークンは、どこにも数えられていない。"""
    model: str
    calls: int = 0
    calls_without_usage: int = 0
    usage: TokenUsage = field(default_factory=TokenUsage)

def usage_by_model(trace: Trace | str) -> list[ModelUsage]:
    """トレース 1 件の使用量をモデル別に。トークンの多い順。数え方は ``llm_calls``。"""

def price_trace(trace: Trace | str, calculator: Calculator | None=None, *, at: datetime | None=None) -> TraceCost:
    """保存済みのトレースのコストを計算し直す。``at`` がなければ、各呼び出しが始まった日の料金。"""

def aggregate_token_usage_from_traces(experiment_name: str, start: datetime | None=None, end: datetime | None=None, *, filter_string: str | None=None, max_traces: int | None=None, page_size: int=reader.PAGE_SIZE) -> TokenUsageSummary:
    """エクスペリメントのトークン数とコストを、タイムゾーン付きの [start, end) について合計する。

    スパンを読まずにページをめくる。件数で黙って打ち切らず、メモリーは 1 ページ分しか使わない。
    ``filter_string`` は ``"tag.environment = 'production'"`` のような追加の条件。``max_traces`` で
    止めたら ``truncated=True`` を返す。
    """

def main() -> None:
    ...

@mlflow.trace
def answer_with_two_models(client: Any, question: str) -> str:
    """小さいモデルを 3 回(うちストリーム 2 回)、大きいモデルを 1 回呼ぶ。"""

def sum_one_by_one(experiment_id: str) -> tuple[int, int]:
    """避けるべき書き方: 一覧を取ってから、1 件ずつ読み直す。トークン数と、読み直した回数を返す。"""
