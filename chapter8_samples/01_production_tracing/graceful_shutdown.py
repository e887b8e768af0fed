"""8.1.4 グレースフルシャットダウン(リスト8.6)。

MLflow のトレースは背後のスレッドが送る。そのままでは、Kubernetes などが SIGTERM を送ったときに
送信待ちのトレースが 1 件残らず消える。終了コードを変えず、期限のうちに送り終えてから終わる。

実行::

    $ python chapter8_samples/01_production_tracing/graceful_shutdown.py
    対策なし: 40 件のうち 0 件を保存、終了コード 143(128 + SIGTERM の 15)
    対策あり: 40 件のうち 40 件を保存、終了コード 143(128 + SIGTERM の 15)

アプリのモジュールで ``setup_graceful_shutdown()`` を呼べば、どのワーカーも送り終えてから終わる。

=================================  ===========================================================
uvicorn(``--workers`` も)         起動時に一度呼ぶだけでよい。Windows では ``tracing_lifespan``
gunicorn(sync、gthread、uvicorn)  同じ。``--preload`` の uvicorn ではワーカーでも呼ぶ(下)
Celery(prefork)                   同じ(``worker_process_init`` で呼ぶ方法もある)
multiprocessing                    fork の子では何もしなくてよい。spawn の子では、子の中でも呼ぶ
=================================  ===========================================================

期限に間に合わなければ、送れなかった件数がログに出る(``TraceSpool`` を渡せばディスクに残る)。

Databricks でも同じコードで動く。Model Serving やジョブの停止も SIGTERM で届く。待ち時間の上限
(``timeout_seconds``)は、サーバー自身の終了(lifespan を含む)の後から数えるので、プラットフォームの
猶予(Kubernetes も gunicorn も既定は 30 秒)より短くする。
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import mlflow

from chapter8_samples.production_tracing.delivery.counts import start_counting
from chapter8_samples.production_tracing.delivery.flush import flush_traces
from chapter8_samples.production_tracing.delivery.shutdown import (
    GracefulShutdownHandler,
    install_handler,
)
from chapter8_samples.production_tracing.delivery.spool import TraceSpool


def setup_graceful_shutdown(
    timeout_seconds: float = 30.0,
    *,
    signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT),
    spool: TraceSpool | None = None,
) -> GracefulShutdownHandler:
    """終了時にトレースを送り終えるようにする。起動時にメインスレッドで一度呼ぶ。

    2 回目以降は、登録済みのものを返す。設定を変えるときは、先に ``unregister()`` する。
    gunicorn の ``--preload`` の親で呼んでもよい(fork の前に送り終える)。``UvicornWorker`` は
    fork の後でシグナルを既定に戻すので、ワーカーでも呼ぶ(ほかのワーカーでも、この方法でよい)::

        # gunicorn.conf.py
        def post_worker_init(worker):
            mlflow.set_experiment("/production/my-llm-app")
            setup_graceful_shutdown(timeout_seconds=20)

    ``signals`` は、受けたら送り終えてから終わるシグナル(端末が閉じる ``SIGHUP`` なども足せる)。

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または登録済みのものと違う設定。
    """
    return install_handler(timeout_seconds, signals, spool)


@contextlib.asynccontextmanager
async def tracing_lifespan(
    app: object, timeout_seconds: float = 10.0
) -> AsyncGenerator[None, None]:
    """FastAPI の lifespan: ワーカーの停止時に送り終える。シグナルの設定には触れない。

    ``FastAPI(lifespan=tracing_lifespan)``。自分の lifespan がある場合は、その中で
    ``async with tracing_lifespan(app): yield`` と書く。
    """
    start_counting()  # 送れなかった件数を知るために、プロセスの終わりまで数える
    try:
        yield
    finally:
        await asyncio.to_thread(flush_traces, timeout_seconds)


def main() -> None:
    """未送信のトレースを抱えたプロセスに SIGTERM を送り、保存された件数を比べる。"""
    from chapter8_samples import _lab

    with _lab.sample(None, fresh_store=True) as lab:
        plain = _stop_child(lab.tracking_uri, "plain")
        graceful = _stop_child(lab.tracking_uri, "graceful")
    for name, (stored, code) in {"対策なし": plain, "対策あり": graceful}.items():
        print(f"{name}: 40 件のうち {stored} 件を保存、終了コード {code}(128 + SIGTERM の 15)")


def _stop_child(tracking_uri: str, mode: str) -> tuple[int, int]:
    """子プロセスで 40 件を記録して SIGTERM を送り、(保存された件数, 終了コード) を返す。"""
    import subprocess

    name = f"ch8-graceful-{mode}"
    experiment = mlflow.set_experiment(name)
    page = "chapter8_samples.production_tracing.graceful_shutdown"
    arguments = [sys.executable, "-m", page, "child", tracking_uri, name, mode]
    # 既定では 5 秒ごとに送る。混んだ機械で SIGTERM が遅れても、その前に止められるようにする
    slow = {**os.environ, "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "60000"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=slow) as child:
        assert child.stdout is not None
        child.stdout.readline()  # 40 件を記録し終えた合図
        child.terminate()
        code = child.wait(60)
    found: Any = mlflow.search_traces(
        locations=[experiment.experiment_id], return_type="list", include_spans=False
    )
    return len(found), 128 - code if code < 0 else code


def _child(tracking_uri: str, experiment: str, mode: str) -> None:
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_experiment(experiment)
    if mode == "graceful":
        setup_graceful_shutdown(timeout_seconds=30)

    @mlflow.trace(name="answer")
    def answer(number: int) -> int:
        return number

    for number in range(39):
        answer(number)
    with mlflow.start_span("answering"):  # 最後の 1 件は応答の途中で止められる
        print("ready", flush=True)
        for _ in range(600):  # 短く分ける。直前に届いたシグナルは、sleep が終わるまで処理されない
            time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        _child(*sys.argv[2:])
    else:
        main()
