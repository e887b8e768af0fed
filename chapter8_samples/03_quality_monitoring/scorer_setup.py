"""8.3.4 スコアラーの登録と開始(リスト8.12)。

安全性は全件、それ以外は一部というように、スコアラーごとの割合で本番のトレースを採点し続ける。
同じ呼び出しが、手元の SQLite、MLflow サーバー、Databricks で動き、採点するのは誰かを戻り値で示す。

実行::

    $ python chapter8_samples/03_quality_monitoring/scorer_setup.py
    登録したスコアラー
      safety_check        100%  版 1  採点: client
      relevance_check      50%  版 1  採点: client
      groundedness_check   50%  版 1  採点: client
      custom_guidelines    50%  版 1  採点: client
    もう一度呼んだあとの版: 1, 1, 1, 1
    採点した結果(10 トレース)
      safety_check        yes 10
      relevance_check     ...
      groundedness_check  ...
      custom_guidelines   ...

本書の執筆時から変わったこと(MLflow 3.17): ``register()`` / ``start()`` と ``Safety`` は、Databricks
以外でも使える。ただし OSS のサーバーが自動で採点するのは ``gateway:/`` のジャッジだけで
(``judge_endpoint.py``)、それ以外は ``runs="client"`` になり、``run_scoring_cycle()`` で採点する。
Databricks では、すべて Databricks が採点する(``pip install databricks-agents`` が必要)。
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import (
    Guidelines,
    RelevanceToQuery,
    RetrievalGroundedness,
    Safety,
    Scorer,
    ScorerSamplingConfig,
    get_scorer,
)

Backend = Literal["databricks", "oss_http", "oss_local"]
Runs = Literal["server", "client", "databricks"]

FINISHED_TRACES = "status = 'OK'"  # 失敗したトレースには出力がなく、採点してもエラーになるだけ
DEFAULT_JUDGE = "openai:/gpt-4.1-mini"
JUDGE_ENDPOINT = "judge"
SETTING_TAG = "quality.scorer."  # クライアントで採点するものと、休止中のものの設定を残す
_PROVIDER_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


class ScorerSetupError(Exception):
    """スコアラーを登録・開始できない。"""


@dataclass(frozen=True, kw_only=True)
class ScorerPlan:
    """どのスコアラーを、何割のトレースに使うか。"""

    scorer: Scorer
    sample_rate: float = 1.0
    filter_string: str | None = FINISHED_TRACES


@dataclass(frozen=True, kw_only=True)
class ScorerStatus:
    """登録の結果。``run_scoring_cycle()`` にそのまま渡せる。"""

    name: str
    scorer: Scorer
    registered: bool
    runs: Runs  # client なら run_scoring_cycle() を定期的に呼ぶ
    sample_rate: float
    filter_string: str | None
    reason: str  # なぜそこで採点するのか、採点に何が要るのか(英語)

    @property
    def version(self) -> int | None:
        """登録された版。登録していなければ ``None``。"""
        return self.scorer.scorer_version


@dataclass(frozen=True)
class KeptSetting:
    """エクスペリメントのタグに覚えておく、割合とフィルター(休止しても消えない)。"""

    sample_rate: float
    filter_string: str | None
    paused: bool = False


def detect_backend() -> Backend:
    """接続先の種類を、MLflow の tracking URI から判断する。"""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("databricks"):
        return "databricks"
    return "oss_http" if uri.startswith("http") else "oss_local"


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
        safety_sample_rate: 安全性を採点する割合(0 より大きく 1 以下)。ほかは ``quality_...``。
        custom_guidelines: 自然言語の採点基準(1 つでも複数でもよい)。
        judge_model: 省略の仕方は ``resolve_judge_model()``。
        filter_string: 採点の対象にするトレース。``extra``: 追加のスコアラー。
        create_judge_endpoint: サーバーに接続先がなければ、``OPENAI_API_KEY`` を保存して作る。
        tracking_uri: MLflow の接続先。省略すると環境変数か、手元の SQLite。

    Raises:
        ScorerSetupError: 割合が範囲外、サーバーが断った、など。
    """
    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    model = resolve_judge_model(judge_model, create_judge_endpoint=create_judge_endpoint)
    safety, *quality = _judges(model, custom_guidelines)
    rated = [(safety, safety_sample_rate), *((judge, quality_sample_rate) for judge in quality)]
    plans = [ScorerPlan(scorer=s, sample_rate=r, filter_string=filter_string) for s, r in rated]
    return setup_scorers(experiment_name, [*plans, *extra])


def _judges(model: str | None, custom_guidelines: str | Sequence[str] | None) -> list[Scorer]:
    guidelines = [_guidelines(custom_guidelines, model)] if custom_guidelines else []
    return [
        Safety(name="safety_check", model=model),
        RelevanceToQuery(name="relevance_check", model=model),
        RetrievalGroundedness(name="groundedness_check", model=model),
        *guidelines,
    ]


def setup_builtin_scorers(
    experiment_name: str,
    safety_sample_rate: float = 1.0,
    quality_sample_rate: float = 0.5,
    *,
    judge_model: str | None = None,
) -> list[ScorerStatus]:
    """組み込みのスコアラー(安全性、関連性、根拠)だけを登録し、開始する。"""
    rates = (safety_sample_rate, quality_sample_rate)
    return setup_quality_scorers(experiment_name, *rates, judge_model=judge_model)


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


def setup_scorers(experiment_name: str, plans: Sequence[ScorerPlan]) -> list[ScorerStatus]:
    """任意のスコアラーを登録し、接続先に合わせて開始する。"""
    for plan in plans:
        check_sample_rate(plan.scorer.name, plan.sample_rate)
    names = [plan.scorer.name for plan in plans]
    if len(set(names)) != len(names):
        raise ScorerSetupError(f"scorer names must be unique, got {names}")
    try:
        experiment_id = _experiment_id(experiment_name)
        return [_setup_one(plan, experiment_id) for plan in plans]
    except MlflowException as error:
        raise ScorerSetupError(f"{mlflow.get_tracking_uri()}: {error.message}") from error


def check_sample_rate(name: str, rate: object) -> float:
    """割合が 0 より大きく 1 以下の数であることを確かめる(MLflow は真偽値や 5.0 も受け入れる)。"""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise ScorerSetupError(
            f"sample_rate of {name!r} must be in (0, 1] (or pause), got {rate!r}"
        )
    return float(rate)


def resolve_judge_model(
    judge_model: str | None = None, *, create_judge_endpoint: bool = False
) -> str | None:
    """使うジャッジのモデル。Databricks では ``None``(用意されたジャッジ)。

    省くと、``MLFLOW_GENAI_JUDGE_DEFAULT_MODEL``、サーバーの接続先 ``judge``、既定の順。
    """
    backend = detect_backend()
    if backend == "databricks" or judge_model:
        return judge_model
    if override := os.environ.get("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"):
        return override
    if backend == "oss_http":
        return _server_judge(create_judge_endpoint) or DEFAULT_JUDGE
    return DEFAULT_JUDGE


def _server_judge(create: bool) -> str | None:
    from chapter8_samples.quality_monitoring.scoring.judge_endpoint import (
        JudgeEndpointError,
        ensure_judge_endpoint,
        judge_endpoint_exists,
    )

    key, base = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    try:
        if judge_endpoint_exists(JUDGE_ENDPOINT):
            return f"gateway:/{JUDGE_ENDPOINT}"
        if create and not key:
            raise ScorerSetupError("create_judge_endpoint=True needs OPENAI_API_KEY")
        if create and key:
            return ensure_judge_endpoint(JUDGE_ENDPOINT, api_key=key, api_base=base)
    except JudgeEndpointError as error:
        raise ScorerSetupError(str(error)) from error
    return None


def _experiment_id(name: str) -> str:
    client = MlflowClient()
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _setup_one(plan: ScorerPlan, experiment_id: str) -> ScorerStatus:
    runs, reason = who_runs(plan.scorer)
    if runs == "client":
        check_filter(experiment_id, plan.filter_string)
    registered = not (runs == "client" and is_custom_code(plan.scorer))
    scorer = _register(plan.scorer, experiment_id) if registered else plan.scorer
    kept = kept_setting(experiment_id, scorer.name)
    paused = kept is not None and kept.paused
    setting = KeptSetting(plan.sample_rate, plan.filter_string, paused)
    if runs == "client" or paused:  # 運用者が休止したものを、デプロイのたびに再開しない
        keep_setting(experiment_id, scorer.name, setting)
    else:
        scorer = set_sampling(scorer, experiment_id, plan.sample_rate, plan.filter_string)
        if kept is not None:  # 前はクライアントで採点していた
            keep_setting(experiment_id, scorer.name, None)
    return ScorerStatus(
        name=scorer.name,
        scorer=scorer,
        registered=registered,
        runs=runs,
        sample_rate=0.0 if paused else plan.sample_rate,
        filter_string=plan.filter_string,
        reason="paused: call resume_scorer()" if paused else reason,
    )


def kept_setting(experiment_id: str, name: str) -> KeptSetting | None:
    """覚えておいた割合とフィルター。なければ ``None``。"""
    tags = MlflowClient().get_experiment(experiment_id).tags
    text = tags.get(_tag(name))
    return KeptSetting(**json.loads(text)) if text else None


def keep_setting(experiment_id: str, name: str, setting: KeptSetting | None) -> None:
    """割合とフィルターを覚える。``None`` なら忘れる。"""
    value = json.dumps(asdict(setting)) if setting else ""
    MlflowClient().set_experiment_tag(experiment_id, _tag(name), value)


def _tag(name: str) -> str:
    # スコアラーの名前には使えても、タグの名前には使えない文字がある
    return SETTING_TAG + re.sub(r"[^\w.\- :/]", lambda found: f"_{ord(found[0]):x}", name)


def check_filter(experiment_id: str, filter_string: str | None) -> None:
    """フィルターの誤りを、採点を始める前に知らせる(サーバーの採点では、サーバーが調べる)。"""
    MlflowClient().search_traces(
        locations=[experiment_id], filter_string=filter_string, max_results=1, include_spans=False
    )


def who_runs(scorer: Scorer) -> tuple[Runs, str]:
    """このスコアラーを誰が採点するかと、その理由。"""
    backend = detect_backend()
    if backend == "databricks":
        return "databricks", "Databricks scores the sampled traces"
    how = "call run_scoring_cycle() from a scheduler"
    if scorer.is_session_level_scorer:
        how = "it scores whole sessions: pass their traces to mlflow.genai.evaluate()"
    if is_custom_code(scorer):
        return "client", (
            "custom code stays on the client: the open-source server would execute it, and one "
            f"registered code scorer breaks list_scorers() for everyone; {how}"
        )
    model = str(getattr(scorer, "model", None) or "")
    if backend == "oss_http" and model.startswith("gateway:/"):
        return "server", (
            "the MLflow server scores about once a minute "
            "(its MLFLOW_SERVER_ENABLE_JOB_EXECUTION must not be false)"
        )
    key = _PROVIDER_KEYS.get(model.partition(":")[0], "")
    missing = f"; it needs {key} to call {model}" if key and not os.environ.get(key) else ""
    return "client", f"{how}{missing}"


def is_custom_code(scorer: Scorer) -> bool:
    """``@scorer`` の関数(登録すると、ソースコードがサーバーで実行される)か、自作のクラスか。"""
    return scorer.kind.value in {"decorator", "class"}


def find_scorer(name: str, experiment_id: str) -> Scorer | None:
    """登録済みのスコアラー。なければ ``None``。"""
    try:
        return get_scorer(name=name, experiment_id=experiment_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _register(scorer: Scorer, experiment_id: str) -> Scorer:
    found = find_scorer(scorer.name, experiment_id)
    if found is not None and _definition(found) == _definition(scorer):
        return found
    return scorer.register(experiment_id=experiment_id)


def _definition(scorer: Scorer) -> dict[str, Any]:
    dump: dict[str, Any] = scorer.model_dump()  # pyright: ignore[reportUnknownMemberType]
    builtin: dict[str, Any] = dict(dump.get("builtin_scorer_pydantic_data") or {})
    # もとは集合なので、プロセスごとに並び順が変わる
    builtin["required_columns"] = sorted(builtin.get("required_columns") or [])
    return {**dump, "builtin_scorer_pydantic_data": builtin, "mlflow_version": None}


def set_sampling(
    scorer: Scorer, experiment_id: str, sample_rate: float, filter_string: str | None
) -> Scorer:
    """割合とフィルターを合わせる。止まっていれば ``start()``、動いていれば ``update()`` を使う。"""
    if (scorer.sample_rate, scorer.filter_string or None) == (sample_rate, filter_string):
        return scorer
    # 必ず両方を渡す。渡さなかったフィルターは、OSS 版では消え、Databricks では残る
    unset = "" if scorer.filter_string and detect_backend() == "databricks" else None
    config = ScorerSamplingConfig(sample_rate=sample_rate, filter_string=filter_string or unset)
    change = scorer.update if scorer.sample_rate else scorer.start
    return change(experiment_id=experiment_id, sampling_config=config)


def evaluate_with_scorers(
    eval_data: Sequence[dict[str, Any]], statuses: Sequence[ScorerStatus]
) -> dict[str, float]:
    """本番と同じスコアラーで ``inputs`` と ``outputs`` の行を評価し、平均を返す。"""
    from mlflow.genai import evaluate  # pyright: ignore[reportUnknownVariableType]

    from chapter8_samples.quality_monitoring.scoring.plan import require_judges

    require_judges([status.scorer for status in statuses])  # evaluate() は黙って空を返す
    result = evaluate(data=list(eval_data), scorers=[status.scorer for status in statuses])
    return {name: float(value) for name, value in result.metrics.items()}


def main() -> None:
    """サンプルを実行する。"""
    from collections import Counter

    from mlflow.entities import Document, SpanType

    from chapter8_samples import _lab
    from chapter8_samples.quality_monitoring.scoring.cycle import run_scoring_cycle

    @mlflow.trace(span_type=SpanType.RETRIEVER)
    def search(question: str) -> list[Document]:
        return [Document(page_content=f"{question}は購入から 30 日以内に承ります。")]

    @mlflow.trace
    def answer(question: str) -> str:
        return search(question)[0].page_content

    with _lab.sample("ch8-scorer-setup", llm=True):
        polite = "回答は丁寧な言葉づかいである"
        print("登録したスコアラー")
        for s in setup_quality_scorers("ch8-scorer-setup", custom_guidelines=polite):
            print(f"  {s.name:18} {s.sample_rate * 100:4.0f}%  版 {s.version}  採点: {s.runs}")
        again = setup_quality_scorers("ch8-scorer-setup", custom_guidelines=polite)
        print("もう一度呼んだあとの版:", ", ".join(str(s.version) for s in again))
        for i in range(10):
            answer(f"注文 {i} の返品")
        report = run_scoring_cycle("ch8-scorer-setup", again)
        print(f"採点した結果({report.traces} トレース)")
        traces = MlflowClient().search_traces(locations=[report.experiment_id])
        found = [a for trace in traces for a in trace.info.assessments]
        counts = Counter((a.name, str(a.feedback.value)) for a in found if a.feedback)
        for s in again:
            values = [f" {value} {n}" for (name, value), n in counts.items() if name == s.name]
            print(f"  {s.name:18}", ", ".join(values))


if __name__ == "__main__":
    main()
