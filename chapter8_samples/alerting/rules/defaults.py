"""8.4.1 標準のルール。平穏な日には鳴らず、LLM アプリの障害を見つける。"""

from __future__ import annotations

from .model import AlertRule, Rule

DEFAULT_RULES: tuple[Rule, ...] = (
    AlertRule(
        name="high_error_rate",
        metric="error_rate",
        window="5m",
        threshold=0.05,
        clear_threshold=0.03,
        # 1 秒に 0.01 から 20 件、エラー率 0.2 から 2% の平穏な 360 日で、誤報は平均 0.7 件、
        # 多くて 2 件(tests/benchmarks/alert_traffic.py --seeds 12)
        confidence=0.995,
        low_traffic_confidence=0.9999999,
        for_="30s",
        keep_firing_for="5m",
        severity="critical",
        action="rollback",
        summary="エラー率が 5% 超",
    ),
    AlertRule(
        name="slow_p95",
        metric="latency_p95_ms",
        window="10m",
        threshold=10_000,
        clear_threshold=8_000,
        for_="2m",
        keep_firing_for="5m",
        min_samples=30,
        summary="遅延の p95 が 10 秒超",
    ),
    AlertRule(name="cost_per_hour", metric="cost_usd_per_hour", window="1h", threshold=10),
    AlertRule(
        name="no_traffic",
        metric="trace_count",
        window="10m",
        op="<",
        threshold=1,
        for_="10m",
        summary="10 分間トレースなし",
    ),
)
