"""8.2.3 トークン使用量の自動追跡(リスト8.9)。

トークン数はコストの元になる。だが、トレースを 1 件ずつ読んで足すと、5,000 件で 1 分以上かかり
(N+1 問題)、入れ子のスパンは二重に数えられ、設定の足りないストリームは 0 と区別が付かない。

実行::

    $ python chapter8_samples/02_cost_tracking/token_tracking.py
    1. 1 件のトレースで 4 回呼ぶ。設定のないストリーム 1 回は、使用量の報告がない
       gpt-4o-mini-2024-07-18  3 回のうち報告 2 回  入力 26  出力 60
       gpt-4o-2024-08-06       1 回のうち報告 1 回  入力 13  出力 30
       合計 129 トークン  $0.000372
    2. 同じ質問を 20 件。1 件ずつ読む書き方(N+1)と比べる
       1 件ずつ: 一覧のあとに 20 回読む  2580 トークン(129 x 20)
       まとめて: 一覧だけを読む          2580 トークン
       gpt-4o-mini-2024-07-18  報告のあった 40 回  $0.000798
       gpt-4o-2024-08-06       報告のあった 20 回  $0.006650
       合計  $0.007448
       報告のないストリームが 20 件にあるので、金額は下限になる

Databricks でも同じ。``MLFLOW_TRACKING_URI=databricks`` とエクスペリメントのパスだけを変える。

OSS の MLflow でも古いトレースを減らせる(3.17)。``mlflow server --trace-archival-config FILE`` は、
保持期間を過ぎたトレースの中身を S3 などへ移し、画面と API からはそのまま読める。
``MlflowClient().delete_traces(experiment_id, max_timestamp_millis=...)`` は消す。先に
``python -m chapter8_samples.cost_tracking export`` で書き出せば、SQL は後からでも使える。
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import mlflow
from mlflow.entities import Trace

from chapter8_samples.cost_tracking import CostCalculator
from chapter8_samples.cost_tracking.archive import parquet
from chapter8_samples.cost_tracking.tracker import BaseCostTracker, Calculator
from chapter8_samples.cost_tracking.usage import reader
from chapter8_samples.cost_tracking.usage.calls import TokenUsage
from chapter8_samples.cost_tracking.usage.leaves import llm_calls
from chapter8_samples.cost_tracking.usage.pricing import TraceCost, price_spans, trace_cost
from chapter8_samples.cost_tracking.usage.span_costs import CostTracking
from chapter8_samples.cost_tracking.usage.summary import TokenUsageSummary

logger = logging.getLogger(__name__)
export_traces_to_parquet = parquet.export_traces_to_parquet  # 本書ではここから import する

# これらのスパンは OpenTelemetry が直接作り、MLflow のスパンの処理(コストの記録)を通らない
OTEL_NATIVE = ("haystack", "semantic_kernel", "strands")


@dataclass(frozen=True, slots=True)
class TokenTracking:
    """``setup_token_tracking`` の結果。``unseen`` のコストは ``price_trace`` で計算する。"""

    costs: CostTracking | None
    unseen: tuple[str, ...] = ()


def setup_token_tracking(
    providers: Sequence[str] = ("openai",),
    *,
    include_cost: bool = True,
    calculator: Calculator | None = None,
    tracker: BaseCostTracker | None = None,
) -> TokenTracking:
    """各プロバイダーの自動トレースを有効にし、トークン数(とコスト)をトレースに残す。

    ``set_experiment`` (または ``setup_production_tracing``)のあとに呼ぶ。OpenAI のストリームは、
    ``stream_options={"include_usage": True}`` を付けないと使用量が返らない。

    Args:
        providers: ``mlflow.<名前>.autolog`` のある名前("openai"、"anthropic"、"langchain" など)。
        include_cost: ``setup_cost_tracking(calculator, tracker=tracker)`` も行うか。
    """
    for provider in providers:
        flavor: Any = getattr(mlflow, provider, None)
        if not hasattr(flavor, "autolog"):
            raise ValueError(f"unknown provider {provider!r}: no mlflow.{provider}.autolog")
        flavor.autolog()
    if not include_cost:
        return TokenTracking(None)
    unseen = tuple(provider for provider in providers if provider in OTEL_NATIVE)
    if unseen:
        logger.warning("spans of %s get no cost when they end; use price_trace()", unseen)
    return TokenTracking(setup_cost_tracking(calculator, tracker=tracker), unseen)


def setup_cost_tracking(
    calculator: Calculator | None = None, *, tracker: BaseCostTracker | None = None
) -> CostTracking:
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
    return CostTracking(calculator or CostCalculator(), tracker).install()


def get_token_usage_from_trace(trace: Trace | str) -> TokenUsage | None:
    """トレース 1 件のトークン数。使用量がどこにも報告されていなければ ``None``(0 ではない)。"""
    trace = reader.load_trace(trace)
    data = trace.info.token_usage
    if data and any(data.values()):  # MLflow は、報告がなくても 0 の合計を書くことがある
        return TokenUsage.from_mlflow(data)
    reported = [call.usage for call in llm_calls(trace.data.spans) if call.usage]
    return sum(reported, TokenUsage()) if reported else None


@dataclass(slots=True)
class ModelUsage:
    """モデル 1 つ分の合計。``calls_without_usage`` の分のトークンは、どこにも数えられていない。"""

    model: str
    calls: int = 0
    calls_without_usage: int = 0
    usage: TokenUsage = field(default_factory=TokenUsage)


def usage_by_model(trace: Trace | str) -> list[ModelUsage]:
    """トレース 1 件の使用量をモデル別に。トークンの多い順。数え方は ``llm_calls``。"""
    totals: dict[str, ModelUsage] = {}
    for call in llm_calls(reader.load_trace(trace).data.spans):
        item = totals.setdefault(call.model, ModelUsage(call.model))
        item.calls += 1
        if call.usage is None:
            item.calls_without_usage += 1
        else:
            item.usage += call.usage
    return sorted(totals.values(), key=lambda item: (-item.usage.total_tokens, item.model))


def price_trace(
    trace: Trace | str, calculator: Calculator | None = None, *, at: datetime | None = None
) -> TraceCost:
    """保存済みのトレースのコストを計算し直す。``at`` がなければ、各呼び出しが始まった日の料金。"""
    spans = reader.load_trace(trace).data.spans
    return trace_cost(price_spans(spans, calculator or CostCalculator(), at))


def aggregate_token_usage_from_traces(
    experiment_name: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    filter_string: str | None = None,
    max_traces: int | None = None,
    page_size: int = reader.PAGE_SIZE,
) -> TokenUsageSummary:
    """エクスペリメントのトークン数とコストを、タイムゾーン付きの [start, end) について合計する。

    スパンを読まずにページをめくる。件数で黙って打ち切らず、メモリーは 1 ページ分しか使わない。
    ``filter_string`` は ``"tag.environment = 'production'"`` のような追加の条件。``max_traces`` で
    止めたら ``truncated=True`` を返す。
    """
    summary = TokenUsageSummary(experiment_id=reader.find_experiment_id(experiment_name))
    for trace in reader.iter_traces(
        summary.experiment_id, start, end, filter_string=filter_string, page_size=page_size
    ):
        if summary.trace_count == max_traces:
            summary.truncated = True
            break
        summary.add(trace.info)
    return summary


def main() -> None:
    import openai

    from chapter8_samples import _lab

    with _lab.sample("ch8-token-tracking", llm=True):
        setup_token_tracking(providers=("openai",))
        client = openai.OpenAI()
        question = "返品の送料は誰が払いますか?"
        print("1. 1 件のトレースで 4 回呼ぶ。設定のないストリーム 1 回は、使用量の報告がない")
        answer_with_two_models(client, question)
        mlflow.flush_trace_async_logging()
        trace_id = mlflow.get_last_active_trace_id() or ""
        for item in usage_by_model(trace_id):
            reported = item.calls - item.calls_without_usage
            tokens = f"入力 {item.usage.input_tokens}  出力 {item.usage.output_tokens}"
            print(f"   {item.model:<24}{item.calls} 回のうち報告 {reported} 回  {tokens}")
        usage = get_token_usage_from_trace(trace_id) or TokenUsage()
        print(f"   合計 {usage.total_tokens} トークン  ${price_trace(trace_id).total_usd:.6f}")
        print("2. 同じ質問を 20 件。1 件ずつ読む書き方(N+1)と比べる")
        for _ in range(19):
            answer_with_two_models(client, question)
        mlflow.flush_trace_async_logging()
        total = aggregate_token_usage_from_traces("ch8-token-tracking")
        slow, reads = sum_one_by_one(total.experiment_id)
        tokens = f"{slow} トークン({usage.total_tokens} x {total.trace_count})"
        print(f"   1 件ずつ: 一覧のあとに {reads} 回読む  {tokens}")
        print(f"   まとめて: 一覧だけを読む          {total.total_tokens} トークン")
        for model, item in total.by_model.items():
            print(f"   {model:<24}報告のあった {item.calls} 回  ${item.cost_usd:.6f}")
        print(f"   合計  ${total.cost_usd:.6f}")
        partly = total.traces_partly_priced
        print(f"   報告のないストリームが {partly} 件にあるので、金額は下限になる")


@mlflow.trace
def answer_with_two_models(client: Any, question: str) -> str:
    """小さいモデルを 3 回(うちストリーム 2 回)、大きいモデルを 1 回呼ぶ。"""
    ask = partial(client.chat.completions.create, messages=[{"role": "user", "content": question}])
    ask(model="gpt-4o-mini")
    for options in ({"stream_options": {"include_usage": True}}, {}):  # 報告するもの、しないもの
        for _ in ask(model="gpt-4o-mini", stream=True, **options):  # 最後まで読む
            pass
    return ask(model="gpt-4o").choices[0].message.content


def sum_one_by_one(experiment_id: str) -> tuple[int, int]:
    """避けるべき書き方: 一覧を取ってから、1 件ずつ読み直す。トークン数と、読み直した回数を返す。"""
    total = reads = 0
    for trace in reader.iter_traces(experiment_id):
        usage = get_token_usage_from_trace(trace.info.trace_id)  # 1 件ごとに問い合わせる
        reads += 1
        if usage is not None:
            total += usage.total_tokens
    return total, reads


if __name__ == "__main__":
    main()
