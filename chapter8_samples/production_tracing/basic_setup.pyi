"""8.1.3 軽量SDK・8.1.4 本番トレーシングの基本設定(リスト8.4)。"""

from collections.abc import Callable, Mapping, Sequence
from .autologging import enable_autologging as enable_autologging
from .delivery.settings import ExportProfile, TracingStatus
from mlflow.entities import LiveSpan
EXPORT_PROFILES: Mapping[ExportProfile, Mapping[str, str]] = {'default': {}, 'burst': {'MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE': '16384', 'MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE': '20000', 'MLFLOW_TRACE_BUFFER_MAX_SIZE': '20000', 'MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS': '1000', 'MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS': '4'}, 'otlp': {'OTEL_EXPORTER_OTLP_TRACES_PROTOCOL': 'http/protobuf', 'OTEL_BSP_MAX_QUEUE_SIZE': '50000', 'OTEL_BSP_SCHEDULE_DELAY': '1000', 'MLFLOW_TRACE_BUFFER_MAX_SIZE': '50000'}}

def setup_production_tracing(experiment_name: str, service_name: str='llm-app', tracking_uri: str | None=None, enable_async: bool=True, deployment_region: str | None=None, service_version: str | None=None, *, environment: str='development', export_profile: ExportProfile='burst', strict: bool=False, probe_timeout_seconds: float=2.0, retry_seconds: float=15.0, span_processors: Sequence[Callable[[LiveSpan], None]]=()) -> TracingStatus:
    """本番のトレーシングを設定する。アプリの起動時に一度だけ呼ぶ。

    同じ引数での 2 回目は何もしない。別の引数での 2 回目は ``TracingSetupError`` になる
    (途中でエクスペリメントを変えると実行中のトレースが壊れるため)。テストやノートブックで
    やり直すときは先に ``reset_production_tracing()`` を呼ぶ。

    Args:
        tracking_uri: ``None`` なら ``MLFLOW_TRACKING_URI``、それもなければ MLflow の既定
            (カレントディレクトリーの SQLite)。
        enable_async: ``False`` ではリクエストのスレッドで書き込む(1 件およそ 40 ms)。
        deployment_region: リソース属性 ``cloud.region``。
        environment: リソース属性 ``deployment.environment.name``(``find_traces(environment=)`` が
            見るのは ``RequestContext.environment``)。
        export_profile: ``EXPORT_PROFILES`` の名前。利用者の環境変数が優先される。
        strict: サーバーに届かないとき ``True`` は例外、``False`` は記録を止めて起動を続け、
            ``retry_seconds`` 秒ごとに背後で接続し直す(その間のトレースは残らない)。
        probe_timeout_seconds: 起動時に、サーバーの応答を待つ時間。
        span_processors: ``mlflow.tracing.configure`` に渡す関数(``mask_pii()`` など)。

    Raises:
        ValueError: 引数の値が正しくない(すべてを一度に挙げる)。
        TracingSetupError: 二重設定、使えない URI や名前、``strict=True`` での接続失敗。
    """

def tracing_status() -> TracingStatus | None:
    """いまの状態(再接続した後の ``ready`` や、送信待ち・消失の件数)。設定前は ``None``。"""

def reset_production_tracing() -> None:
    """設定を取り消し、環境変数とトラッキング URI を元に戻す(テスト・ノートブック用)。

    残っているトレースを送り終えてから戻る。リクエストの処理中には呼ばない。
    """

def main() -> None:
    """同じバーストを既定値と burst で記録し、保存された件数と失った件数を比べる。"""
