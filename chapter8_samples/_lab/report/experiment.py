"""任意のエクスペリメントの健全性レポート。

``python -m chapter8_samples report --experiment NAME --since 24h -o FILE`` の中身。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from mlflow.entities import TraceInfo

from chapter8_samples.alerting import AlertConfig, AlertConfigError, AlertRule, load_config
from chapter8_samples.alerting.metrics.source import TraceSearch
from chapter8_samples.cost_tracking.usage.reader import iter_traces

from . import health
from .incidents import journal_events, replayed_alerts
from .page import write_report
from .sections import Limit, Subject, cards, sections

QUALITY_FLOOR = 0.8
"""ルールにない合格率のしきい値。"""


class ReportInputError(ValueError):
    """レポートにするものがない、または読めない。文面は、直し方までの日本語。"""


def write_experiment_report(
    path: Path, experiment: str, since: datetime, alerts: Path | None = None
) -> int:
    """レポートを書き、トレースの数を返す。``alerts`` はしきい値にするルール(8.4 の YAML)。

    Raises:
        MetricSourceError: エクスペリメントがない、接続できない。
        ReportInputError: 期間の中にトレースがない、ルールを読めない。
    """
    config = _config(alerts)
    search = TraceSearch(experiment)
    ended = datetime.now(timezone.utc)
    infos = [trace.info for trace in iter_traces(search.experiment_id, since, ended)]
    period = f"{since.astimezone():%Y-%m-%d %H:%M} から {ended.astimezone():%Y-%m-%d %H:%M %Z}"
    if not infos:
        raise ReportInputError(
            f"{period}のトレースがありません。\n"
            "  -> --since で期間を長くするか、エクスペリメントの名前を確かめてください。"
        )
    subject, problems = _subject(config, search, infos)
    write_report(
        path,
        subtitle=f"{experiment}: {period}",
        cards=cards(subject),
        sections=sections(subject),
        notes=[_about_limits(alerts), *problems, _about_links(search)],
    )
    return len(infos)


def _subject(
    config: AlertConfig, search: TraceSearch, infos: Sequence[TraceInfo]
) -> tuple[Subject, list[str]]:
    started_ms = infos[0].request_time
    started = datetime.fromtimestamp(started_ms / 1000, timezone.utc)
    history = health.points(infos, started_ms)
    alerts, problems = replayed_alerts(config, [point.row for point in history])
    changes = journal_events({name for point in history for name in point.prompts})
    subject = Subject(
        started=started,
        history=history,
        limits=limits_of(config),
        events=sorted(event for event in [*alerts, *changes] if event.at >= started),
        trace_url=search.trace_url,
    )
    return subject, [f"計算できないルール: {problem}" for problem in problems]


def _config(path: Path | None) -> AlertConfig:
    try:
        return load_config(path) if path else AlertConfig.default()
    except AlertConfigError as error:
        problems = "\n".join(f"  - {problem}" for problem in error.problems)
        raise ReportInputError(
            f"アラートの設定 {path} に誤りがあります。\n{problems}\n"
            "  -> ファイルのパスと中身を直してください。"
        ) from error


def limits_of(config: AlertConfig) -> Mapping[str, Limit]:
    """ルールの指標ごとのしきい値(前の期間との比を除く)。合格率には、既定の下限を加える。"""
    found = {"pass_rate": Limit("<", QUALITY_FLOOR)}
    for rule in config.rules:
        if isinstance(rule, AlertRule) and rule.compare is None:
            found[rule.metric] = Limit(rule.op, rule.threshold)
    return found


def _about_limits(alerts: Path | None) -> str:
    source = alerts.name if alerts else "標準のルール(AlertConfig.default())"
    return (
        f"しきい値は{source}、ルールにない合格率は {QUALITY_FLOOR:.0%} 以上。"
        "アラートは、トレースにルールを適用した結果です。"
        "件数・割合・コストは、サンプリングの重みで補正しています。"
    )


def _about_links(search: TraceSearch) -> str:
    if search.trace_url(""):
        return "トレース ID を押すと、MLflow の画面で開きます。"
    return (
        "MLflow サーバーを起動し、その URL を MLFLOW_TRACKING_URI に設定して作り直すと、"
        "トレース ID から MLflow の画面を開けます。"
    )
