"""レポートに出す名前と値。評価と指標は、どの図と表でも 1 つの名前で呼ぶ。"""

from __future__ import annotations

from chapter8_samples.alerting.metrics.measures import RATE_METRICS

THUMBS = "user_thumbs"
_ASSESSMENTS = {
    THUMBS: ("ユーザーの高評価", "ユーザーの低評価"),
    "safety_check": ("安全な答え", "安全でない答え"),
    "relevance_check": ("質問に合った答え", "質問に合わない答え"),
    "groundedness_check": ("根拠のある答え", "根拠のない答え"),
}
_METRICS = {
    "trace_count": "リクエスト",
    "error_rate": "エラー率",
    "latency_p50_ms": "応答時間 p50",
    "latency_p95_ms": "応答時間 p95",
    "cost_usd_per_request": "1 件のコスト",
    "cost_usd_per_hour": "1 時間のコスト",
}


def assessment_name(assessment: str) -> str:
    """評価の名前。章のスコアラーでなければ、スコアラーの名前のまま。

    >>> assessment_name("groundedness_check"), assessment_name("tone")
    ('根拠のある答え', 'tone')
    """
    return _ASSESSMENTS.get(assessment, (assessment, ""))[0]


def problem_name(assessment: str) -> str:
    """不合格だった評価が示す問題。

    >>> problem_name("groundedness_check"), problem_name("tone")
    ('根拠のない答え', 'tone が不合格')
    """
    return _ASSESSMENTS.get(assessment, ("", f"{assessment} が不合格"))[1]


def metric_name(metric: str) -> str:
    """指標の名前。

    >>> metric_name("pass_rate:groundedness_check"), metric_name("latency_p95_ms")
    ('根拠のある答え', '応答時間 p95')
    """
    kind, _, assessment = metric.partition(":")
    if kind == "pass_rate":
        return assessment_name(assessment)
    return _METRICS.get(metric, metric)


def metric_value(metric: str, value: float) -> str:
    """単位の付いた値。

    >>> metric_value("error_rate", 0.125), metric_value("latency_p95_ms", 1234.5)
    ('12.5%', '1,234 ms')
    """
    if metric.partition(":")[0] in RATE_METRICS:
        return f"{100 * value:.3g}%"
    if metric.endswith("_ms"):
        return f"{value:,.0f} ms"
    return f"${value:.4g}" if metric.startswith("cost_usd") else f"{value:,.4g}"
