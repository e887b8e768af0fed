"""全テスト共通のフィクスチャ: きれいな環境、テストごとの保存先、手元の相手役。"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import leftovers
import pytest
from hypothesis import settings

from chapter8_samples import _lab

OWNED_PREFIXES = ("MLFLOW_", "OTEL_", "OPENAI_", "DATABRICKS_", "SLACK_", "PAGERDUTY_", "CHAPTER8_")
leftovers.watch()
_lab.go_offline()
_lab.bypass_proxy()  # 社内のプロキシを設定した機械でも、手元の相手に直接つなぐ
from mlflow import MlflowClient  # noqa: E402 (上の設定のあとで読み込む)
from mlflow.tracing.export import async_export_queue  # noqa: E402

# 背後で起動された(SIGINT を無視する)シェルからでも、子プロセスの Ctrl-C を試せるようにする
signal.signal(signal.SIGINT, signal.default_int_handler)
# 1 例ごとの期限(200 ミリ秒)は、混んだ機械では中身と関係なく切れる
settings.register_profile("chapter8", deadline=None)
settings.load_profile("chapter8")


class WakingQueue(Queue[Any]):
    """MLflow の送信スレッドを 20 ミリ秒ごとに起こす(1 秒ごとでは、flush のたびに 2 秒待つ)。"""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block, timeout and min(timeout, 0.02))


async_export_queue.Queue = WakingQueue  # type: ignore[misc]


def without_settings(environment: dict[str, str]) -> dict[str, str]:
    """接続先や鍵の環境変数を除いた写し。"""
    return {k: v for k, v in environment.items() if not k.startswith(OWNED_PREFIXES)}


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """開発者の設定がテストに、テストの設定が次のテストに、漏れないようにする。"""
    saved = dict(os.environ)
    for name in set(saved) - set(without_settings(saved)):
        del os.environ[name]
    os.environ.update(_lab.OFFLINE_DEFAULTS)
    os.environ["CHAPTER8_LAB"] = str(tmp_path / ".chapter8")
    # MLflow は、金額のない LLM スパンを保存するとき、あれば litellm を import する(数秒かかる)
    monkeypatch.setitem(sys.modules, "litellm", None)
    monkeypatch.chdir(tmp_path)
    yield
    _forget_mlflow_state()
    os.environ.clear()
    os.environ.update(saved)


def _forget_mlflow_state() -> None:
    """テスト中に決まった接続先・エクスペリメント・トレース設定を、起動直後に戻す。"""
    import mlflow

    from chapter8_samples.production_tracing import reset_production_tracing

    reset_production_tracing()
    # トレースを作らなかったテストでは待たない(書き出しの確認だけで 1 秒から 2 秒かかる)
    if mlflow.tracing.provider.provider.once._done:
        mlflow.flush_trace_async_logging()
    # None は「未設定」に戻す。前のテストの SQLite を指したまま残さない
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri(None)  # type: ignore[arg-type]
    mlflow.tracing.reset()
    mlflow.tracking.fluent._active_experiment_id = None


@pytest.fixture(scope="session")
def database_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """表を作り終えた、空の SQLite。表を作るのは 1 秒ほどかかるので、テストごとに写して使う。"""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path.as_posix()}").search_experiments()
    return path


@pytest.fixture(scope="session", autouse=True)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    """選ばれたテストに要る、章の全体とページの実行。ほかのテストの間に、1 つずつ進める。

    どれも空のディレクトリーから始める。ページの SQLite には、表(作るのに 4 秒かかる)だけがある。
    何もないところからは、章の全体と、``slow`` の全ページを実行する。
    """
    from samples import CHAPTER, RUNS, run_watched

    marks = [mark for item in request.session.items for mark in item.iter_markers("needs_run")]
    wanted = [name for name in RUNS if name in {mark.args[0] for mark in marks}]
    started: dict[str, Future[Any]] = {}
    with ThreadPoolExecutor(1) as pool:
        for name in wanted:
            directory, logs = tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("logs")
            if name != CHAPTER:
                (directory / ".chapter8").mkdir()
                template = request.getfixturevalue("database_template")
                shutil.copy(template, directory / ".chapter8/mlflow.db")
            started[name] = pool.submit(run_watched, RUNS[name], directory, logs)
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def tracking_uri(tmp_path: Path, database_template: Path) -> str:
    """このテストだけの SQLite。"""
    import mlflow

    database = shutil.copy(database_template, tmp_path / "mlflow.db")
    uri = f"sqlite:///{Path(database).as_posix()}"
    mlflow.set_tracking_uri(uri)
    return uri


@pytest.fixture(scope="session")
def _mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server.url


@pytest.fixture
def mlflow_server_url(_mlflow_server: str) -> str:
    """本物の mlflow server。共有なので、テストごとに別のエクスペリメントを使う。"""
    import mlflow

    mlflow.set_tracking_uri(_mlflow_server)
    return _mlflow_server


@pytest.fixture(scope="session")
def _stub_llm_server():  # type: ignore[no-untyped-def]
    from chapter8_samples._lab.llm.server import StubLlm

    with StubLlm() as stub:
        yield stub


@pytest.fixture
def stub_llm(_stub_llm_server):  # type: ignore[no-untyped-def]
    """LLM スタブ。openai SDK がここへ話すように環境変数も向ける。"""
    import dataclasses

    from chapter8_samples._lab.llm.server import Faults

    _stub_llm_server.set_faults(**dataclasses.asdict(Faults()))
    _stub_llm_server.requests.clear()
    os.environ["OPENAI_BASE_URL"] = _stub_llm_server.base_url
    os.environ["OPENAI_API_KEY"] = "sk-local-stub"
    return _stub_llm_server


@pytest.fixture
def webhooks():  # type: ignore[no-untyped-def]
    """Slack や PagerDuty の代わりに受け取るサーバー。"""
    from chapter8_samples._lab.servers.receivers import WebhookReceiver

    with WebhookReceiver() as receiver:
        yield receiver


@pytest.fixture
def otlp():  # type: ignore[no-untyped-def]
    """OTLP(gRPC と HTTP)の受信側。"""
    from chapter8_samples._lab.servers.receivers import OtlpReceiver

    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """プライベート CA の代わりの、自分で署名した 127.0.0.1 の証明書と鍵。"""
    import ipaddress
    from datetime import datetime, timedelta, timezone

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    home, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now(timezone.utc)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    files = (home / "cert.pem", home / "key.pem")
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(secret)
    return files
