"""画面のボタンを押すと、その応答のトレースに評価が付く(本物の Chromium)。"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from chromium import chromium
from mlflow.tracing.client import TracingClient

pytestmark = pytest.mark.slow


@pytest.fixture
def chat_url(stub_llm: Any, tracking_uri: str) -> Iterator[str]:
    import uvicorn
    from openai import OpenAI

    from chapter8_samples._lab.shop.chat import create_app
    from chapter8_samples._lab.shop.support_bot import (
        PROMPT_ALIAS,
        PROMPT_NAME,
        SupportBot,
        register_releases,
    )

    mlflow.set_experiment("chat-in-a-browser")
    good, _ = register_releases()
    mlflow.MlflowClient().set_prompt_alias(PROMPT_NAME, PROMPT_ALIAS, int(good))
    app = create_app(SupportBot(OpenAI(max_retries=0)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def test_a_click_in_chromium_lands_on_the_trace(chat_url: str) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.goto(chat_url)
        page.fill("#question", "返品の期限は何日ですか")
        page.click("#form button")
        trace_id = page.locator(".vote").last.get_attribute("data-trace", timeout=60_000)
        page.click('button[aria-label="役に立たなかった"]')
        page.wait_for_selector('button[aria-label="役に立たなかった"][aria-pressed="true"]')
        assert page.inner_text(".vote span") == "記録しました"
    assert trace_id is not None
    (assessment,) = TracingClient().get_trace_info(trace_id).assessments
    assert assessment.feedback is not None
    assert (assessment.name, assessment.feedback.value) == ("user_thumbs", False)
    assert assessment.source.source_id == "web-user"
