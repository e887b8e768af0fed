"""チャット画面の HTTP エンドポイント。"""

from __future__ import annotations

import json
from collections.abc import Iterator

import mlflow
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.shop.chat import create_app
from chapter8_samples._lab.shop.documents import load_questions
from chapter8_samples._lab.shop.support_bot import (
    PROMPT_ALIAS,
    PROMPT_NAME,
    SupportBot,
    register_releases,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def client(stub_llm: StubLlm, tracking_uri: str) -> Iterator[TestClient]:
    mlflow.set_experiment("chat")
    good, _ = register_releases()
    mlflow.MlflowClient().set_prompt_alias(PROMPT_NAME, PROMPT_ALIAS, int(good))
    with TestClient(create_app(SupportBot(OpenAI(max_retries=0)))) as client:
        yield client


def ask(client: TestClient, question: str) -> list[dict[str, str]]:
    response = client.post("/ask", json={"question": question, "session_id": "s-1"})
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


def test_page_needs_nothing_from_outside(client: TestClient) -> None:
    for path, words in {
        "/": "みどり商店",
        "/chat.css": "prefers-color-scheme",
        "/chat.js": "poll()",
    }.items():
        answer = client.get(path)
        assert (
            words in answer.text and "http://" not in answer.text and "https://" not in answer.text
        )
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_there_is_no_page_that_loads_from_outside_nor_a_panel(client: TestClient) -> None:
    for path in ("/docs", "/redoc", "/status"):  # 監視パネルは、操作を渡したときだけ
        assert client.get(path).status_code == 404


def test_thumbs_land_on_the_trace_of_the_answer(client: TestClient) -> None:
    question = load_questions()[2]
    *pieces, last = ask(client, question.question)
    assert question.expected_answer in "".join(piece["text"] for piece in pieces)
    body = {"trace_id": last["trace_id"], "is_positive": False, "comment": "知りたいことと違う"}
    assert client.post("/feedback", json=body).json() == {"stored": True}
    trace = mlflow.get_trace(last["trace_id"])
    assert trace is not None
    (assessment,) = trace.info.assessments
    assert assessment.feedback and assessment.feedback.value is False
    assert assessment.source.source_id == "web-user"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s-1"


def test_failure_of_the_llm_is_shown_and_traced(client: TestClient, stub_llm: StubLlm) -> None:
    stub_llm.set_faults(error_rate=1.0)
    failed, last = ask(client, "返品できますか")
    assert "もう一度送って" in failed["failure"]
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(last["trace_id"])
    assert trace is not None and trace.info.state.value == "ERROR"


def test_bad_input_is_refused(client: TestClient) -> None:
    bodies: list[tuple[str, dict[str, object]]] = [
        ("/ask", {"question": "", "session_id": "s"}),
        ("/ask", {"question": " \u3000\n", "session_id": "s"}),
        ("/ask", {"question": "あ" * 501, "session_id": "s"}),
        ("/ask", {"question": "\ud800", "session_id": "s"}),
        ("/feedback", {"trace_id": "", "is_positive": True}),
        ("/feedback", {"trace_id": "tr-1", "is_positive": "maybe"}),
    ]
    for path, body in bodies:
        headers = {"Content-Type": "application/json"}
        answer = client.post(path, content=json.dumps(body), headers=headers)
        assert answer.status_code == 422 and answer.json()["detail"], body
