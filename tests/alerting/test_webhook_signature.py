"""署名: 正しいものだけを通し、書き換え、古いもの、再送を断る。"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from chapter8_samples._lab.servers.receivers import WebhookReceiver
from chapter8_samples.alerting.delivery import Alert, NotificationConfigError
from chapter8_samples.alerting.delivery.signature import (
    ReplayGuard,
    SignedWebhookNotificationHandler,
    WebhookRefusedError,
    sign,
    verify_signature,
)

# https://github.com/standard-webhooks の仕様にある例
VECTOR_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
VECTOR_ID, VECTOR_TIME = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330
VECTOR_BODY = b'{"test": 2432232314}'
VECTOR_SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def signed(secret: str, body: bytes, at: int, scheme: Any = "standard") -> dict[str, str]:
    signature = sign(secret, "m1", at, body, scheme)
    prefix = "webhook" if scheme == "standard" else "X-MLflow"
    name = "Id" if scheme == "standard" else "Delivery-Id"
    return {
        f"{prefix}-{name}": "m1",
        f"{prefix}-Timestamp": str(at),
        f"{prefix}-Signature": signature,
    }


def test_the_published_test_vector() -> None:
    assert sign(VECTOR_SECRET, VECTOR_ID, VECTOR_TIME, VECTOR_BODY) == VECTOR_SIGNATURE


@pytest.mark.parametrize("scheme", ["standard", "mlflow"])
def test_a_genuine_delivery_passes(scheme: Any) -> None:
    headers = signed("s3cret", b"{}", 1000, scheme)
    assert verify_signature("s3cret", headers, b"{}", scheme=scheme, now=1010) == "m1"


@pytest.mark.parametrize(
    ("changes", "body", "now", "reason"),
    [
        ({}, b"{ }", 1000, "bad_signature"),
        ({"webhook-Id": "m2"}, b"{}", 1000, "bad_signature"),
        ({"webhook-Timestamp": "1001"}, b"{}", 1000, "bad_signature"),
        ({"webhook-Signature": "v1,AAAA"}, b"{}", 1000, "bad_signature"),
        ({"webhook-Signature": "v1,あ"}, b"{}", 1000, "bad_signature"),
        ({}, b"{}", 1301, "stale"),
        ({}, b"{}", 699, "stale"),
        ({"webhook-Timestamp": "now"}, b"{}", 1000, "bad_timestamp"),
        ({"webhook-Timestamp": "²"}, b"{}", 1000, "bad_timestamp"),
        ({"webhook-Signature": ""}, b"{}", 1000, "missing_header"),
    ],
)
def test_a_forged_delivery_is_refused(
    changes: dict[str, str], body: bytes, now: int, reason: str
) -> None:
    headers = {**signed("s3cret", b"{}", 1000), **changes}
    with pytest.raises(WebhookRefusedError) as caught:
        verify_signature("s3cret", headers, body, now=now)
    assert caught.value.reason == reason


def test_a_key_rotation_is_accepted() -> None:
    headers = signed("new", b"{}", 1000)
    headers["webhook-Signature"] = (
        f"{sign('old', 'm1', 1000, b'{}')} {headers['webhook-Signature']}"
    )
    for secret in ("old", "new"):
        assert verify_signature(secret, headers, b"{}", now=1000)


def test_a_malformed_secret_is_refused_without_repeating_it() -> None:
    with pytest.raises(NotificationConfigError) as caught:
        sign("whsec_not*base64", "m", 1, b"")
    assert "not*base64" not in str(caught.value)


def test_what_we_send_can_be_verified_and_nothing_reveals_the_secret(
    webhooks: WebhookReceiver,
) -> None:
    handler = SignedWebhookNotificationHandler(f"{webhooks.url}/in", VECTOR_SECRET)
    assert handler.send(Alert(name="slow", summary="遅い")).ok
    (request,) = webhooks.received
    verify_signature(VECTOR_SECRET, dict(request.headers.items()), request.body)
    assert request.json["data"]["summary"] == "遅い"
    assert VECTOR_SECRET not in repr(handler)


@pytest.mark.slow
def test_a_live_signed_webhook_of_a_real_server_is_verified(
    webhooks: WebhookReceiver, tmp_path: Path
) -> None:
    import mlflow.genai
    from cryptography.fernet import Fernet

    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    settings = {
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    }
    with MlflowServer(tmp_path / "server", env={**os.environ, **settings}) as server:
        mlflow.set_tracking_uri(server.url)
        client: Any = mlflow.MlflowClient()
        client.create_webhook(
            name="ops",
            url=f"{webhooks.url}/hook",
            events=["prompt_alias.created", "budget_policy.exceeded"],
            secret="s3cret",
        )
        name = f"qa-{uuid.uuid4().hex[:6]}"
        mlflow.genai.register_prompt(name, "v1 {{q}}")
        mlflow.genai.set_prompt_alias(name, "production", 1)
        (request,) = webhooks.wait_for(1, timeout_seconds=30)
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    headers = dict(request.headers.items())
    verify_signature("s3cret", headers, request.body, scheme="mlflow")
    assert request.json["data"] == {"name": name, "alias": "production", "version": "1"}
    late = time.time() + 301
    for body, now, reason in (
        (request.body.replace(b"production", b"staging___"), None, "bad_signature"),
        (request.body, late, "stale"),
    ):
        with pytest.raises(WebhookRefusedError) as caught:
            verify_signature("s3cret", headers, body, scheme="mlflow", now=now)
        assert caught.value.reason == reason
    assert json.loads(request.body)["entity"] == "prompt_alias"


@pytest.mark.parametrize(
    ("header", "value", "reason"),
    [
        ("webhook-Timestamp", "9" * 5000, "bad_timestamp"),
        ("webhook-Timestamp", "9" * 400, "bad_timestamp"),
        ("webhook-Id", "\udc80", "bad_signature"),
        ("webhook-Signature", "v1,\udc80", "bad_signature"),
    ],
)
def test_hostile_headers_are_refused_and_not_a_crash(header: str, value: str, reason: str) -> None:
    headers = {**signed("s", b"{}", 1000), header: value}
    with pytest.raises(WebhookRefusedError) as caught:
        verify_signature("s", headers, b"{}", now=1000)
    assert caught.value.reason == reason


@pytest.mark.parametrize("secret", ["", "whsec_"])
def test_an_empty_secret_is_refused_because_anyone_could_sign_with_it(secret: str) -> None:
    with pytest.raises(NotificationConfigError):
        verify_signature(secret, signed("other", b"{}", 1000), b"{}", now=1000)
    with pytest.raises(NotificationConfigError):
        SignedWebhookNotificationHandler("https://example.com/hook", secret)


def test_a_notice_sent_again_keeps_its_id_even_after_a_restart(webhooks: WebhookReceiver) -> None:
    firing = Alert(name="slow", value=0.2)
    saved = TypeAdapter(Alert).dump_json(firing)  # 状態ファイルに残し、読み直す
    again = TypeAdapter(Alert).validate_json(saved)
    notices = [firing, again, replace(firing, value=0.3), replace(firing, status="resolved")]
    for notice in notices:
        handler = SignedWebhookNotificationHandler(webhooks.url, "s3cret")
        assert handler.send(notice).ok
    ids = [request.headers["webhook-id"] for request in webhooks.received]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    for request in webhooks.received:
        verify_signature("s3cret", dict(request.headers.items()), request.body)


def test_an_id_counts_as_seen_only_when_the_work_is_done(tmp_path: Path) -> None:
    guard, done = ReplayGuard(tmp_path / "seen.db"), list[int]()

    def receive(fails: bool) -> None:
        message_id = verify_signature("s", signed("s", b"{}", 1000), b"{}", now=1000)
        with guard.once(message_id):
            if fails:
                raise RuntimeError("500")
            done.append(1)

    with pytest.raises(RuntimeError):
        receive(fails=True)
    receive(fails=False)  # 相手が、同じ ID で送り直した
    with pytest.raises(WebhookRefusedError) as caught:
        receive(fails=False)
    assert (caught.value.reason, done) == ("replay", [1])


def test_a_second_worker_and_a_restart_know_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "seen.db"
    workers = [ReplayGuard(path) for _ in range(2)]
    with (
        workers[0].once("m1"),
        pytest.raises(WebhookRefusedError, match="replay"),
        workers[1].once("m1"),
    ):
        pytest.fail("two workers on one delivery")
    for guard in (workers[1], ReplayGuard(path)):
        with pytest.raises(WebhookRefusedError, match="replay"), guard.once("m1"):
            pytest.fail("done twice")


def test_the_work_of_a_crashed_worker_is_taken_over_after_its_lease(tmp_path: Path) -> None:
    now = [1000.0]
    path = tmp_path / "seen.db"
    crashed = ReplayGuard(path, clock=lambda: now[0]).once("m1", lease_seconds=60)
    crashed.__enter__()
    now[0] += 61
    with ReplayGuard(path, clock=lambda: now[0]).once("m1"):
        pass
    now[0] += 599
    with (
        pytest.raises(WebhookRefusedError, match="replay"),
        ReplayGuard(path, clock=lambda: now[0]).once("m1"),
    ):
        pytest.fail("done twice")


def test_a_late_failure_does_not_forget_what_another_worker_has_done(tmp_path: Path) -> None:
    now = [1000.0]
    guard = ReplayGuard(tmp_path / "seen.db", clock=lambda: now[0])
    with pytest.raises(RuntimeError), guard.once("m1", lease_seconds=60):
        now[0] += 61
        with guard.once("m1"):  # 期限が過ぎたので、ほかのワーカーが済ませた
            pass
        raise RuntimeError
    with pytest.raises(WebhookRefusedError, match="replay"), guard.once("m1"):
        pytest.fail("done twice")


def test_of_many_racing_workers_one_does_the_work(tmp_path: Path) -> None:
    path, done = tmp_path / "seen.db", list[int]()

    def work(number: int) -> None:
        with contextlib.suppress(WebhookRefusedError), ReplayGuard(path).once("m1"):
            done.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(done) == 1
