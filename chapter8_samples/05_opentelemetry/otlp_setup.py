"""8.5.3 OTLP エクスポートの設定(リスト8.14-8.16, 表8.16)。

同じトレースを MLflow と OpenTelemetry の両方へ、同じ ID で届ける。設定の誤りは最初の
リクエストではなくここで例外にし、送信先が止まってもアプリは止めない。

実行::

    $ python chapter8_samples/05_opentelemetry/otlp_setup.py
    送り先は、MLflow と、OTLP の http://127.0.0.1:...(grpc)
    応答は 1 秒未満。OTLP に届いたスパン 6、失われたスパン 0
    MLflow のトレース 3、OTLP のトレース 3、ID は一致
      chat gpt-4o-mini: gen_ai.usage.input_tokens=120 user.id=user-1 session.id=s-1
      invoke_agent answer: user.id=user-1 session.id=s-1 mlflow.traceTag.release=v1
    受信側が停止しても: 応答は 1 秒未満。OTLP に届いたスパン 0、失われたスパン 6

Databricks では ``MLFLOW_TRACKING_URI=databricks`` のまま同じ呼び出しで、Databricks と
OTLP の両方に届く。本物の送信先は ``python -m chapter8_samples.opentelemetry check`` で確かめる。
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlflow

from chapter8_samples.opentelemetry.export import (
    OtlpConfig,
    OtlpConfigError,
    OtlpOptions,
    OtlpStatus,
    OtlpTransportOptions,
    disable_otlp_export,
    flush_all,
    platform_resource,
    resolve_config,
    start_otlp_export,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


def setup_otlp_export(
    endpoint: str | OtlpConfig | None = None,
    service_name: str = "",
    protocol: str | None = None,
    **options: Unpack[OtlpOptions],
) -> OtlpStatus:
    """MLflow のトレースを OTLP でも送る。起動時に、最初のトレースより前に呼ぶ。

    呼ぶ順は ``mlflow.set_tracking_uri``、この関数、``setup_production_tracing``。8.1 の設定が先だと
    MLflow の停止中に起動できない。``set_tracking_uri`` が後だと、span_processors が消える。

    Args:
        endpoint: ``http://otel-collector:4317`` など。``OtlpConfig`` を 1 つ渡してもよい。省略した
            項目は環境変数 ``OTEL_*`` の値を使う。引数で上書きした項目は ``warnings`` に出る。
        service_name: バックエンドで見えるサービス名。
        protocol: ``"grpc"`` (既定)か ``"http/protobuf"``。
        **options: ``mode="dual"``(既定。MLflow にも残す)か ``"otlp_only"`` のほか、
            ``headers`` ``deployment_environment`` など ``OtlpConfig`` の項目。

    Returns:
        状態。同じ設定でもう一度呼んでも何も変わらない。

    Raises:
        OtlpConfigError: 設定値が誤っている。
        OtlpSetupError: エクスポーターがない、トレースが無効、など。環境は元に戻す。
    """
    return start_otlp_export(resolve_config(endpoint, service_name, protocol, options))


def setup_otlp_via_collector(
    service_name: str,
    collector_endpoint: str = "http://otel-collector:4317",
    service_version: str | None = None,
    deployment_environment: str | None = None,
    **options: Unpack[OtlpTransportOptions],
) -> OtlpStatus:
    """Collector へ gRPC で送る。環境名は、省略すると基盤が付けたもの、なければ ``production``。"""
    known = platform_resource().get("deployment.environment.name", "production")
    return setup_otlp_export(
        collector_endpoint,
        service_name,
        "grpc",
        service_version=service_version,
        deployment_environment=deployment_environment or known,
        **options,
    )


def setup_otlp_for_datadog(
    service_name: str,
    dd_api_key: str | None = None,
    dd_site: str = "datadoghq.com",
    **options: Unpack[OtlpOptions],
) -> OtlpStatus:
    """Datadog の受信エンドポイントへ直接送る(HTTP だけ)。キーは省略すると ``DD_API_KEY``。"""
    key = dd_api_key or os.environ.get("DD_API_KEY")
    if not key:
        raise OtlpConfigError("Datadog needs an API key; pass dd_api_key or set DD_API_KEY")
    options["headers"] = {"dd-api-key": key, **options.get("headers", {})}
    return setup_otlp_export(f"https://otlp.{dd_site}", service_name, "http/protobuf", **options)


def setup_otlp_for_grafana_tempo(
    service_name: str, tempo_endpoint: str = "http://tempo:4317", **options: Unpack[OtlpOptions]
) -> OtlpStatus:
    """Grafana Tempo へ gRPC で送る。"""
    return setup_otlp_export(tempo_endpoint, service_name, "grpc", **options)


def setup_otlp_for_jaeger(
    service_name: str, jaeger_endpoint: str = "http://jaeger:4317", **options: Unpack[OtlpOptions]
) -> OtlpStatus:
    """Jaeger へ gRPC で送る。"""
    return setup_otlp_export(jaeger_endpoint, service_name, "grpc", **options)


def main() -> None:
    """3 件のリクエストを両方へ送り、届いたものを見てから、受信側を止める。"""
    from chapter8_samples import _lab
    from chapter8_samples._lab.servers.receivers import OtlpReceiver

    with _lab.sample("ch8-otlp-export") as lab, OtlpReceiver() as sink:
        status = setup_otlp_export(sink.grpc_endpoint, "support-bot", timeout_seconds=1.0)
        print(f"送り先は、MLflow と、OTLP の {status.endpoint}({status.protocol})")
        print(send_three_requests())
        _show(sink.spans, lab.experiment_id or "")
        sink.stop()
        print(f"受信側が停止しても: {send_three_requests()}")
        disable_otlp_export()


def send_three_requests() -> str:
    """3 件のリクエストに答え、応答の速さと OTLP に届いた数を文にする。"""
    before = flush_all()
    started = time.perf_counter()
    for number in (1, 2, 3):
        _answer(f"user-{number}")
    speed = "1 秒未満" if time.perf_counter() - started < 1 else "1 秒以上"
    after = flush_all(timeout_seconds=60.0)  # 全部届けば、すぐに戻る
    delivered = after.delivered - before.delivered
    lost = after.lost - before.lost
    return f"応答は {speed}。OTLP に届いたスパン {delivered}、失われたスパン {lost}"


@mlflow.trace(name="answer", span_type="AGENT")
def _answer(user: str) -> None:
    who = {"mlflow.trace.user": user, "mlflow.trace.session": "s-1"}
    mlflow.update_current_trace(tags={"release": "v1"}, metadata=who)
    with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
        llm.set_attribute("mlflow.llm.model", "gpt-4o-mini")
        llm.set_attribute("mlflow.llm.provider", "openai")
        llm.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 120, "output_tokens": 20})


def _show(spans: Sequence[Any], experiment_id: str) -> None:
    traces: Any = mlflow.search_traces(locations=[experiment_id], return_type="list")
    ours = {trace.info.trace_id.removeprefix("tr-") for trace in traces}
    theirs = {span.trace_id for span in spans}
    same = "一致" if ours == theirs else "不一致"
    print(f"MLflow のトレース {len(ours)}、OTLP のトレース {len(theirs)}、ID は{same}")
    shown = ("gen_ai.usage.input_tokens", "user.id", "session.id", "mlflow.traceTag.release")
    for span in spans[:2]:
        values = " ".join(f"{k}={span.attributes[k]}" for k in shown if k in span.attributes)
        print(f"  {span.name}: {values}")


if __name__ == "__main__":
    main()
