"""``python -m chapter8_samples`` のコマンド。どれも、起動したものを必ず止めて終わる。"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import mlflow

from .doctor.setup_problems import missing_database, output_problem, require, shown
from .environment import home
from .report.periods import since
from .workbench import Lab, local_store, sample, set_aside

STATE = ("mlflow.db*", "artifacts", "archive", "judge_endpoint", "outbox", "samples", "spool")
OTHER_SETTINGS = ("MLFLOW_", "OTEL_", "OPENAI_", "DATABRICKS_")


@contextlib.contextmanager
def own_lab(*, llm: bool = False) -> Iterator[Lab]:
    """利用者のサーバーや鍵には触れず、手元の SQLite とスタブだけを使う。"""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(OTHER_SETTINGS):
            del os.environ[name]
    try:
        with sample(llm=llm) as lab:
            yield lab
    finally:
        os.environ.update(saved)


def erase_state() -> None:
    """データベースと、サンプルや画面が残したものを消す。ほかのファイルには触れない。"""
    for name in STATE:
        for path in home().glob(name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def story(output: Path, *, fresh: bool) -> int:
    """シナリオを最後まで実行し、自分で行った照合がすべて合えば 0 を返す。"""
    started = time.perf_counter()
    require(output_problem(output))
    if fresh:
        erase_state()
    with own_lab(llm=True):
        from .console import run_steps
        from .story.play import EXPERIMENT, cast

        set_aside(EXPERIMENT)
        with cast(output) as tale:
            print("第8章 監視と運用: お客様窓口ボットの運用(API キーも外部接続も使いません)\n")
            failed = run_steps(tale.steps())
            print("\n" + tale.summary())
    verdict = "すべての照合が合いました"
    if failed:
        verdict = f"失敗した手順が {failed} 件あります(上の NG)"
    print(f"\n{verdict}({time.perf_counter() - started:.0f} 秒)。{_next(output)}")
    return 1 if failed else 0


def _next(output: Path) -> str:
    return f"""次に試すこと:
  レポートを見る            {output.resolve()}
  MLflow UI で見る          python -m chapter8_samples ui
  ボットと話す              python -m chapter8_samples serve
  サンプルを 1 本動かす     python -m chapter8_samples.cost_tracking.cost_calculator"""


def report(options: Namespace) -> int:
    """エクスペリメントのレポートを書く。接続先は MLFLOW_TRACKING_URI、なければ手元の SQLite。"""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or local_store()
    print(f"接続先: {shown(uri)}")
    require(missing_database(uri) or output_problem(options.output))
    mlflow.set_tracking_uri(uri)
    from .report.experiment import ReportInputError, write_experiment_report
    from .story.play import EXPERIMENT

    name = EXPERIMENT if options.experiment is None else options.experiment
    start = options.since or since("24h")
    try:
        count = write_experiment_report(options.output, name, start, options.alerts)
    except ReportInputError as error:
        raise SystemExit(str(error)) from error
    print(f"{count:,} 件のトレースから書きました: {options.output.resolve()}")
    return 0


def ui(port: int) -> int:
    """手元のデータベースで MLflow UI を開き、Ctrl-C まで待つ。"""
    from .servers.mlflow_server import MlflowServer

    with (
        own_lab() as lab,
        MlflowServer(lab.home, port=port, backend_store_uri=lab.tracking_uri) as server,
    ):
        print(f"MLflow UI: {server.url}  (Ctrl-C で終わります)", flush=True)
        _wait_for_interrupt()
    return 0


def serve(port: int) -> int:
    """お客様窓口のチャット画面と MLflow サーバーを開き、Ctrl-C まで待つ。"""
    with own_lab(llm=True) as lab:
        from .shop.chat_server import serve_chat

        serve_chat(lab, port)
    return 0


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(1)  # 長い sleep の直前に届いたシグナルは、sleep が終わるまで処理されない
