"""8.2.3 トークン使用量の自動追跡(リスト8.9)。

トークン数はコストの元になる。だが、トレースを 1 件ずつ読んで足すと、5,000 件で 1 分以上かかり
(N+1 問題)、入れ子のスパンは二重に数えられ、設定の足りないストリームは 0 と区別が付かない。

実行::

    $ python chapter8_samples/02_cost_tracking/token_tracking.py
    1. 1 件のトレースで 2 つのモデルとストリームを使う
       gpt-4o-mini-2024-07-18  3 回  入力  26  出力  60  (うち報告なし 1 回)
       gpt-4o-2024-08-06       1 回  入力  13  出力  30
    2. 20 件を足す。1 件ずつ読む書き方(N+1)と比べる
       1 件ずつ: 問い合わせ 21 回  2466 トークン
       まとめて: 問い合わせ 1 回   2466 トークン
       保存先で: 読むのは 0 件     2466 トークン (server_metrics)
       トレース 20 件  $0.007182
       gpt-4o-mini-2024-07-18  40 回  $0.000770
       gpt-4o-2024-08-06       20 回  $0.006412
       計算しきれなかったトレース: 20 件

Databricks でも同じ。``MLFLOW_TRACKING_URI=databricks`` とエクスペリメントのパスだけを変える。
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import mlflow
from mlflow.entities import Trace, TraceInfo

from chapter8_samples.cost_tracking import CostCalculator
from chapter8_samples.cost_tracking.archive.parquet import (
    enable_trace_archive as enable_trace_archive,
)
from chapter8_samples.cost_tracking.archive.parquet import (
    export_traces_to_parquet as export_traces_to_parquet,
)
from chapter8_samples.cost_tracking.usage import (
    BY_MODEL_TAG,
    PAGE_SIZE,
    STATUS_KEY,
    Calculator,
    CostTracking,
    StoreTotals,
    TokenUsage,
    TraceCost,
    Tracker,
    find_experiment_id,
    iter_traces,
    llm_calls,
    load_trace,
    sampling_weight,
    totals_from_store,
    trace_cost,
)


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


def setup_token_tracking(
    providers: Sequence[str] = ("openai",),
    *,
    include_cost: bool = True,
    calculator: Calculator | None = None,
    tracker: Tracker | None = None,
) -> TokenTracking:
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
    for provider in providers:
        _autolog(provider)
    if not include_cost:
        return TokenTracking(tuple(providers), None)
    costs = setup_cost_tracking(calculator, tracker=tracker)
    return TokenTracking(tuple(providers), costs)


def setup_cost_tracking(
    calculator: Calculator | None = None,
    *,
    tracker: Tracker | None = None,
    current_user: Callable[[], str | None] | None = None,
) -> CostTracking:
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
    return CostTracking(calculator or CostCalculator(), tracker, current_user).install()


def _autolog(provider: str) -> None:
    flavor = getattr(mlflow, provider, None)
    if flavor is None:
        raise ValueError(f"unknown provider {provider!r}: no mlflow.{provider}")
    try:
        enable = flavor.autolog  # mlflow.openai などは、ここで初めて読み込まれる
    except ModuleNotFoundError as error:
        raise ImportError(f"provider {provider!r} needs {error.name!r}; install it") from error
    except AttributeError as error:
        raise ValueError(f"mlflow.{provider} has no autolog()") from error
    enable()


def get_token_usage_from_trace(trace: Trace | str) -> TokenUsage | None:
    """トレース 1 件のトークン数。使用量がどこにも報告されていなければ ``None``(0 ではない)。

    Raises:
        TraceNotFoundError: ID のトレースがない。
    """
    trace = load_trace(trace)
    data = trace.info.token_usage
    if data and any(data.values()):  # MLflow は、報告がなくても 0 の合計を書くことがある
        return TokenUsage.from_mlflow(data)
    reported = [call.usage for call in llm_calls(trace) if call.usage]
    return sum(reported[1:], start=reported[0]) if reported else None


def usage_by_model(trace: Trace | str) -> list[ModelUsage]:
    """トレース 1 件の使用量をモデル別に。トークンの多い順。数え方は ``llm_calls``。"""
    totals: dict[str, ModelUsage] = {}
    for call in llm_calls(load_trace(trace)):
        old = totals.get(call.model) or ModelUsage(call.model, 0, 0, TokenUsage())
        missing = old.calls_without_usage + (call.usage is None)
        usage = old.usage + (call.usage or TokenUsage())
        totals[call.model] = ModelUsage(call.model, old.calls + 1, missing, usage)
    return sorted(totals.values(), key=lambda m: (-m.usage.total_tokens, m.model))


def price_trace(
    trace: Trace | str, calculator: Calculator | None = None, *, at: datetime | None = None
) -> TraceCost:
    """保存済みのトレースを計算し直す。モデルの混在、入れ子、料金不明を正しく扱う。

    Args:
        calculator: 既定は 2024 年 12 月の公開料金。
        at: いつの料金か。``None`` は、それぞれの呼び出しが始まった日。

    Raises:
        TraceNotFoundError: ID のトレースがない。
        InvalidUsageError: 負の数など、ありえない使用量を持つスパンがある。
    """
    return trace_cost(trace, calculator or CostCalculator(), at=at)


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
    source: Literal["server_metrics", "paged"] = "paged"


def aggregate_token_usage_from_traces(
    experiment_name: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    filter_string: str | None = None,
    max_traces: int | None = None,
    page_size: int = PAGE_SIZE,
    include_cost: bool = True,
) -> TokenUsageSummary:
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
    experiment_id = find_experiment_id(experiment_name)
    if not include_cost and filter_string is None and max_traces is None:
        found = totals_from_store(experiment_id, start, end)
        if found is not None:
            return _store_summary(experiment_id, found)
    options: dict[str, Any] = {"filter_string": filter_string, "page_size": page_size}
    totals = _Totals()
    truncated = totals.add_up_to(max_traces, iter_traces(experiment_id, start, end, **options))
    summary = totals.summary(experiment_id, truncated=truncated)
    return summary if include_cost else replace(summary, **_NO_COST)


_NO_COST: dict[str, Any] = {
    "traces_without_cost": None,
    "traces_partly_priced": None,
    "cost_usd": Decimal("NaN"),
    "weighted_cost_usd": float("nan"),
    "by_model": {},
}


def _store_summary(experiment_id: str, found: StoreTotals) -> TokenUsageSummary:
    return TokenUsageSummary(
        experiment_id=experiment_id,
        trace_count=found.trace_count,
        traces_without_usage=found.trace_count - found.traces_with_usage,
        input_tokens=found.usage.input_tokens,
        output_tokens=found.usage.output_tokens,
        total_tokens=found.usage.total_tokens,
        weighted_trace_count=float(found.trace_count),
        weighted_total_tokens=float(found.usage.total_tokens),
        source="server_metrics",
        **_NO_COST,
    )


class _Totals:
    """トレースの情報を 1 件ずつ足し込む。"""

    def __init__(self) -> None:
        self.trace_count = self.without_usage = self.without_cost = self.partly = 0
        self.tokens = TokenUsage()
        self.cost_usd = Decimal(0)
        self.weighted = [0.0, 0.0, 0.0]
        self.by_model: dict[str, ModelTotals] = {}

    def add_up_to(self, limit: int | None, traces: Iterable[Trace]) -> bool:
        """足し込む。``limit`` 件で止めて、まだ残っていれば真を返す。"""
        for trace in traces:
            if self.trace_count == limit:
                return True
            self.add(trace.info)
        return False

    def add(self, info: TraceInfo) -> None:
        usage = TokenUsage.from_mlflow(info.token_usage) if info.token_usage else None
        usd = (info.cost or {}).get("total_cost")
        cost = None if usd is None else Decimal(str(usd))
        weight = sampling_weight(info)
        self.trace_count += 1
        self.without_usage += usage is None
        self.without_cost += cost is None
        self.partly += info.tags.get(STATUS_KEY, "priced") != "priced"
        self.tokens += usage or TokenUsage()
        self.cost_usd += cost or 0
        tokens = usage.total_tokens if usage else 0
        for i, value in enumerate((1, tokens, float(cost or 0))):
            self.weighted[i] += weight * value
        self._add_models(info.tags.get(BY_MODEL_TAG))

    def _add_models(self, tag: str | None) -> None:
        for model, (calls, prompt, completion, usd) in _breakdown(tag).items():
            old = self.by_model.get(model, ModelTotals())
            self.by_model[model] = ModelTotals(
                calls=old.calls + calls,
                unpriced_calls=old.unpriced_calls + (calls if usd is None else 0),
                input_tokens=old.input_tokens + prompt,
                output_tokens=old.output_tokens + completion,
                cost_usd=old.cost_usd + (usd or 0),
            )

    def summary(self, experiment_id: str, *, truncated: bool) -> TokenUsageSummary:
        return TokenUsageSummary(
            experiment_id=experiment_id,
            trace_count=self.trace_count,
            traces_without_usage=self.without_usage,
            traces_without_cost=self.without_cost,
            traces_partly_priced=self.partly,
            input_tokens=self.tokens.input_tokens,
            output_tokens=self.tokens.output_tokens,
            total_tokens=self.tokens.total_tokens,
            cost_usd=self.cost_usd,
            weighted_trace_count=self.weighted[0],
            weighted_total_tokens=self.weighted[1],
            weighted_cost_usd=self.weighted[2],
            by_model=self.by_model,
            truncated=truncated,
        )


def _breakdown(tag: str | None) -> dict[str, tuple[int, int, int, Decimal | None]]:
    try:
        return {
            model: (int(calls), int(prompt), int(output), None if usd is None else Decimal(usd))
            for model, (calls, prompt, output, usd) in json.loads(tag or "{}").items()
        }
    except (ValueError, TypeError, AttributeError, ArithmeticError):  # 途中で切られたタグなど
        return {}


def main() -> None:
    import openai

    from chapter8_samples import _lab

    with _lab.sample("ch8-token-tracking", llm=True):
        setup_token_tracking(providers=("openai",))
        client = openai.OpenAI()

        print("1. 1 件のトレースで 2 つのモデルとストリームを使う")
        answer_with_two_models(client, "返品の送料は誰が払いますか?")
        mlflow.flush_trace_async_logging()
        trace_id = mlflow.get_last_active_trace_id() or ""
        for item in usage_by_model(trace_id):
            tokens = f"入力 {item.usage.input_tokens:>3}  出力 {item.usage.output_tokens:>3}"
            silent = item.calls_without_usage
            missing = f"  (うち報告なし {silent} 回)" if silent else ""
            print(f"   {item.model:<24}{item.calls} 回  {tokens}{missing}")

        print("2. 20 件を足す。1 件ずつ読む書き方(N+1)と比べる")
        for i in range(19):
            answer_with_two_models(client, f"注文 {i} はいつ届きますか?")
        mlflow.flush_trace_async_logging()
        summary = aggregate_token_usage_from_traces("ch8-token-tracking")
        slow = sum_one_by_one(summary.experiment_id)
        print(f"   1 件ずつ: 問い合わせ {summary.trace_count + 1} 回  {slow} トークン")
        print(f"   まとめて: 問い合わせ 1 回   {summary.total_tokens} トークン")
        quick = aggregate_token_usage_from_traces("ch8-token-tracking", include_cost=False)
        print(f"   保存先で: 読むのは 0 件     {quick.total_tokens} トークン ({quick.source})")
        print(f"   トレース {summary.trace_count} 件  ${summary.cost_usd:.6f}")
        for model, totals in summary.by_model.items():
            print(f"   {model:<24}{totals.calls} 回  ${totals.cost_usd:.6f}")
        print(f"   計算しきれなかったトレース: {summary.traces_partly_priced} 件")


@mlflow.trace
def answer_with_two_models(client: Any, question: str) -> str:
    """小さいモデルで言い換えてから、大きいモデルで答える。ストリームは 2 通りの書き方で読む。"""
    messages = [{"role": "user", "content": question}]
    client.chat.completions.create(model="gpt-4o-mini", messages=messages)
    for options in ({"stream_options": {"include_usage": True}}, {}):
        stream = client.chat.completions.create(
            model="gpt-4o-mini", messages=messages, stream=True, **options
        )
        for _ in stream:
            pass
    answer = client.chat.completions.create(model="gpt-4o", messages=messages)
    return answer.choices[0].message.content


def sum_one_by_one(experiment_id: str) -> int:
    """避けるべき書き方: 一覧を取ってから、1 件ずつ読み直す。比べるためだけにある。"""
    ids = [trace.info.trace_id for trace in iter_traces(experiment_id)]
    return sum(usage.total_tokens for usage in map(get_token_usage_from_trace, ids) if usage)


if __name__ == "__main__":
    main()
