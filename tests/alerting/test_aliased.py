"""動いているアプリが、付け替えを受け取り、読めない間は最後の版で動く。"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples.alerting.releases.aliased import (
    Aliased,
    AliasedModel,
    AliasedPrompt,
    AliasUnavailableError,
    Loaded,
)


class Counted(Aliased[str]):
    """読み込みを数え、言われたときに失敗する。"""

    def __init__(self, **options: Any) -> None:
        self.now, self.version_now = 0.0, "1"
        self.asked, self.down = 0, False
        super().__init__("m", "champion", clock=lambda: self.now, **options)

    def read(self, before: Loaded[str] | None) -> Loaded[str]:
        self.asked += 1
        if self.down:
            raise ConnectionError("server is down")
        return Loaded(self.version_now, f"model {self.version_now}")


def test_a_change_arrives_within_the_ttl() -> None:
    app = Counted(ttl_seconds=5)
    assert [app.get().value for _ in range(3)] == ["model 1"] * 3
    app.now = 5
    assert app.get().value == "model 1"
    app.version_now, app.now = "2", 9.9
    assert app.version == "1"
    app.now = 10
    assert app.version == "2"
    assert app.asked == 3


def test_the_last_good_version_stays_while_the_server_is_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Counted(ttl_seconds=5)
    app.get()
    app.down, app.now = True, 5
    assert [app.get().version for _ in range(3)] == ["1"] * 3
    assert app.asked == 2  # 落ちた相手を、リクエストのたびには呼び出さない
    assert "keeping version 1 of m@champion: ConnectionError: server is down" in caplog.text
    app.down, app.now, app.version_now = False, 10, "2"
    assert app.version == "2"


def test_a_start_without_the_server_is_an_error() -> None:
    app = Counted()
    app.down = True
    with pytest.raises(AliasUnavailableError, match="cannot load m@champion: ConnectionError"):
        app.get()
    app.down = False
    assert app.version == "1"


@contextmanager
def reloading(app: Counted) -> Iterator[None]:
    """別のスレッドが "2" を読み直している間。"""
    app.get()
    entered, go = threading.Event(), threading.Event()

    def slow_read(before: Loaded[str] | None) -> Loaded[str]:
        entered.set()
        assert go.wait(10)
        return Loaded("2", "model 2")

    app.read = slow_read  # type: ignore[method-assign]
    app.now += 5
    reloader = threading.Thread(target=app.get)
    reloader.start()
    assert entered.wait(10)
    yield
    go.set()
    reloader.join(10)


def test_one_thread_reloads_and_the_others_do_not_wait() -> None:
    app = Counted(ttl_seconds=5)
    with reloading(app):
        assert app.get().version == "1"  # 読み直しの最中でも、すぐに返る
    assert app.version == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_forked_while_another_thread_reloads_follows_the_alias() -> None:
    app = Counted(ttl_seconds=5)
    with reloading(app):
        child = os.fork()
        if child == 0:
            app.read = lambda before: Loaded("3", "model 3")  # type: ignore[method-assign]
            try:
                os._exit(0 if app.version == "3" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_version_that_does_not_load_is_tried_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alias, broken, now, tried = ["1"], {"2"}, [0.0], list[str]()

    def load(uri: str) -> str:
        tried.append(uri[-1])
        if uri[-1] in broken:
            raise OSError("model.pkl is missing")
        return uri

    model = AliasedModel("agent", loader=load, ttl_seconds=30, clock=lambda: now[0])
    monkeypatch.setattr(model, "_resolve", lambda: alias[0])
    assert model.version == "1"
    alias[0] = "2"
    for _ in range(120):  # 1 時間
        now[0] += 30
        assert model.version == "1"
    assert 5 <= tried.count("2") <= 10
    alias[0] = "3"
    now[0] += 30
    assert model.version == "3"  # 直した版は、待たせない
    alias[0], broken = "2", set()
    now[0] += 600
    assert model.version == "2"


def test_a_server_is_asked_for_the_model_without_the_retries_of_mlflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``MlflowClient`` は、落ちたサーバーを何分も待つ。その間、リクエストが一つ止まる。"""
    import mlflow

    def answer(self: AliasedModel, *uri: str) -> dict[str, Any]:
        return {"version": 7, "uri": uri}

    monkeypatch.setattr(AliasedModel, "_over_rest", answer)
    monkeypatch.setattr("mlflow.MlflowClient", None)
    mlflow.set_registry_uri("http://registry.example")
    for options in ({}, {"tracking_uri": "http://other.example"}):
        model = AliasedModel("agent", loader=lambda uri: uri, **options)
        assert model.get().value == "models:/agent/7"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tracking_uri", "mlflow_server_url"])
def test_a_real_prompt_is_followed_in_process_and_over_rest(
    backend: str, request: pytest.FixtureRequest
) -> None:
    import mlflow.genai

    uri = request.getfixturevalue(backend)
    name, chat = f"p-{uuid.uuid4().hex[:6]}", f"c-{uuid.uuid4().hex[:6]}"
    for text in ("one {{q}}", "two {{ q }}"):
        mlflow.genai.register_prompt(name, text)
    messages = [{"role": "system", "content": "答える"}, {"role": "user", "content": "{{q}}"}]
    mlflow.genai.register_prompt(chat, messages)
    mlflow.genai.set_prompt_alias(chat, "production", 1)
    mlflow.genai.set_prompt_alias(name, "production", 2)
    now = [0.0]
    prompt = AliasedPrompt(name, ttl_seconds=5, tracking_uri=uri, clock=lambda: now[0])
    assert (prompt.version, prompt.format(q="\\1 {{x}}")) == ("2", "two \\1 {{x}}")
    mlflow.genai.set_prompt_alias(name, "production", 1)
    now[0] = 5
    assert (prompt.version, prompt.format(q="?")) == ("1", "one ?")
    with pytest.raises(KeyError):
        prompt.format(question="?")
    conversation = AliasedPrompt(chat, tracking_uri=uri)
    assert conversation.template == messages
    with pytest.raises(TypeError, match="is a chat prompt"):
        conversation.format(q="?")
    with pytest.raises(AliasUnavailableError):
        AliasedPrompt(name, "nobody", tracking_uri=uri).get()


@pytest.mark.slow
def test_a_model_is_reloaded_when_the_alias_moves(tracking_uri: str) -> None:
    import mlflow

    client: Any = mlflow.MlflowClient()
    client.create_registered_model("agent")
    for _ in range(2):
        client.create_model_version("agent", source="file:///models/agent")
    client.set_registered_model_alias("agent", "champion", 2)
    now, loaded = [0.0], list[str]()
    model = AliasedModel(
        "agent", loader=lambda uri: loaded.append(uri) or uri, clock=lambda: now[0]
    )
    assert model.get().value == "models:/agent/2"
    now[0] = 30
    assert model.get().value == "models:/agent/2"  # 版が同じなら、読み込み直さない
    client.set_registered_model_alias("agent", "champion", 1)
    now[0] = 60
    assert model.get().value == "models:/agent/1"
    assert loaded == ["models:/agent/2", "models:/agent/1"]


def test_a_model_is_never_loaded_from_another_registry_than_the_alias(
    tracking_uri: str, tmp_path: Path
) -> None:
    import mlflow

    client: Any = mlflow.MlflowClient()
    client.create_registered_model("agent")
    client.create_model_version("agent", source="file:///models/agent")
    client.set_registered_model_alias("agent", "champion", 1)
    mlflow.set_tracking_uri(f"sqlite:///{(tmp_path / 'other.db').as_posix()}")
    model = AliasedModel("agent", tracking_uri=tracking_uri)
    with pytest.raises(AliasUnavailableError, match=r"call mlflow\.set_registry_uri"):
        model.get()
    loaded = AliasedModel("agent", tracking_uri=tracking_uri, loader=lambda uri: uri)
    assert loaded.get().value == "models:/agent/1"


@pytest.mark.parametrize(
    ("uri", "registry"), [("databricks", None), ("sqlite:///m.db", "sqlite:///m.db")]
)
def test_a_prompt_of_databricks_is_read_from_unity_catalog(
    uri: str, registry: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def client(**places: Any) -> Any:
        asked.append(places)
        raise ConnectionError("not in a test")

    monkeypatch.setattr("mlflow.MlflowClient", client)
    with pytest.raises(AliasUnavailableError):
        AliasedPrompt("main.default.qa", tracking_uri=uri).get()
    assert asked == [{"tracking_uri": uri, "registry_uri": registry}]
