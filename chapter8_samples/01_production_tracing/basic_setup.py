"""8.1.3 軽量SDK・8.1.4 本番トレーシングの基本設定(リスト8.4)。

MLflow の既定値では、2,000 件が一気に来る(バースト)と半分以上のトレースが警告だけで消え、サーバーが
止まるとリクエストまで止まる。起動時に一度だけ呼ぶこの設定で、消えず、待たせないトレーシングにする。

実行::

    $ python chapter8_samples/01_production_tracing/basic_setup.py
    上限 1,000 件に 2,000 件を送る状況を、1/20(50 件に 100 件)で再現
      default  保存 ... 件、消失 ... 件
      burst    保存 100 件、消失   0 件

Databricks では ``MLFLOW_TRACKING_URI=databricks`` と認証情報だけを設定し、同じ関数を呼ぶ。
エクスペリメント名は ``/Shared/my-llm-app`` のようなワークスペースの絶対パスにする。本番の
アプリには ``mlflow-tracing`` だけを入れればよい(SQLite は ``mlflow`` が必要)。
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlflow

# 本書では、このファイルから import する
from chapter8_samples.production_tracing.autologging import enable_autologging as enable_autologging
from chapter8_samples.production_tracing.delivery.flush import flush_traces
from chapter8_samples.production_tracing.delivery.session import (
    close_session,
    open_session,
    session_status,
)
from chapter8_samples.production_tracing.delivery.settings import (
    ExportProfile,
    TracingStatus,
    check_options,
)

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

# MLflow の送信には、満杯になると捨てる場所が 3 つある(burst の上の 3 行)。1 つでも足りないと、
# そこで失われる。残りの 2 行は送る速さを決める。burst は 10,000 件のバーストを 1 件も失わなかった値
# (満杯でもメモリーは数十 MB)
EXPORT_PROFILES: Mapping[ExportProfile, Mapping[str, str]] = {
    "default": {},
    "burst": {  # 値はこの設定、コメントは MLflow の既定
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE": "16384",  # スパンのキュー 2,048 個
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE": "20000",  # 送信タスクのキュー 1,000 件
        "MLFLOW_TRACE_BUFFER_MAX_SIZE": "20000",  # 組み立て中のトレース 1,000 件(警告も出ない)
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "1000",  # 送る間隔 5,000 ミリ秒
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS": "4",  # 書き込みのスレッド 10 本
    },
    "otlp": {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_MAX_QUEUE_SIZE": "50000",  # 2,048 個
        "OTEL_BSP_SCHEDULE_DELAY": "1000",  # 5,000 ミリ秒
        "MLFLOW_TRACE_BUFFER_MAX_SIZE": "50000",
    },
}
"""送信の設定(環境変数)。``default`` は MLflow のまま、``burst`` はバーストを失わない設定。

``otlp`` は MLflow サーバーの ``/v1/traces`` へ直接送る。書き込みが 5-6 倍速い代わりに、
トレースのメタデータ・``client_request_id``・明示したプレビューは送られない
(``add_trace_metadata`` はルートスパンの属性に書いて補う)。接続したときのトークンを使い続けるので、
運用中に ``MLFLOW_TRACKING_TOKEN`` を替えるなら ``burst`` を使う。
"""


def setup_production_tracing(
    experiment_name: str,
    service_name: str = "llm-app",
    tracking_uri: str | None = None,
    enable_async: bool = True,
    deployment_region: str | None = None,
    service_version: str | None = None,
    *,
    environment: str = "development",
    export_profile: ExportProfile = "burst",
    strict: bool = False,
    probe_timeout_seconds: float = 2.0,
    retry_seconds: float = 15.0,
    span_processors: Sequence[Callable[[LiveSpan], None]] = (),
) -> TracingStatus:
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
    options = check_options(**locals())  # 引数をすべて、名前のまま検査に渡す
    return open_session(options, EXPORT_PROFILES[export_profile])


def tracing_status() -> TracingStatus | None:
    """いまの状態(再接続した後の ``ready`` や、送信待ち・消失の件数)。設定前は ``None``。"""
    return session_status()


def reset_production_tracing() -> None:
    """設定を取り消し、環境変数とトラッキング URI を元に戻す(テスト・ノートブック用)。

    残っているトレースを送り終えてから戻る。リクエストの処理中には呼ばない。
    """
    close_session()


def main() -> None:
    """同じバーストを既定値と burst で記録し、保存された件数と失った件数を比べる。"""
    from chapter8_samples import _lab

    # 待ち時間を省くため、バーストの件数も、2 つの設定の上限も 1/20 に縮めて比べる
    limits = ("MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE", "MLFLOW_TRACE_BUFFER_MAX_SIZE")
    with _lab.sample(None, fresh_store=True):
        os.environ.update(dict.fromkeys(limits, "50"))  # MLflow の既定値 1,000 件
        before = _burst("default")
        os.environ.update(dict.fromkeys(limits, "1000"))  # burst の 20,000 件
        after = _burst("burst")
    print("上限 1,000 件に 2,000 件を送る状況を、1/20(50 件に 100 件)で再現")
    for profile, (stored, lost) in {"default": before, "burst": after}.items():
        print(f"  {profile:8s} 保存 {stored:3d} 件、消失 {lost:3d} 件")


def _burst(profile: ExportProfile) -> tuple[int, int]:
    """100 件を一気に記録し、(保存された件数, 失った件数) を返す。"""
    # 本番のエクスペリメントにも、前回の結果にも混ぜない
    experiment = f"/Shared/ch8-burst-{profile}-{time.time_ns():x}"
    setup_production_tracing(experiment, "my-llm-app", export_profile=profile)
    answer = mlflow.trace(lambda number: f"回答 {number}", name="answer")
    for number in range(100):
        answer(number)
    lost = flush_traces(timeout_seconds=60).undelivered
    found: Any = mlflow.search_traces(return_type="list", include_spans=False)
    reset_production_tracing()
    return len(found), lost


if __name__ == "__main__":
    main()
