"""8.3.4 スコアラーの登録と開始(リスト8.12)。

安全性は全件、それ以外は半分というように、スコアラーごとの割合で本番のトレースを採点し続ける。
同じ呼び出しが、手元の SQLite、MLflow サーバー、Databricks で動き、どこで採点するかを戻り値で示す。

実行::

    $ python chapter8_samples/03_quality_monitoring/scorer_setup.py
    登録したスコアラー                     採点した結果(60 トレース)
      safety_check        100%  client       60 件: yes 60
      relevance_check      50%  client      ... 件: ...
      groundedness_check   50%  client      ... 件: ...
      custom_guidelines    50%  client      ... 件: ...
    もう一度呼んだあとの版: 1, 1, 1, 1

割合の低いスコアラーは、高いスコアラーが選んだトレースの中から選ぶ(50% の 3 つは同じものになる)。

採点する場所は、次の 3 つ。コードのスコアラーは、3.18 から、サーバーの運用者が選べばコンテナーの中で
採点できる(既定では無効)。

- ``databricks``: Databricks ではすべてここ。``pip install databricks-agents`` が必要
- ``server``: OSS のサーバーが自動で採点する ``gateway:/`` の LLM ジャッジ。その接続先
  (AI Gateway のエンドポイント)は、``create_judge_endpoint=True`` で作れる
- ``client``: そのほか。``run_scoring_cycle()`` を定期的に呼ぶ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.genai.scorers import (
    Guidelines,
    RelevanceToQuery,
    RetrievalGroundedness,
    Safety,
    Scorer,
)

from chapter8_samples.quality_monitoring.scoring.judge_endpoint import resolve_judge_model
from chapter8_samples.quality_monitoring.scoring.judges import ScorerSetupError, require_judges
from chapter8_samples.quality_monitoring.scoring.plan import FINISHED_TRACES, ScorerPlan
from chapter8_samples.quality_monitoring.scoring.registry import ScorerStatus, setup_scorers


def setup_quality_scorers(
    experiment_name: str,
    safety_sample_rate: float = 1.0,
    quality_sample_rate: float = 0.5,
    custom_guidelines: str | Sequence[str] | None = None,
    *,
    judge_model: str | None = None,
    filter_string: str | None = FINISHED_TRACES,
    extra: Sequence[ScorerPlan] = (),
    create_judge_endpoint: bool = False,
    tracking_uri: str | None = None,
) -> list[ScorerStatus]:
    """本番の品質監視に使うスコアラーをまとめて登録し、開始する。

    何度呼んでもよい。定義が同じなら新しい版を作らず、割合とフィルターだけを合わせる。

    Args:
        safety_sample_rate: 安全性を採点する割合(0 より大きく 1 以下)。ほかは
            ``quality_sample_rate``。
        custom_guidelines: 自然言語の採点基準(1 つでも複数でもよい)。
        judge_model: すべてのジャッジのモデル。省くと、Databricks では用意されたもの、ほかでは
            ``MLFLOW_GENAI_JUDGE_DEFAULT_MODEL``、サーバーの接続先 ``judge``、gpt-4.1-mini の順。
        filter_string: 採点の対象にするトレース。
        extra: 追加のスコアラー。
        create_judge_endpoint: サーバーに接続先がなければ、``OPENAI_API_KEY`` を保存して作る。
        tracking_uri: MLflow の接続先。省略すると環境変数か、手元の SQLite。

    Raises:
        ScorerSetupError: 割合が範囲外、サーバーが拒否した、など。
    """
    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    model = resolve_judge_model(judge_model, create_judge_endpoint=create_judge_endpoint)
    rated: list[tuple[Scorer, float]] = [
        (Safety(name="safety_check", model=model), safety_sample_rate),
        (RelevanceToQuery(name="relevance_check", model=model), quality_sample_rate),
        (RetrievalGroundedness(name="groundedness_check", model=model), quality_sample_rate),
    ]
    if custom_guidelines:
        rated.append((_guidelines(custom_guidelines, model), quality_sample_rate))
    plans = [ScorerPlan(scorer=s, sample_rate=r, filter_string=filter_string) for s, r in rated]
    return setup_scorers(experiment_name, [*plans, *extra])


def setup_builtin_scorers(
    experiment_name: str,
    safety_sample_rate: float = 1.0,
    quality_sample_rate: float = 0.5,
    *,
    judge_model: str | None = None,
) -> list[ScorerStatus]:
    """組み込みのスコアラー(安全性、関連性、根拠)だけを登録し、開始する。"""
    return setup_quality_scorers(
        experiment_name, safety_sample_rate, quality_sample_rate, judge_model=judge_model
    )


def setup_custom_guidelines_scorer(
    experiment_name: str,
    guidelines: str | Sequence[str],
    scorer_name: str = "custom_guidelines",
    sample_rate: float = 0.5,
    *,
    judge_model: str | None = None,
) -> ScorerStatus:
    """自然言語で書いた採点基準を、スコアラーとして登録し、開始する。"""
    scorer = _guidelines(guidelines, resolve_judge_model(judge_model), scorer_name)
    return setup_scorers(experiment_name, [ScorerPlan(scorer=scorer, sample_rate=sample_rate)])[0]


def _guidelines(
    text: str | Sequence[str], model: str | None, name: str = "custom_guidelines"
) -> Guidelines:
    guidelines = text if isinstance(text, str) else list(text)
    if not "".join(guidelines).strip():
        raise ScorerSetupError(f"guidelines must not be empty, got {text!r}")
    return Guidelines(name=name, guidelines=guidelines, model=model)


def evaluate_with_scorers(
    eval_data: Sequence[dict[str, Any]], statuses: Sequence[ScorerStatus]
) -> dict[str, float]:
    """本番と同じスコアラーで ``inputs`` と ``outputs`` の行を評価し、平均を返す。"""
    from mlflow.genai import evaluate  # pyright: ignore[reportUnknownVariableType]

    require_judges([status.scorer for status in statuses])  # evaluate() は黙って空を返す
    result = evaluate(data=list(eval_data), scorers=[status.scorer for status in statuses])
    return {name: float(value) for name, value in result.metrics.items()}


def main() -> None:
    """登録し、60 件のトレースを作って採点し(リスト8.11)、割合どおりに採点されたかを見る。"""
    from collections import Counter, defaultdict

    from mlflow.entities import SpanType

    from chapter8_samples import _lab
    from chapter8_samples.quality_monitoring.scoring.cycle import run_scoring_cycle

    @mlflow.trace(span_type=SpanType.RETRIEVER)
    def search(question: str) -> list[dict[str, str]]:
        return [{"page_content": f"{question}は購入から 30 日以内に承ります。"}]

    @mlflow.trace
    def answer(question: str) -> str:
        return search(question)[0]["page_content"]

    with _lab.sample("ch8-scorer-setup", llm=True):
        polite = "回答は丁寧な言葉づかいである"
        statuses = setup_quality_scorers("ch8-scorer-setup", custom_guidelines=polite)
        for number in range(60):
            answer(f"注文 {number} の返品")
        report = run_scoring_cycle("ch8-scorer-setup", statuses)
        print(f"登録したスコアラー                     採点した結果({report.traces} トレース)")
        verdicts: dict[str, Counter[str]] = defaultdict(Counter)
        for trace in mlflow.MlflowClient().search_traces(locations=[report.experiment_id]):
            for assessment in trace.info.assessments:
                if assessment.feedback:
                    verdicts[assessment.name][str(assessment.feedback.value)] += 1
        for s in statuses:
            values = "、".join(f"{value} {count}" for value, count in verdicts[s.name].items())
            count = report.scorers[s.name].scored
            print(f"  {s.name:18} {s.sample_rate:5.0%}  {s.runs:8} {count:6} 件: {values}")
        again = setup_quality_scorers("ch8-scorer-setup", custom_guidelines=polite)
        print("もう一度呼んだあとの版:", ", ".join(str(s.version) for s in again))


if __name__ == "__main__":
    main()
