"""任意のエクスペリメントの健全性レポート。

``python -m chapter8_samples report --experiment NAME --since 24h -o FILE`` の中身。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from mlflow.entities import TraceInfo

from chapter8_samples.alerting import AlertConfig, AlertConfigError, AlertRule, load_config
from chapter8_samples.alerting.metrics.source import TraceSearch
from chapter8_samples.cost_tracking.usage.reader import iter_traces

from . import health
from .incidents import Event, journal_events, recorded_alerts, replayed_alerts
from .page import write_report
from .sections import Limit, Subject, cards, sections

QUALITY_FLOOR = 0.8
"""ルールにない合格率のしきい値。"""
DAY = timedelta(days=1)


class EmptyExperimentError(LookupError):
    """期間の中にトレースがない。"""


class ReportInputError(ValueError):
    """渡されたファイルを読めない。文面は日本語。"""


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """レポートの対象。"""

    experiment: str
    since: datetime
    tracking_uri: str
    alerts: Path | None = None
    """しきい値にするルール(8.4 の YAML)。省略すると標準のルール。"""
    alert_state: Path | None = None
    models: Sequence[str] = ()
    """ロールバックの記録を並べる登録済みモデル。プロンプトはトレースから分かる。"""


def write_experiment_report(path: Path, request: ReportRequest) -> tuple[Path, int]:
    """レポートを書き、そのパスとトレースの数を返す。

    Raises:
        MetricSourceError: エクスペリメントがない、接続できない。
        EmptyExperimentError: 期間の中にトレースがない。
        ReportInputError: ルールか状態ファイルを読めない。
    """
    config = _config(request.alerts)
    search = TraceSearch(request.experiment, request.tracking_uri)
    ended = datetime.now(timezone.utc)
    infos = [trace.info for trace in iter_traces(search.experiment_id, request.since, ended)]
    if not infos:
        raise EmptyExperimentError(request.experiment)
    subject, notes = _subject(request, config, search, infos, ended)
    written = write_report(
        path,
        title="LLM アプリケーション健全性レポート",
        subtitle=_subtitle(request, infos, ended),
        cards=cards(subject),
        sections=sections(subject),
        notes=[_about_limits(request), *notes, _about_links(request.tracking_uri)],
    )
    return written, len(infos)


def _config(path: Path | None) -> AlertConfig:
    try:
        return load_config(path) if path else AlertConfig.default()
    except AlertConfigError as error:
        problems = "\n".join(f"  - {problem}" for problem in error.problems)
        raise ReportInputError(f"アラートの設定 {path} に誤りがあります。\n{problems}") from error


def _subject(
    request: ReportRequest,
    config: AlertConfig,
    search: TraceSearch,
    infos: Sequence[TraceInfo],
    ended: datetime,
) -> tuple[Subject, list[str]]:
    first_ms = infos[0].request_time
    started = datetime.fromtimestamp(first_ms / 1000, timezone.utc)
    history = health.points(infos, first_ms)
    alerts, problems = _alerts(request, config, history)
    prompts = {name for point in history for name in point.prompts}
    events = [*alerts, *journal_events(prompts, request.models)]
    subject = Subject(
        started=started,
        history=history,
        limits=limits_of(config),
        events=sorted(event for event in events if started <= event.at <= ended),
        trace_url=search.trace_url,
        days=_days(request.since, started, ended),
    )
    return subject, [f"計算できないルール: {problem}" for problem in problems]


def _alerts(
    request: ReportRequest, config: AlertConfig, history: Sequence[health.Point]
) -> tuple[list[Event], list[str]]:
    rows = [point.row for point in history]
    if request.alert_state:
        try:
            return recorded_alerts(config, request.alert_state, rows), []
        except (OSError, ValueError) as error:
            text = f"アラートの状態ファイル {request.alert_state} を読めません({error})。"
            raise ReportInputError(text) from error
    return replayed_alerts(config, rows)


def limits_of(config: AlertConfig) -> Mapping[str, Limit]:
    """ルールの指標ごとのしきい値(前の期間との比を除く)。合格率には、既定の下限を加える。"""
    rules = [r for r in config.rules if isinstance(r, AlertRule) and r.compare is None]
    found = {rule.metric: Limit(rule.op, rule.threshold) for rule in rules}
    return {"pass_rate": Limit("<", QUALITY_FLOOR), **found}


def _days(since: datetime, started: datetime, ended: datetime) -> float:
    """コストを割る日数: アクセスのあった期間。ただし、期間が 1 日以上なら 1 日を下回らない。"""
    return max(ended - max(since, started), min(ended - since, DAY)) / DAY


def _subtitle(request: ReportRequest, infos: Sequence[TraceInfo], ended: datetime) -> str:
    first = datetime.fromtimestamp(infos[0].request_time / 1000).astimezone()
    last = datetime.fromtimestamp(infos[-1].request_time / 1000).astimezone()
    return (
        f"{request.experiment}: {request.since.astimezone():%Y-%m-%d %H:%M} から "
        f"{ended.astimezone():%Y-%m-%d %H:%M %Z}"
        f"(最初のトレース {first:%m/%d %H:%M:%S}、最後 {last:%m/%d %H:%M:%S})"
    )


def _about_limits(request: ReportRequest) -> str:
    source = request.alerts.name if request.alerts else "標準のルール(AlertConfig.default())"
    alerts = "状態ファイルの記録" if request.alert_state else "トレースにルールを適用した結果"
    return (
        f"しきい値は{source}、ルールにない合格率は {QUALITY_FLOOR:.0%} 以上。"
        f"アラートは{alerts}です。件数・割合・コストは、サンプリングの重みで補正しています。"
    )


def _about_links(uri: str) -> str:
    if uri.startswith(("http://", "https://")):
        return "トレース ID を押すと、MLflow の画面で開きます。"
    return (
        "MLflow サーバーを起動し、その URL を --tracking-uri に渡して作り直すと、"
        "トレース ID から MLflow の画面を開けます。"
    )
