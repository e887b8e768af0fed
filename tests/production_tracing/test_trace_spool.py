"""delivery.spool: 止まったサーバー、壊れたファイル、満杯のディスクでも失わず、重複もしない。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import errno
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import SpansLocation, TraceTagKey
from mlflow.utils.rest_utils import verify_rest_response
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan

from chapter8_samples.production_tracing.__main__ import main
from chapter8_samples.production_tracing.delivery import spool as trace_spool
from chapter8_samples.production_tracing.delivery.counts import LEDGER, start_counting
from chapter8_samples.production_tracing.delivery.flush import flush_traces
from chapter8_samples.production_tracing.delivery.spool import TraceSpool, replay
from chapter8_samples.production_tracing.graceful_shutdown import setup_graceful_shutdown


class Server:
    """止めたり、拒否させたりできる送信先(生きているときは本物の SQLite に書く)。"""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.reject: set[str] = set()
        self.refusal: Exception = MlflowException("bad", error_code=1000)  # INVALID_PARAMETER_VALUE
        self.batches: list[int] = []

    def __call__(self, traces: Sequence[Any]) -> None:
        self.batches.append(len(traces))
        if self.error:
            raise self.error
        if any(trace.data.spans[0].name in self.reject for trace in traces):
            raise self.refusal
        trace_spool.deliver(traces)


@pytest.fixture
def server(tracking_uri: str) -> Server:
    mlflow.set_experiment("spool")
    return Server()


@pytest.fixture
def spool(server: Server, tmp_path: Path) -> Iterator[TraceSpool]:
    created = TraceSpool(tmp_path / "spool", deliver=server, cooldown_seconds=60).install()
    yield created
    created.uninstall()


def record(*names: str) -> None:
    for name in names:
        with mlflow.start_span(name) as root:
            root.set_inputs({"質問": "日本語"})
            mlflow.update_current_trace(
                user="u", client_request_id="r", tags={"k": "v"}, metadata={"m": "1"}
            )
            with mlflow.start_span("child"):
                pass
    mlflow.flush_trace_async_logging()


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """``seconds`` 秒以内に成り立つか。"""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.mark.slow
def test_delivers_everything_while_the_server_is_up(spool: TraceSpool, stored: Any) -> None:
    record(*["ok"] * 20)
    assert spool.drain(30) == 0
    assert spool.stats() == (20, 0, 0, 0)
    assert list(spool.directory.iterdir()) == []
    traces = stored()
    assert len(traces) == 20
    (info,) = {(t.info.client_request_id, t.info.tags["k"], len(t.data.spans)) for t in traces}
    assert info == ("r", "v", 2)
    metadata = traces[0].info.trace_metadata
    assert metadata["mlflow.trace.user"] == "u" and metadata["m"] == "1"


@pytest.mark.slow
def test_outage_then_automatic_recovery(spool: TraceSpool, server: Server, stored: Any) -> None:
    server.error = ConnectionError("refused")
    record(*["down"] * 10)
    assert spool.drain(0.2) == 10
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in spool.directory.iterdir())
    assert stored() == []
    server.error = None
    record("up")
    assert spool.drain(30) == 0
    assert len(stored()) == 11


@pytest.mark.slow
def test_replay_is_idempotent_and_keeps_ids(spool: TraceSpool, server: Server, stored: Any) -> None:
    server.error = ConnectionError("refused")
    record(*["down"] * 5)
    spool.drain(0.1)
    spool.uninstall()
    copies = {path.name: path.read_bytes() for path in spool.directory.glob("*.json")}
    assert replay(spool.directory).delivered == 5
    for name, body in copies.items():
        (spool.directory / name).write_bytes(body)
    assert replay(spool.directory).delivered == 5
    traces = stored()
    assert {f"{trace.info.trace_id}.json" for trace in traces} == set(copies)
    assert [len(trace.data.spans) for trace in traces] == [2] * 5


@pytest.mark.slow
def test_a_spool_that_is_only_made_sends_nothing(
    spool: TraceSpool, server: Server, stored: Any
) -> None:
    """接続先を決める前に作ると、前回の残りが別の(既定の)接続先に送られ、消えてしまう。"""
    server.error = ConnectionError("refused")
    record("left")
    spool.uninstall()
    server.error = None
    sent: list[Any] = []
    again = TraceSpool(spool.directory, deliver=lambda traces: sent.extend(traces))
    time.sleep(0.3)
    assert (again.stats().pending, sent) == (1, [])
    again.install()
    assert again.drain(30) == 0 and len(sent) == 1
    again.uninstall()


def test_rejected_and_unreadable_traces_are_set_aside(
    spool: TraceSpool, server: Server, stored: Any
) -> None:
    server.reject = {"poison"}
    server.error = ConnectionError("refused")  # 一度に送られるように、ためておく
    record(*["good"] * 6, "poison", *["good"] * 6)
    server.error = None
    assert spool.drain(30) == 0
    (spool.directory / "tr-broken.json").write_text("{", encoding="utf-8")
    (spool.directory / "foreign.json").mkdir()
    spool.uninstall()
    assert replay(spool.directory, timeout_seconds=3).dead == 2
    assert len(list((spool.directory / "dead").iterdir())) == 3
    assert (spool.stats().dead, spool.stats().delivered, len(stored())) == (1, 12, 12)


def test_one_trace_that_the_server_never_takes_does_not_hold_the_others_back(
    server: Server, spool: TraceSpool
) -> None:
    spool._cooldown = 0.01
    server.error = ConnectionError("refused")
    record("poison", *["good"] * 7)
    server.reject, server.refusal = {"poison"}, MlflowException("bug", error_code=1)  # 500
    server.error = None
    spool.drain(0)  # 始まっている 60 秒の待ちを終わらせる
    assert eventually(lambda: spool.stats() == (7, 1, 0, 0))


def test_what_cannot_be_put_on_the_wire_is_set_aside_too(server: Server, spool: TraceSpool) -> None:
    with pytest.raises(ValueError, match="out of range") as caught:
        WireSpan(start_time_unix_nano=-1)
    server.reject, server.refusal = {"before 1970"}, caught.value
    record("good", "before 1970", "good")
    assert spool.drain(5) == 0 and spool.stats() == (2, 0, 1, 0)


def test_text_that_an_earlier_version_left_as_it_was_is_mended_too(
    server: Server, spool: TraceSpool, stored: Any
) -> None:
    server.error = ConnectionError("refused")
    record("left")
    [path] = spool.directory.glob("*.json")
    path.write_text(path.read_text("utf-8").replace('"left"', '"left\\ud83d"'), "utf-8")
    server.error = None
    assert spool.drain(5) == 0
    assert "left\ufffd" in {span.name for trace in stored() for span in trace.data.spans}


def test_the_404_of_a_proxy_without_a_server_is_an_outage(
    spool: TraceSpool, server: Server
) -> None:
    page = requests.Response()
    page.status_code, page._content = 404, b"<html>default backend - 404</html>"
    with pytest.raises(MlflowException) as caught:
        verify_rest_response(page, "/v1/traces")
    server.error = caught.value
    record("deployed", "meanwhile")
    assert eventually(lambda: len(server.batches) > 0)
    server.error = None
    assert spool.drain(30) == 0 and spool.stats() == (2, 0, 0, 0)


def test_an_outage_is_one_small_request_per_cooldown(server: Server, spool: TraceSpool) -> None:
    server.error = ConnectionError("refused")
    record(*["down"] * 4)
    spool._cooldown = 0.1
    spool.drain(0)  # 始まっている 60 秒の待ちを終わらせる
    assert eventually(lambda: server.batches[-1:] == [1])
    server.batches.clear()
    time.sleep(0.35)
    assert server.batches == [1] * len(server.batches) and len(server.batches) <= 4
    server.error = None
    assert spool.drain(30) == 0 and spool.stats().delivered == 4


def test_disk_error_is_reported_sends_directly_and_counts_real_loss(
    spool: TraceSpool, server: Server, stored: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.error = ConnectionError("refused")
    record("a", "b")
    folder = spool.directory.rename(spool.directory.with_name("moved"))
    spool.directory.write_text("not a folder", encoding="utf-8")
    record("c")
    assert "cannot write to spool" in caplog.text
    assert (spool.stats().write_errors, LEDGER.counts()) == (1, (0, 1, 2))
    server.error = None
    record("d")
    assert spool.stats().write_errors == 2
    (direct,) = stored()
    assert {span.name for span in direct.data.spans} == {"d", "child"}
    spool.directory.unlink()
    folder.rename(spool.directory)
    assert spool.drain(30) == 0 and LEDGER.counts() == (0, 1, 0)
    assert len(stored()) == 3


def test_a_full_disk_keeps_no_half_written_files(
    spool: TraceSpool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, text: str, **_: Any) -> int:
        path.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    record("big", "bigger")
    assert spool.stats() == (2, 0, 0, 2) and list(spool.directory.iterdir()) == []


def test_a_file_that_cannot_be_removed_is_sent_once(
    spool: TraceSpool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(_path: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    spool._cooldown = 0.01
    monkeypatch.setattr(Path, "unlink", read_only)
    record("first", "second")
    assert spool.drain(1) == 0 and spool.stats().delivered == sum(server.batches) == 2


def test_a_file_that_cannot_be_read_for_a_moment_is_not_set_aside(
    spool: TraceSpool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(_path: Path, **_: Any) -> str:
        asked.set()
        raise OSError(errno.EMFILE, "Too many open files")

    asked = threading.Event()
    with monkeypatch.context() as moment:
        moment.setattr(Path, "read_text", exhausted)
        record("waits")
        assert asked.wait(5)
    assert spool.drain(30) == 0 and spool.stats() == (1, 0, 0, 0)


def test_text_that_no_file_can_hold_waits_on_disk_like_any_other(
    server: Server, spool: TraceSpool, stored: Any
) -> None:
    server.error = ConnectionError("refused")
    with mlflow.start_span("surrogate") as root:
        root.set_inputs("\ud800")
    record("fine")
    assert flush_traces(30).ok and LEDGER.counts() == (0, 0, 2)
    server.error = None
    assert spool.drain(30) == 0
    assert {trace.data.spans[0].inputs for trace in stored() if len(trace.data.spans) == 1} == {
        "\ufffd"
    }


def test_spans_that_join_a_callers_trace_pass_the_spool(spool: TraceSpool, stored: Any) -> None:
    """呼び出し元のトレースの一部は、ここではトレースとして完成しない。置き場で待つと消える。"""
    with mlflow.start_span("caller") as caller:
        headers = mlflow.tracing.get_tracing_context_headers_for_http_request()
    mlflow.flush_trace_async_logging()
    assert spool.drain(30) == 0
    with mlflow.tracing.set_tracing_context_from_http_request_headers(headers):
        mlflow.start_span_no_context("callee").end()
        mlflow.flush_trace_async_logging()  # 出ると、MLflow は呼び出し元とのつながりを忘れる
    (trace,) = stored()
    assert trace.info.trace_id == caller.trace_id
    assert {span.name for span in trace.data.spans} == {"caller", "callee"}


def test_reinstalled_spool_sends_again(spool: TraceSpool, server: Server, stored: Any) -> None:
    server.error = ConnectionError("refused")
    record("before")
    spool.uninstall()
    server.error = None
    spool.install()
    record("after")
    assert spool.drain(30) == 0 and len(stored()) == 2


def test_file_that_another_process_delivered_is_ignored(spool: TraceSpool, server: Server) -> None:
    server.error = ConnectionError("refused")
    record("gone")
    (path,) = spool.directory.iterdir()
    path.unlink()
    server.error = None
    assert spool.drain(30) == 0 and spool.stats() == (0, 0, 0, 0)


def test_an_idle_spool_sends_what_a_dead_process_left(
    spool: TraceSpool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gunicorn の ``--preload`` では、後から fork されたワーカーは、前の残りを知らない。"""
    monkeypatch.setattr(trace_spool, "_IDLE_SECONDS", 0.05)
    server.error = ConnectionError("refused")
    record("left")
    (path,) = spool.directory.glob("*.json")
    hidden = path.rename(path.with_suffix(".hidden"))
    server.error = None
    assert spool.drain(30) == 0 and spool.stats().delivered == 0
    hidden.rename(path)
    assert eventually(lambda: spool.stats().delivered == 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_wait_for_the_traces_of_its_parent(
    spool: TraceSpool, server: Server
) -> None:
    server.error = ConnectionError("refused")
    record("parent")
    child = os.fork()
    if child == 0:
        os._exit(spool.drain(20) + 10 * spool.stats().pending)
    started = time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    assert time.monotonic() - started < 10
    assert spool.stats().pending == 1


def test_no_thread_at_interpreter_shutdown_leaves_the_trace_on_disk(
    spool: TraceSpool, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 以降では、fork した子が終了処理で初めて書くとき、送るスレッドを作れない。"""

    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "spool":
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(thread)

    sent: list[Any] = []
    spool._deliver = lambda traces: sent.extend(traces)
    record("warm-up")
    assert spool.drain(30) == 0 and len(sent) == 1
    monkeypatch.setattr(spool, "_pid", -1)  # fork した子の中と同じ
    monkeypatch.setattr(threading.Thread, "start", refuse)
    record("child")
    assert spool.drain(20) == 1 and len(sent) == 1
    assert len(list(spool.directory.glob("*.json"))) == 1


@pytest.mark.slow
def test_survives_provider_rebuild_and_uninstall_restores(spool: TraceSpool, stored: Any) -> None:
    from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter as Exporter

    log_trace = Exporter._log_trace
    mlflow.set_experiment("spool2")
    record("a")
    with pytest.raises(RuntimeError, match="uninstall"):
        TraceSpool(spool.directory).install()
    spool.drain(30)
    spool.uninstall()
    assert Exporter._log_trace is log_trace
    record("b")
    assert spool.stats().delivered == 1 and len(stored("spool2")) == 2


@pytest.mark.slow
def test_handler_reports_what_stays_on_disk(
    spool: TraceSpool, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.error = ConnectionError("refused")
    record("a", "b")
    handler = setup_graceful_shutdown(1, spool=spool)
    handler._deliver_before_the_end()
    handler.unregister()
    assert "2 traces are kept on disk for replay" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "hanging"])
def test_sigterm_with_a_dead_server_loses_nothing(
    program: Any, stored: Any, tmp_path: Path, free_port: int, kind: str
) -> None:
    """200 件を抱えて SIGTERM: 期限内に終わり、全件がディスクにあり、再送で全件が届く。"""
    import socket

    listener = socket.socket()
    if kind == "hanging":  # つながるが、決して答えない
        listener.bind(("127.0.0.1", free_port))
        listener.listen(64)
    body = f"""
from chapter8_samples.production_tracing.delivery.spool import TraceSpool
setup_graceful_shutdown(5, spool=TraceSpool("spool").install())
experiment = mlflow.set_experiment("child").experiment_id
mlflow.set_tracking_uri("http://127.0.0.1:{free_port}")
from mlflow.entities.trace_location import MlflowExperimentLocation
mlflow.tracing.set_destination(MlflowExperimentLocation(experiment))
for number in range(200): work(number)
print(time.time(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    code, out, err = program.run(body, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
    took = time.time() - float(out.split()[0])
    listener.close()
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM), err
    assert took < 5.5 + 2
    assert len(list((tmp_path / "spool").glob("*.json"))) == 200
    assert replay(tmp_path / "spool").delivered == 200
    assert replay(tmp_path / "spool").delivered == 0
    assert len(stored("child", include_spans=False)) == 200


@pytest.mark.slow
def test_server_killed_in_mid_burst_and_restarted(tmp_path: Path, free_port: int) -> None:
    """SIGKILL されたサーバーが戻れば、ひとりでに全件が届き、重複しない。"""
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="5")
    server = MlflowServer(tmp_path / "home", port=free_port).start()
    mlflow.set_tracking_uri(server.url)
    experiment = mlflow.set_experiment("burst").experiment_id
    spool = TraceSpool(tmp_path / "spool", cooldown_seconds=0.5).install()
    try:
        for number in range(150):
            with mlflow.start_span("chat", attributes={"number": number}):
                pass
            if number == 75:
                mlflow.flush_trace_async_logging()
                server.kill()
        mlflow.flush_trace_async_logging()
        assert LEDGER.counts()[1] == 0
        server = MlflowServer(tmp_path / "home", port=free_port).start()
        assert spool.drain(180) == 0
        found: Any = mlflow.search_traces(locations=[experiment], return_type="list")
        assert len(found) == len({trace.info.trace_id for trace in found}) == 150
        assert all(len(trace.data.spans) == 1 for trace in found)
    finally:
        spool.uninstall()
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("spooled", [True, False])
def test_server_that_was_away_at_the_first_trace_gets_the_spans_of_the_next(
    tmp_path: Path, free_port: int, spooled: bool
) -> None:
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="5")
    server = MlflowServer(tmp_path / "home", port=free_port).start()
    mlflow.set_tracking_uri(server.url)
    experiment = mlflow.set_experiment("away").experiment_id
    server.kill()
    with pytest.raises(NotImplementedError):  # MLflow は、版を聞けなかったことを覚える
        TracingClient().log_spans(experiment, [mlflow.start_span_no_context("first")])
    server.start()
    stop = start_counting()
    spool = TraceSpool(tmp_path / "spool", cooldown_seconds=0.5)
    try:
        if spooled:
            spool.install()
        for name in ("first", "next"):
            with mlflow.start_span(name):
                pass
            mlflow.flush_trace_async_logging()
        assert spool.drain(60) == 0
        found: Any = mlflow.search_traces(locations=[experiment], return_type="list")
        places = [trace.info.tags.get(TraceTagKey.SPANS_LOCATION) for trace in found]
        assert len(places) == 2 and places[0] == SpansLocation.TRACKING_STORE
    finally:
        spool.uninstall()
        stop()
        server.stop()


def test_command_line(
    tracking_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["replay", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == "delivered=0 pending=0 dead=0\n"
    assert main(["replay", str(tmp_path / "typo")]) == 1
    assert f"no spool at '{tmp_path / 'typo'}'" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
    for arguments, code, shown in ((["replay", "--help"], 0, "DIR"), (["repaly"], 2, "repaly")):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == code
        assert shown in "".join(capsys.readouterr())


def test_a_spool_that_otlp_would_bypass_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4318/v1/traces")
    with pytest.raises(RuntimeError, match="export_profile='burst'"):
        TraceSpool(tmp_path).install()
    monkeypatch.setenv("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "true")
    TraceSpool(tmp_path).install().uninstall()
