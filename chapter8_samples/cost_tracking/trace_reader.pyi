"""8.2.3 トレースを読み、LLM の呼び出しを二重に数えずに取り出す(本書にリストなし)。"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Protocol
from mlflow.entities import Span, Trace, TraceInfo
USAGE_ATTRIBUTE = 'mlflow.chat.tokenUsage'
MODEL_ATTRIBUTE = 'mlflow.llm.model'
WEIGHT_KEY = 'sampling.weight'
UNKNOWN_MODEL = '(unknown)'
PAGE_SIZE = 500

class ExperimentNotFoundError(LookupError):
    """その名前のエクスペリメントが、いまの接続先にない。"""

class TraceNotFoundError(LookupError):
    """その ID のトレースが、いまの接続先にない。"""

@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """トークン数。``input_tokens`` は、キャッシュの読み込みと書き込みの分を含む。"""
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0

    @classmethod
    def from_mlflow(cls, data: Mapping[str, Any]) -> TokenUsage:
        """``mlflow.chat.tokenUsage`` から作る。

        Gemini の思考トークンは合計にしか入っていないので、差を出力に数える。
        """

    def __add__(self, other: TokenUsage) -> TokenUsage:
        ...

@dataclass(frozen=True, slots=True)
class LlmCall:
    """トレースの中の、LLM の呼び出し 1 回。``usage`` が ``None`` なら使用量が報告されていない。"""
    span_id: str
    name: str
    model: str
    usage: TokenUsage | None
    started_at: datetime

def find_experiment_id(experiment_name: str) -> str:
    """エクスペリメントの ID。ないものを作らない。

    Raises:
        ExperimentNotFoundError: その名前のものがない。
    """

def iter_traces(experiment_id: str, start: datetime | None=None, end: datetime | None=None, *, filter_string: str | None=None, include_spans: bool=False, page_size: int=PAGE_SIZE) -> Iterator[Trace]:
    """期間のトレースを古い順に 1 件ずつ。1 件ごとに問い合わせず、ページ単位で読む。"""

def with_time_zone(name: str, at: datetime) -> datetime:
    """時刻をそのまま返す。タイムゾーンがなければ、どこの時刻か分からないので ``ValueError``。"""

def sampling_weight(info: TraceInfo) -> float:
    """このトレースが代表する件数。ないものと壊れたものは 1 件分(cost_analysis.sql と同じ扱い)。"""

@dataclass(frozen=True, slots=True)
class StoreTotals:
    """保存先が足した、期間の件数とトークン数。"""
    trace_count: int
    traces_with_usage: int
    usage: TokenUsage

def totals_from_store(experiment_id: str, start: datetime | None=None, end: datetime | None=None) -> StoreTotals | None:
    """トレースを読まず、保存先の集計 API に足してもらう。

    1 件ずつ足したときと同じ数にならない恐れがあれば ``None``: サンプリングされたトレースがある、
    入力と出力の和が合計と違う(Gemini の思考トークンなど)、保存先が集計に対応していない。
    """

def load_trace(trace: Trace | str) -> Trace:
    """ID なら読み込み、トレースならそのまま返す。

    Raises:
        TraceNotFoundError: ID のトレースがない。
    """

def llm_calls(trace: Trace) -> list[LlmCall]:
    """LLM の呼び出しを、二重に数えずに取り出す。

    LangChain と OpenAI を両方計装すると、親子のスパンが同じ使用量を持つ。使用量を持つ子孫の
    ないスパンだけを数える。使用量のない LLM スパンは、子孫にも先祖にもないときだけ、
    「報告なし」として残す。失敗した呼び出しは課金されないので数えない。
    """

def span_usage(span: Span) -> TokenUsage | None:
    """スパンの使用量。埋め込みは MLflow が拾わないので、出力の ``usage`` から読む。"""

def span_model(span: Span) -> str:
    """スパンのモデル名。分からなければ ``"(unknown)"``。"""

def is_silent_call(span: Span) -> bool:
    """成功した LLM の呼び出しなのに、使用量の報告がないか。"""

class Price(Protocol):
    """1 回の呼び出しのコスト(``cost_calculator.PriceBreakdown`` など)。"""

    @property
    def model(self) -> str:
        ...

    @property
    def input_tokens(self) -> int:
        ...

    @property
    def output_tokens(self) -> int:
        ...

    @property
    def priced(self) -> bool:
        ...

    @property
    def prompt_usd(self) -> Decimal:
        ...

    @property
    def output_usd(self) -> Decimal:
        ...

    @property
    def total_usd(self) -> Decimal:
        ...

    @property
    def matched_model(self) -> str:
        ...

    @property
    def price_source(self) -> str:
        ...

class Calculator(Protocol):
    """``cost_calculator.CostCalculator``、または同じ ``price`` を持つもの。"""

    def price(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, *, cache_write_tokens: int=0, cache_write_1h_tokens: int=0, at: date | datetime | None=None) -> Any:
        ...

def price_usage(calculator: Calculator, model: str, usage: TokenUsage, at: datetime | None) -> Price:
    """使用量にコストを付ける。料金が決まらなければ ``UnpricedCall``。"""

@dataclass(frozen=True, slots=True)
class UnpricedCall:
    """料金の決まらなかった呼び出し。金額は NaN。``CostTracker`` では別に数えられる。"""
    model: str
    input_tokens: int
    output_tokens: int
    priced: bool = False
    prompt_usd: Decimal = Decimal('NaN')
    output_usd: Decimal = Decimal('NaN')
    total_usd: Decimal = Decimal('NaN')
    matched_model: str = ''
    price_source: str = ''

def main() -> None:
    ...

def nested_trace() -> Trace:
    """同じ呼び出しを 2 つの計装が記録し、別の呼び出しは使用量を返さなかったトレース。"""
