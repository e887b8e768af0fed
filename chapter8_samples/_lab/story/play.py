"""章の全体を 1 つのシナリオとして動かす: ``python -m chapter8_samples``。

お客様窓口のボットを本番に出し、悪いプロンプトのリリースで遅く・高く・根拠がなくなり、
アラートが気づき、ロールバックして回復するまでを、5 つのフォルダーの公開関数だけで再現する。
本番の数分を数秒に縮めるため、アラートの集計期間だけを短くしてある。
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
import mlflow.genai
from mlflow.genai.scorers import RetrievalGroundedness
from openai import OpenAI

from chapter8_samples.alerting import (
    Alert,
    AlertConfig,
    AlertRule,
    AlertSeverity,
    AlertStatus,
    ConsoleNotificationHandler,
    GateRefusedError,
    MultiChannelNotifier,
    PagerDutyNotificationHandler,
    PromptRollbackManager,
    SlackNotificationHandler,
    auto_rollback,
    setup_alerting,
)
from chapter8_samples.cost_tracking import CostCalculator, price_trace, setup_cost_tracking
from chapter8_samples.cost_tracking.usage.reader import iter_traces
from chapter8_samples.opentelemetry import disable_otlp_export, flush_all, setup_otlp_export
from chapter8_samples.production_tracing import (
    enable_autologging,
    flush_traces,
    reset_production_tracing,
    setup_production_tracing,
)
from chapter8_samples.quality_monitoring import (
    ReleaseComparison,
    compare_releases,
    log_thumbs_feedback,
    run_scoring_cycle,
    setup_quality_scorers,
)

from ..console import Step, check, table
from ..report.incidents import Event
from ..report.sections import Limit
from ..servers.receivers import OtlpReceiver, WebhookReceiver
from ..shop.documents import load_questions
from ..shop.operations import JUDGE_MODEL, QUALITY, QUALITY_FLOOR, quality_rule
from ..shop.support_bot import (
    PROMPT_ALIAS,
    PROMPT_NAME,
    Prompt,
    SupportBot,
    register_releases,
)
from ..shop.traffic import Traffic, Visit
from .report import write_story_report

EXPERIMENT, SERVICE, VERSION = "/production/support-bot", "support-bot", "1.4.0"
CHECKED_ALIAS = "checked"
SLOW_RULE, SLOW_MS, COST_CEILING_USD = "slow_p95", 350.0, 0.00012
NORMAL, INCIDENT, RECOVERY = 48, 32, 40
GATE_QUESTIONS = 6  # 全部合格から全部不合格への低下は、5 問で分かる
# 本番の集計期間は 5 分や 1 時間。標本数の下限は、混んだ機械(1 件に 2.5 秒)でも届く数にしてある
WINDOW_SECONDS, MIN_SAMPLES = 4, 6


def alert_config() -> AlertConfig:
    """シナリオのアラート。人を呼ぶのは根拠のない答えだけで、遅さとコストは警告に留める。"""
    warnings = [
        AlertRule(
            name=name,
            metric=metric,
            window=timedelta(seconds=WINDOW_SECONDS),
            op=">",
            threshold=threshold,
            min_samples=MIN_SAMPLES,
            severity="warning",
            summary=summary,
        )
        for name, metric, threshold, summary in (
            (SLOW_RULE, "latency_p95_ms", SLOW_MS, "応答が遅くなっています"),
            ("expensive", "cost_usd_per_request", COST_CEILING_USD, "1 件のコストが増えています"),
        )
    ]
    rules = (quality_rule(WINDOW_SECONDS, MIN_SAMPLES), *warnings)
    return AlertConfig(experiment=EXPERIMENT, rules=rules, offset="0s")


@dataclass
class Story:
    """シナリオで使う部品と、これまでに起きたこと。``steps()`` を順に実行する。"""

    otlp: OtlpReceiver
    slack: WebhookReceiver
    pagerduty: WebhookReceiver
    report_path: Path
    visits: list[Visit] = field(default_factory=list[Visit])
    alerts: list[Alert] = field(default_factory=list[Alert])
    feedback_count: int = 0
    cost_usd: Decimal = Decimal(0)
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    events: list[Event] = field(default_factory=list[Event])

    def steps(self) -> list[Step]:
        """手順の一覧(節、題、関数)。"""
        return [
            Step("8.1", "本番トレーシングを設定する", self.set_up_tracing),
            Step("8.2", "コストの自動計算を始める", self.set_up_costs),
            Step("8.5", "OTLP へも同時に送る", self.set_up_otlp),
            Step("8.3", "スコアラーを登録する", self.set_up_scorers),
            Step("8.4", "アラートと通知先を用意する", self.set_up_alerts),
            Step("8.1", "平常時の問い合わせに答える", self.normal_traffic),
            Step("8.3", "答えを採点し、評価を受け取る", self.score_normal_traffic),
            Step("8.4", "平常時に鳴らないことを確かめる", self.stay_quiet),
            Step("8.4", "悪いプロンプトをリリースする", self.release_bad_prompt),
            Step("8.4", "アラートが気づき、1 回だけ知らせる", self.notice),
            Step("8.4", "プロンプトを元の版に戻す", self.roll_back),
            Step("8.4", "回復を確かめ、アラートを閉じる", self.recover),
            Step("8.1", "1 件も失っていないことを確かめる", self.reconcile_counts),
            Step("8.2", "コストを計算し直して照合する", self.reconcile_costs),
            Step("8.5", "OTLP の受信側と照合する", self.reconcile_otlp),
            Step("8.3", "昇格前に検査すれば、悪い版は止まる", self.gate_bad_prompt),
            Step("全体", "健全性レポートを書く", self.write_report),
        ]

    # 設定 ------------------------------------------------------------------

    def set_up_tracing(self) -> str:
        status = setup_production_tracing(
            EXPERIMENT, SERVICE, service_version=VERSION, environment="production"
        )
        self.experiment_id = status.experiment_id
        check("自動トレース", enable_autologging(["openai"]), ["openai"])
        return f"{status.backend} / プロファイル {status.export_profile}"

    def set_up_costs(self) -> str:
        self.calculator = CostCalculator()
        setup_cost_tracking(self.calculator)
        price = self.calculator.calculate(
            model="gpt-4o-mini", input_tokens=1_000_000, output_tokens=0
        )
        return f"gpt-4o-mini は入力 100 万トークンで ${price:.2f}"

    def set_up_otlp(self) -> str:
        status = setup_otlp_export(self.otlp.grpc_endpoint, SERVICE, mode="dual")
        return f"{status.mode} / {status.protocol}"

    def set_up_scorers(self) -> str:
        self.scorers = setup_quality_scorers(
            EXPERIMENT, safety_sample_rate=1.0, quality_sample_rate=1.0, judge_model=JUDGE_MODEL
        )
        return "、".join(f"{scorer.name} {scorer.sample_rate:.0%}" for scorer in self.scorers)

    def set_up_alerts(self) -> str:
        self.warnings: list[str] = []
        notifier = MultiChannelNotifier()
        notifier.add_handler("slack", SlackNotificationHandler(f"{self.slack.url}/services/T/B/X"))
        notifier.add_handler(
            "pagerduty", PagerDutyNotificationHandler("0" * 32, base_url=self.pagerduty.url)
        )
        notifier.add_handler("log", ConsoleNotificationHandler(self.warnings.append))
        notifier.set_severity_routing({"critical": ["slack", "pagerduty"], "warning": ["log"]})
        config = alert_config()
        self.engine = setup_alerting(EXPERIMENT, config, notifier)
        good, self.bad_version = register_releases()
        self.good_version = good
        self.releases = PromptRollbackManager(PROMPT_NAME)
        self.releases.promote(good, reason="最初のリリース")
        self.traffic = Traffic(
            SupportBot(OpenAI()), environment="production", service_version=VERSION
        )
        return f"ルール {len(config.rules)} 件、通知先 Slack と PagerDuty"

    # 平常時 ----------------------------------------------------------------

    def normal_traffic(self) -> str:
        visits = self._send(NORMAL)
        check("答えられなかった件数", sum(visit.answer is None for visit in visits), 0)
        users = {visit.user_id for visit in visits}
        return f"{len(visits)} 件、ユーザー {len(users)} 人"

    def score_normal_traffic(self) -> str:
        rates = self._score_and_listen(self.visits)
        check(f"{QUALITY} の合格率", rates >= QUALITY_FLOOR, True)
        return f"根拠あり {rates:.0%}、フィードバック {self.feedback_count} 件"

    def stay_quiet(self) -> str:
        self._evaluate()
        paging = [alert for alert in self.alerts if alert.severity is AlertSeverity.CRITICAL]
        check("呼び出しのアラート", paging, [])
        check("Slack の通知", len(self.slack.received), 0)
        self.slow_machine = SLOW_RULE in self._firing()
        return "担当者の呼び出し 0 件"

    # 事故 ------------------------------------------------------------------

    def release_bad_prompt(self) -> str:
        self.releases.promote(self.bad_version, reason="もっと詳しい案内に変更")
        self._note(f"v{self.bad_version} をリリース", "release", "もっと詳しい案内に変更")
        visits = self._send(INCIDENT)
        return f"v{self.bad_version} で {len(visits)} 件に回答"

    def notice(self) -> str:
        rate = self._score_and_listen(self.visits[-INCIDENT:])
        self._evaluate()
        self.alert = self._only_page(AlertStatus.FIRING)
        self._note("アラート", "alert", f"{self.alert.summary}({_share(self.alert)})")
        check("Slack の通知", len(self.slack.received), 1)
        check("PagerDuty の trigger", self._pagerduty_actions(), ["trigger"])
        return f"根拠あり {rate:.0%}、Slack 1 件、PagerDuty 1 件、警告 {len(self.warnings)} 件"

    def roll_back(self) -> str:
        decision = auto_rollback(self.alert, self.releases, mode="apply")
        change = decision.change
        check("自動ロールバック", (decision.outcome, change is not None), ("applied", True))
        assert change is not None
        move = f"v{change.from_version} から v{change.to_version} へ"
        self._note("ロールバック", "rollback", f"{move}({change.reason})")
        check("エイリアスが指す版", self._alias_version(), self.good_version)
        return move

    def recover(self) -> str:
        self._send(RECOVERY)
        rate = self._score_and_listen(self.visits[-RECOVERY:])
        self._evaluate()
        resolved = self._only_page(AlertStatus.RESOLVED)
        self._note("解消", "resolved", _share(resolved))
        check("Slack の通知", len(self.slack.received), 2)
        check("PagerDuty の記録", self._pagerduty_actions(), ["trigger", "resolve"])
        check("発報中のアラート", self.still_firing(), [])
        return f"根拠あり {rate:.0%}、通知は発報 1 件と解消 1 件"

    def still_firing(self) -> list[str]:
        """まだ鳴っているアラート。リリースの前から鳴っていた遅さの警告は、機械のせいなので除く。"""
        return [name for name in self._firing() if not (name == SLOW_RULE and self.slow_machine)]

    def _firing(self) -> list[str]:
        return [alert.name for alert in self.engine.active()]

    # 照合 ------------------------------------------------------------------

    def reconcile_counts(self) -> str:
        check("フラッシュ", flush_traces(30).ok, True)
        stored = {trace.info.trace_id for trace in iter_traces(self.experiment_id, self.started)}
        check("送った件数と保存された件数", len(stored), len(self.visits))
        check("トレース ID", stored, {visit.trace_id for visit in self.visits})
        sessions = mlflow.search_sessions(locations=[self.experiment_id], max_results=100)
        return f"{len(stored)} 件送信 = {len(stored)} 件保存、会話 {len(sessions)} 件"

    def reconcile_costs(self) -> str:
        stored = Decimal(0)
        for visit in self.visits:
            trace = mlflow.get_trace(visit.trace_id)
            assert trace is not None
            cost = price_trace(trace, self.calculator)
            check(f"{visit.trace_id} の価格", cost.complete, True)
            self.cost_usd += cost.total_usd
            stored += Decimal(repr((trace.info.cost or {}).get("total_cost", 0.0)))
        check("計算し直したコスト", round(self.cost_usd, 9), round(stored, 9))
        return f"合計 ${self.cost_usd:.6f}(保存された値と一致)"

    def reconcile_otlp(self) -> str:
        check("OTLP に渡したスパンがすべて届いた", flush_all(30).complete, True)
        roots = [span.trace_id for span in self.otlp.spans if not span.parent_span_id]
        sent = sorted(visit.trace_id.removeprefix("tr-") for visit in self.visits)
        check("OTLP のルートスパン", sorted(roots), sent)
        return f"ルートスパン {len(roots)} 件、ID はすべて一致(スパン {len(self.otlp.spans)} 件)"

    def gate_bad_prompt(self) -> str:
        """本番とは別のエイリアスとエクスペリメントで、同じ 2 つの版を、昇格の前に比べる。"""

        def gate(candidate_uri: str) -> ReleaseComparison:
            with quiet():
                return compare_releases(
                    [question.question for question in load_questions()[:GATE_QUESTIONS]],
                    release(self.good_version).answer,
                    release(candidate_uri.rpartition("/")[2]).answer,
                    [RetrievalGroundedness(name=QUALITY, model=JUDGE_MODEL)],
                    experiment_name=f"{EXPERIMENT}-evaluation",
                )

        manager = PromptRollbackManager(PROMPT_NAME, gate=gate)
        manager.promote(self.good_version, alias=CHECKED_ALIAS)
        try:
            manager.promote(self.bad_version, alias=CHECKED_ALIAS)
        except GateRefusedError as error:
            refused = str(error)
        else:
            refused = ""
        check("悪い版の昇格を拒んだ理由", f"{QUALITY}: worse" in refused, True)
        return f"v{self.bad_version} を拒否({refused.partition(' (')[2].partition(' on ')[0]})"

    def write_report(self) -> str:
        write_story_report(
            self.report_path,
            self.experiment_id,
            self.started,
            limits={
                "latency_p95_ms": Limit(">", SLOW_MS),
                "cost_usd_per_request": Limit(">", COST_CEILING_USD),
                f"pass_rate:{QUALITY}": Limit("<", QUALITY_FLOOR),
            },
            events=self.events,
            notifications=sorted(self._notifications()),
        )
        return self.report_path.name

    # 共通 ------------------------------------------------------------------

    def _note(self, label: str, kind: str, detail: str) -> None:
        """レポートの時間軸に、いま起きたことを加える。"""
        self.events.append(Event(datetime.now(timezone.utc), label, kind, detail))

    def _send(self, count: int) -> list[Visit]:
        visits = self.traffic.send(count)
        self.visits += visits
        flush_traces(30)  # 場面の切れ目で、採点の対象をそろえる
        return visits

    def _score_and_listen(self, visits: list[Visit]) -> float:
        """採点し、ユーザーの 👍/👎 を記録して、根拠ありの割合を返す。"""
        five_minutes = timedelta(minutes=5)
        run_scoring_cycle(EXPERIMENT, self.scorers, lookback=five_minutes, flush=False)
        for visit in visits[::4]:
            log_thumbs_feedback(visit.trace_id, visit.helpful, visit.user_id)
            self.feedback_count += 1
        wanted = {visit.trace_id for visit in visits}
        verdicts: list[bool] = []
        for trace in iter_traces(self.experiment_id, self.started):
            if trace.info.trace_id in wanted:
                for assessment in trace.info.assessments or []:
                    if assessment.name == QUALITY and assessment.feedback:
                        verdicts.append(assessment.feedback.value == "yes")
        check(f"{QUALITY} を採点した件数", len(verdicts), len(visits))
        return sum(verdicts) / len(verdicts)

    def _evaluate(self) -> None:
        """最後のアクセスの時点でルールを評価する(採点を待つあいだに集計期間から外れるため)。"""
        self.alerts += self.engine.evaluate(at=self.traffic.last_at)

    def _only_page(self, status: AlertStatus) -> Alert:
        pages = [
            alert
            for alert in self.alerts
            if alert.severity is AlertSeverity.CRITICAL and alert.status is status
        ]
        check(f"{status.value} の呼び出し", len(pages), 1)
        return pages[0]

    def _pagerduty_actions(self) -> list[Any]:
        events = [item.json for item in self.pagerduty.received if item.path == "/v2/enqueue"]
        check("dedup_key の種類", len({event["dedup_key"] for event in events}), 1)
        return [event["event_action"] for event in events]

    def _notifications(self) -> Iterator[list[str]]:
        """受信側に届いたもの(時刻、宛先、内容)。"""
        for item in self.slack.received:
            yield [f"{item.at.astimezone():%H:%M:%S}", "Slack", str(item.json["text"])]
        for item in self.pagerduty.received:
            summary = item.json.get("payload", {}).get("summary", "")
            text = f"{item.json['event_action']} {summary}".strip()
            yield [f"{item.at.astimezone():%H:%M:%S}", "PagerDuty", text]

    def _alias_version(self) -> str:
        version = mlflow.MlflowClient().get_prompt_version_by_alias(PROMPT_NAME, PROMPT_ALIAS)
        return str(version.version)

    def summary(self) -> str:
        """最後に見せる表。"""
        told = len(self.slack.received), len(self.pagerduty.received)
        rows = [
            ("8.1 トレース", f"{len(self.visits)} 件", "送信した件数と保存された件数が同じ"),
            ("8.2 コスト", f"${self.cost_usd:.6f}", "計算し直した額と保存された額が同じ"),
            ("8.3 フィードバック", f"{self.feedback_count} 件", "トレースに記録"),
            ("8.4 通知", f"Slack {told[0]} 件 / PagerDuty {told[1]} 件", "発報 1 回、解消 1 回"),
            ("8.5 OTLP", f"スパン {len(self.otlp.spans)} 件", "トレース ID が一致"),
        ]
        return table(["節", "結果", "確かめたこと"], rows)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """評価が画面に出す案内と進み具合を、手順の一覧に混ぜない。"""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def release(version: str) -> SupportBot:
    """1 つの版のプロンプトで答えるボット。"""
    text = mlflow.genai.load_prompt(f"prompts:/{PROMPT_NAME}/{version}").template
    return SupportBot(OpenAI(), prompt=lambda: Prompt(version, str(text)))


def _share(alert: Alert) -> str:
    return f"根拠のある答え {alert.value or 0:.0%}、しきい値 {QUALITY_FLOOR:.0%}、{alert.n} 件"


@contextlib.contextmanager
def cast(report_path: Path) -> Iterator[Story]:
    """相手役(OTLP の受信側、Slack と PagerDuty の代わり)を起動し、最後に終了する。"""
    with OtlpReceiver() as otlp, WebhookReceiver() as slack, WebhookReceiver() as pagerduty:
        try:
            yield Story(otlp, slack, pagerduty, report_path)
        finally:
            disable_otlp_export()
            reset_production_tracing()
