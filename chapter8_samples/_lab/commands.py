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

from .doctor.setup_problems import (
    backend_problem,
    explained,
    missing_database,
    output_problem,
    require,
    shown,
)
from .environment import home
from .report.periods import since
from .workbench import Lab, local_store, sample, set_aside

# 途中でサーバーが止まっても、数分も待たせない
SHORT_WAITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
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
    for path in (path for name in STATE for path in home().glob(name)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def story(output: Path, *, fresh: bool, keep: bool) -> int:
    """シナリオを最後まで実行し、自分で行った照合がすべて合えば 0 を返す。"""
    started = time.perf_counter()
    require(output_problem(output))
    if fresh:
        erase_state()
    with own_lab(llm=True) as lab, contextlib.ExitStack() as stack:
        from .console import run_steps
        from .story.play import EXPERIMENT, cast

        if not keep:
            set_aside(EXPERIMENT)
        tale = stack.enter_context(cast(lab, output))
        print("第8章 監視と運用: お客様窓口ボットの一日(API キーも外部接続も使いません)\n")
        failed = run_steps(tale.steps())
        print("\n" + tale.summary())
    verdict = (
        f"失敗した手順が {failed} 件あります(上の NG)" if failed else "すべての照合が合いました"
    )
    print(f"\n{verdict}({time.perf_counter() - started:.0f} 秒)。{_next(output)}")
    return 1 if failed else 0


def _next(output: Path) -> str:
    return f"""次に試すこと:
  レポートを見る            {output.resolve()}
  MLflow UI で見る          python -m chapter8_samples ui
  ボットと話す              python -m chapter8_samples serve
  サンプルを 1 本動かす     python -m chapter8_samples.cost_tracking.cost_calculator"""


def report(output: Path) -> int:
    """シナリオの保存されたトレースから、レポートを作り直す。"""
    from .story.play import EXPERIMENT
    from .story.report import NoStoryError, write_story_report

    require(output_problem(output))
    with own_lab():
        experiment = mlflow.get_experiment_by_name(EXPERIMENT)
        try:
            if experiment is None:
                raise NoStoryError(f"no experiment {EXPERIMENT!r} in {home()}")
            print(write_story_report(output, experiment.experiment_id).resolve())
        except NoStoryError as error:
            print("記録がありません。先に python -m chapter8_samples を実行してください。")
            print(f"({error})")
            return 1
    return 0


def experiment_report(output: Path, options: Namespace) -> int:
    """任意のエクスペリメントのレポートを書く。接続先は引数、環境変数、手元のデータベースの順。"""
    from .report.experiment import (
        EmptyExperimentError,
        ReportInputError,
        ReportRequest,
        write_experiment_report,
    )

    start = options.since or since("24h")
    uri, source = _report_source(options.tracking_uri)
    print(f"接続先: {shown(uri)} ({source})")
    for name, value in SHORT_WAITS.items():
        os.environ.setdefault(name, value)
    mlflow.set_tracking_uri(uri)
    require(backend_problem(uri) or missing_database(uri) or output_problem(output))
    with explained():
        request = ReportRequest(
            experiment=options.experiment,
            since=start,
            tracking_uri=uri,
            alerts=options.alerts,
            alert_state=options.alert_state,
            models=options.model,
        )
        try:
            path, count = write_experiment_report(output, request)
        except ReportInputError as error:
            raise SystemExit(f"{error}\n  -> ファイルのパスと中身を直してください。") from error
        except EmptyExperimentError as error:
            raise SystemExit(
                f"{start.astimezone():%Y-%m-%d %H:%M} からのトレースがありません。\n"
                "  -> --since で期間を長くするか、エクスペリメントの名前を確かめてください。"
            ) from error
    print(f"{count:,} 件のトレースから書きました: {path.resolve()}")
    return 0


def _report_source(tracking_uri: str | None) -> tuple[str, str]:
    if tracking_uri:
        return tracking_uri, "--tracking-uri"
    if from_environment := os.environ.get("MLFLOW_TRACKING_URI"):
        return from_environment, "環境変数 MLFLOW_TRACKING_URI"
    return local_store(), "手元のデータベース"


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
        from .servers.mlflow_server import MlflowServerError
        from .shop.chat_server import PortTakenError, serve_chat

        try:
            serve_chat(lab, port)
        except PortTakenError as error:
            print(f"画面を開けません({error})。--port で別の番号を指定してください。")
            return 1
        except MlflowServerError as error:
            print(f"MLflow サーバーを起動できません。ログを確かめてください。\n{error}")
            return 1
    return 0


def _wait_for_interrupt() -> None:
    while True:
        time.sleep(1)  # 長い sleep の直前に届いたシグナルは、sleep が終わるまで処理されない
