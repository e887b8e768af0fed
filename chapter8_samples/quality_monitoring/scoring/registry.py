"""8.3.4 スコアラーの登録、割合、休止を、接続先の違いを隠して読み書きする。

登録できるか、誰が採点するか、割合を変えるとフィルターが残るかは、手元の SQLite、MLflow サーバー、
Databricks で違う。クライアントで採点するものと休止中のものは、設定をエクスペリメントのタグに残す。
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Literal

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer, ScorerSamplingConfig, get_scorer

from .identity import definition
from .judges import (
    DEFAULT_JUDGE,
    JUDGE_PRICES,
    TOKENS_PER_CALL,
    JudgePrice,
    ScorerSetupError,
    judge_model,
    malformed,
    missing_for,
)
from .plan import ScorerPlan, check_sample_rate

Backend = Literal["databricks", "oss_http", "oss_local"]
Runs = Literal["server", "client", "databricks"]

_SETTING_TAG = "quality.scorer."
_setting_up = Lock()  # MLflow は、新しい SQLite を複数のスレッドから同時に作れない


class ScorerNotFoundError(ScorerSetupError):
    """その名前のスコアラー(またはエクスペリメント)がない。"""


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


def setup_scorers(experiment_name: str, plans: Sequence[ScorerPlan]) -> list[ScorerStatus]:
    """任意のスコアラーを登録し、接続先に合わせて開始する。何かを登録する前に、引数をすべて調べる。"""
    for plan in plans:
        if reason := malformed(judge_model(plan.scorer)):
            raise ScorerSetupError(f"{plan.name!r}: {reason}")
    names = [plan.name for plan in plans]
    if len(set(names)) != len(names):
        raise ScorerSetupError(f"scorer names must be unique, got {names}")
    try:
        with _setting_up:
            experiment_id = experiment_id_for(experiment_name)
            for filter_string in {plan.filter_string for plan in plans}:
                check_filter(experiment_id, filter_string)
            return [_setup_one(plan, experiment_id) for plan in plans]
    except MlflowException as error:
        raise ScorerSetupError(f"{mlflow.get_tracking_uri()}: {error.message}") from error


def estimate_monthly_judge_cost(
    traffic: float,
    rates: Mapping[str, float],
    judge_price: tuple[float, float] | JudgePrice = JUDGE_PRICES[DEFAULT_JUDGE],
) -> float:
    """1 か月のトレースの数 ``traffic`` と割合から、ジャッジのコスト(USD / 月)を見積もる。

    ``judge_price`` は、入力と出力の単価(USD / 100 万トークン)。
    """
    for number in (traffic, *judge_price):
        if not (math.isfinite(number) and number >= 0):
            raise ScorerSetupError(
                f"traffic and prices must be finite and not negative, got {number}"
            )
    for name, rate in rates.items():
        check_sample_rate(name, rate)
    calls = traffic * sum(rates.values())
    input_usd, output_usd = (float(price) for price in judge_price)
    input_tokens, output_tokens = TOKENS_PER_CALL
    return calls * (input_usd * input_tokens + output_usd * output_tokens) / 1_000_000


def existing_experiment_id(name: str) -> str:
    """エクスペリメントの ID。なければ ``ScorerNotFoundError``。"""
    found = MlflowClient().get_experiment_by_name(name)
    if found is None:
        raise ScorerNotFoundError(f"no experiment named {name!r}")
    return found.experiment_id


def experiment_id_for(name: str) -> str:
    """エクスペリメントの ID。なければ作る。"""
    client = MlflowClient()
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # ほかのプロセスが先に作った
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


def _setup_one(plan: ScorerPlan, experiment_id: str) -> ScorerStatus:
    on_client = who_runs(plan.scorer)[0] == "client"
    registered = not (on_client and is_custom_code(plan.scorer))
    scorer = _register(plan.scorer, experiment_id) if registered else plan.scorer
    kept = kept_setting(experiment_id, scorer.name)
    paused = kept is not None and kept.paused  # 運用者が休止したものを、デプロイのたびに再開しない
    setting = KeptSetting(plan.sample_rate, plan.filter_string, paused)
    return _status(apply_setting(experiment_id, scorer, setting), registered, setting)


def find_status(experiment_id: str, name: str) -> ScorerStatus | None:
    """スコアラー 1 つの状態。登録されていなければ ``None``。"""
    scorer = _find(name, experiment_id)
    return None if scorer is None else status_of(experiment_id, scorer)


def status_of(experiment_id: str, scorer: Scorer) -> ScorerStatus:
    """登録済みのスコアラーを誰が何割採点しているか(休止中の割合は 0.0)。"""
    setting = kept_setting(experiment_id, scorer.name)
    if setting is None or (scorer.sample_rate and who_runs(scorer)[0] != "client"):
        setting = KeptSetting(scorer.sample_rate or 0.0, scorer.filter_string or None)
    return _status(scorer, True, setting)


def _status(scorer: Scorer, registered: bool, setting: KeptSetting) -> ScorerStatus:
    runs, reason = who_runs(scorer)
    rate = 0.0 if setting.paused else setting.sample_rate
    return ScorerStatus(
        name=scorer.name,
        scorer=scorer,
        registered=registered,
        runs=runs,
        sample_rate=rate,
        filter_string=setting.filter_string,
        reason=reason if rate else "paused: call resume_scorer()",
    )


def apply_setting(experiment_id: str, scorer: Scorer, setting: KeptSetting) -> Scorer:
    """割合とフィルターを変える、休止する、再開する。"""
    on_client = who_runs(scorer)[0] == "client"
    if on_client or setting.paused:
        # 止める前に覚えておく(止めると、OSS 版では割合もフィルターも消える)
        keep_setting(experiment_id, scorer.name, setting)
        if not on_client and scorer.sample_rate:
            return scorer.stop(experiment_id=experiment_id)
        return scorer
    scorer = _set_sampling(scorer, experiment_id, setting)
    if kept_setting(experiment_id, scorer.name):  # 休止していた、前はクライアントで採点していた
        keep_setting(experiment_id, scorer.name, None)
    return scorer


def kept_setting(experiment_id: str, name: str) -> KeptSetting | None:
    """覚えておいた割合とフィルター。なければ ``None``。"""
    text = MlflowClient().get_experiment(experiment_id).tags.get(_tag(name))
    return KeptSetting(**json.loads(text)) if text else None


def keep_setting(experiment_id: str, name: str, setting: KeptSetting | None) -> None:
    """割合とフィルターを覚える。``None`` なら忘れる。"""
    value = json.dumps(asdict(setting)) if setting else ""
    MlflowClient().set_experiment_tag(experiment_id, _tag(name), value)


def _tag(name: str) -> str:
    # スコアラーの名前には使えても、タグの名前には使えない文字がある
    return _SETTING_TAG + re.sub(r"[^\w.\- :/]", lambda found: f"_{ord(found[0]):x}", name)


def check_filter(experiment_id: str, filter_string: str | None) -> None:
    """フィルターの誤りを、採点を始める前に知らせる(Databricks では、Databricks が調べる)。"""
    if filter_string and detect_backend() != "databricks":
        MlflowClient().search_traces(
            locations=[experiment_id],
            filter_string=filter_string,
            max_results=1,
            include_spans=False,
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
            "custom code stays on the client: an open-source server runs it only if its operator "
            "opted in (MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS; since 3.18 in a container), and one "
            f"registered code scorer breaks list_scorers() of clients without that flag; {how}"
        )
    model = judge_model(scorer) or ""
    if backend == "oss_http" and model.startswith("gateway:/"):
        return "server", (
            "the MLflow server scores about once a minute "
            "(its MLFLOW_SERVER_ENABLE_JOB_EXECUTION must not be false)"
        )
    missing = missing_for(model)
    return "client", f"{how}; {missing}" if missing else how


def is_custom_code(scorer: Scorer) -> bool:
    """``@scorer`` の関数(登録すると、ソースコードがサーバーで実行される)か、自作のクラスか。"""
    return scorer.kind.value in {"decorator", "class"}


def _find(name: str, experiment_id: str) -> Scorer | None:
    try:
        return get_scorer(name=name, experiment_id=experiment_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _register(scorer: Scorer, experiment_id: str) -> Scorer:
    found = _find(scorer.name, experiment_id)
    if found is not None and definition(found) == definition(scorer):
        return found
    return scorer.register(experiment_id=experiment_id)


def _set_sampling(scorer: Scorer, experiment_id: str, setting: KeptSetting) -> Scorer:
    rate, wanted = setting.sample_rate, setting.filter_string
    if (scorer.sample_rate, scorer.filter_string or None) == (rate, wanted):
        return scorer
    # 必ず両方を渡す。渡さなかったフィルターは、OSS 版では消え、Databricks では残る
    unset = "" if scorer.filter_string and detect_backend() == "databricks" else None
    config = ScorerSamplingConfig(sample_rate=rate, filter_string=wanted or unset)
    change = scorer.update if scorer.sample_rate else scorer.start
    return change(experiment_id=experiment_id, sampling_config=config)
