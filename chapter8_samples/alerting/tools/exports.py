"""8.4.4 同じルールを、Prometheus と Databricks の形で書き出す。

監視の基盤がすでにあるなら、評価はそちらに任せるほうがよい。ルールを二重に書かずに済むように、ここの
設定から相手の形を作る。書き出したものは、本物の promtool で検査している。

Databricks では ``to_databricks_alert`` で SQL アラートにする(``databricks-sdk`` が要る)。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..delivery import label_name
from ..metrics.exporter import FAILURES, Series
from ..rules import (
    AlertConfig,
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    Rule,
    format_duration,
)


def watched_series(config: AlertConfig) -> list[Series]:
    """書き出したルールが見る系列。``MetricsCollector`` に渡すと、それだけを公開する。"""
    return list(dict.fromkeys(series for rule in config.rules for series in series_of(rule)))


def series_of(rule: Rule) -> list[Series]:
    """一つのルールが見る系列。値(長い期間が先)、標本の数、偶然の揺れでないかの順。"""
    found = [
        Series(metric=metric, window=window, ago=rule.ago, by=rule.by)
        for metric, window in rule.queries()
    ]
    if rule.min_samples:
        found.append(replace(found[0], counts=True))
    if isinstance(rule, AlertRule) and rule.is_gated:
        found.append(replace(found[0], gate=rule.is_no_chance, rule=rule.name))
    return found


def expression(rule: Rule) -> str:
    """PromQL の条件式。二項検定は式にできないので、その結果も公開する。"""
    series = series_of(rule)
    limit = f"{rule.threshold * series[0].scale:g}"
    if isinstance(rule, BurnRateRule):
        long, short = (f"({one.selector()} > {limit})" for one in series[:2])
        found = f"{long} and on() {short}"
    else:
        found = f"{series[0].selector()} {rule.op} {limit}"
    if rule.min_samples:
        samples = next(one.selector() for one in series if one.counts)
        found = f"({found}) and ({samples} >= {rule.min_samples})"
    if series[-1].gate:
        found = f"({found}) and ignoring(rule) ({series[-1].selector()} == 1)"
    if rule.no_data == "alert":
        found = f"({found}) or absent({series[0].selector()})"
    return found


def to_prometheus_rules(config: AlertConfig, *, interval: str = "30s") -> dict[str, Any]:
    """Prometheus のルールファイル。

    指標を読めないことと、公開が止まったことも監視する。
    Prometheus にない ``clear_threshold`` は、アノテーションに残して知らせる。
    """
    rules = [_prometheus_rule(rule, expression(rule), config.labels) for rule in config.rules]
    broken = f"increase({FAILURES}[5m]) > 0 or absent({FAILURES})"
    rules.append(_prometheus_rule(config.watchdog, broken, config.labels))
    return {"groups": [{"name": "llm-app", "interval": interval, "rules": rules}]}


def _prometheus_rule(rule: Rule, expr: str, labels: Mapping[str, str]) -> dict[str, Any]:
    annotations = {"summary": _plain(rule.summary or rule.name), "value": "{{ $value }}"}
    if rule.runbook_url:
        annotations["runbook_url"] = _plain(rule.runbook_url)
    if getattr(rule, "clear_threshold", None) is not None:
        annotations["not_exported"] = "clear_threshold"
    own = {label_name(k): _plain(v) for k, v in {**labels, **rule.labels}.items()}
    made: dict[str, Any] = {
        "alert": rule.name,
        "expr": expr,
        "for": format_duration(rule.for_),
        "labels": {**own, "severity": str(rule.severity)},
        "annotations": annotations,
    }
    if format_duration(rule.keep_firing_for) != "0s":
        made["keep_firing_for"] = format_duration(rule.keep_firing_for)
    return made


def _plain(text: str) -> str:
    """Prometheus がテンプレートとして読まない形。"""
    return text.replace("{{", "{ {")


def to_databricks_alert(
    rule: Rule,
    *,
    query: str,
    warehouse_id: str,
    destination_ids: Sequence[str] = (),
) -> Any:
    """5 分ごとの Databricks の SQL アラート(v2)。

    ``WorkspaceClient().alerts_v2.create_alert(...)`` に渡す。

    Args:
        query: 列 ``value`` に指標の値を 1 行だけ返す SQL。
        destination_ids: 通知先の ID。

    Raises:
        AlertConfigError: 二つの期間を見る burn rate は、一つの SQL アラートにできない。
            ``destination_ids`` が列でなく、一つの文字列。
    """
    if isinstance(destination_ids, str):
        raise AlertConfigError([f"destination_ids must be a list, got {destination_ids!r}"])
    if not isinstance(rule, AlertRule):
        raise AlertConfigError(
            [f"rule {rule.name!r}: burn rates need two queries; export to Prometheus"]
        )
    from databricks.sdk.service import sql

    compare = {">": sql.ComparisonOperator.GREATER_THAN, "<": sql.ComparisonOperator.LESS_THAN}
    empty = {
        "ok": sql.AlertEvaluationState.OK,
        "keep": sql.AlertEvaluationState.UNKNOWN,
        "alert": sql.AlertEvaluationState.TRIGGERED,
    }
    value = sql.AlertV2OperandValue(double_value=float(rule.threshold))
    subscriptions = [sql.AlertV2Subscription(destination_id=i) for i in destination_ids]
    return sql.AlertV2(
        display_name=rule.name,
        query_text=query,
        warehouse_id=warehouse_id,
        custom_description=rule.summary,
        evaluation=sql.AlertV2Evaluation(
            source=sql.AlertV2OperandColumn(name="value"),
            comparison_operator=compare[rule.op],
            threshold=sql.AlertV2Operand(value=value),
            empty_result_state=empty[rule.no_data],
            notification=sql.AlertV2Notification(notify_on_ok=True, subscriptions=subscriptions),
        ),
        schedule=sql.CronSchedule(quartz_cron_schedule="0 */5 * * * ?", timezone_id="UTC"),
    )
