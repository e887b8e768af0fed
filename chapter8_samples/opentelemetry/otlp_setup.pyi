"""8.5.3 OTLP エクスポートの設定(リスト8.14-8.16, 表8.16)。"""

from .export import OtlpConfig, OtlpOptions, OtlpStatus, OtlpTransportOptions
from typing_extensions import Unpack

def setup_otlp_export(endpoint: str | OtlpConfig | None=None, service_name: str='', protocol: str | None=None, **options: Unpack[OtlpOptions]) -> OtlpStatus:
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

def setup_otlp_via_collector(service_name: str, collector_endpoint: str='http://otel-collector:4317', service_version: str | None=None, deployment_environment: str | None=None, **options: Unpack[OtlpTransportOptions]) -> OtlpStatus:
    """Collector へ gRPC で送る。環境名は、省略すると基盤が付けたもの、なければ ``production``。"""

def setup_otlp_for_datadog(service_name: str, dd_api_key: str | None=None, dd_site: str='datadoghq.com', **options: Unpack[OtlpOptions]) -> OtlpStatus:
    """Datadog の受信エンドポイントへ直接送る(HTTP だけ)。キーは省略すると ``DD_API_KEY``。"""

def setup_otlp_for_grafana_tempo(service_name: str, tempo_endpoint: str='http://tempo:4317', **options: Unpack[OtlpOptions]) -> OtlpStatus:
    """Grafana Tempo へ gRPC で送る。"""

def setup_otlp_for_jaeger(service_name: str, jaeger_endpoint: str='http://jaeger:4317', **options: Unpack[OtlpOptions]) -> OtlpStatus:
    """Jaeger へ gRPC で送る。"""

def main() -> None:
    """3 件のリクエストを両方へ送り、届いたものを見てから、受信側を止める。"""

def send_three_requests() -> str:
    """3 件のリクエストに答え、応答の速さと OTLP に届いた数を文にする。"""
