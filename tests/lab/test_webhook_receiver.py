"""Webhook の受信側が、台本どおりに答え、届いたものをそのまま残すこと。"""

from __future__ import annotations

import json
import socket
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest
import requests

from chapter8_samples._lab.servers.receivers import Answer, WebhookReceiver


def test_what_arrives_is_recorded_as_it_is(webhooks: WebhookReceiver) -> None:
    reply = requests.post(
        f"{webhooks.url}/services/T0/B0?x=1",
        json={"text": "遅延"},
        headers={"X-Key": "k"},
        timeout=5,
    )
    assert (reply.status_code, reply.text) == (200, "ok")
    (got,) = webhooks.wait_for(1)
    assert (got.path, got.json) == ("/services/T0/B0?x=1", {"text": "遅延"})
    assert got.headers["content-type"] == "application/json"
    assert got.headers["x-key"] == "k"
    assert json.loads(got.body) == got.json
    assert timedelta(0) <= datetime.now(timezone.utc) - got.at < timedelta(seconds=30)


def test_scripted_answers_come_in_order_then_200(webhooks: WebhookReceiver) -> None:
    webhooks.script(429, Answer(503, {"Retry-After": "3"}, b"down"), Answer(202, body=b"{}"))
    replies = [requests.post(webhooks.url, timeout=5) for _ in range(4)]
    assert [r.status_code for r in replies] == [429, 503, 202, 200]
    assert (replies[1].headers["Retry-After"], replies[1].text) == ("3", "down")


def test_one_connection_serves_many_requests(webhooks: WebhookReceiver) -> None:
    webhooks.script(500)
    with requests.Session() as session:
        replies = [session.post(webhooks.url, data=b"x", timeout=5) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [500, 200, 200]


def test_keep_alive_has_no_delayed_ack_pause(webhooks: WebhookReceiver) -> None:
    times: list[float] = []
    with requests.Session() as session:
        for _ in range(30):
            started = time.monotonic()
            session.post(webhooks.url, timeout=5)
            times.append(time.monotonic() - started)
    assert sorted(times)[9] < 0.035  # 遅延 ACK は、ほとんどの回で 40 ms。混んだ機械はときどき遅い


def test_reset_cuts_the_connection(webhooks: WebhookReceiver) -> None:
    webhooks.script(Answer(reset=True))
    with pytest.raises(requests.ConnectionError):
        requests.post(webhooks.url, json={}, timeout=5)
    assert len(webhooks.received) == 1
    assert requests.post(webhooks.url, timeout=5).status_code == 200


@pytest.mark.slow
def test_slow_answer_times_out_the_client_but_is_recorded(
    webhooks: WebhookReceiver, capfd: pytest.CaptureFixture[str]
) -> None:
    webhooks.script(Answer(delay_seconds=0.4))
    with pytest.raises(requests.ReadTimeout):
        requests.post(webhooks.url, json={}, timeout=0.1)
    assert len(webhooks.wait_for(1)) == 1
    started = time.monotonic()
    webhooks.script(Answer(delay_seconds=0.2))
    requests.post(webhooks.url, timeout=5)
    assert time.monotonic() - started >= 0.2
    assert capfd.readouterr().err == ""


def test_wait_for_wakes_up_when_it_arrives(webhooks: WebhookReceiver) -> None:
    threading.Timer(0.1, requests.post, (webhooks.url,), {"timeout": 5}).start()
    assert len(webhooks.wait_for(1)) == 1


def test_wait_for_says_how_many_came(webhooks: WebhookReceiver) -> None:
    requests.post(webhooks.url, timeout=5)
    with pytest.raises(TimeoutError, match=r"1 of 2 webhooks arrived in 0\.05 s"):
        webhooks.wait_for(2, timeout_seconds=0.05)


def test_parallel_senders_are_all_recorded(webhooks: WebhookReceiver) -> None:
    threads = [
        threading.Thread(target=requests.post, args=(webhooks.url, str(n)), kwargs={"timeout": 5})
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    assert {r.body for r in webhooks.wait_for(20)} == {str(n).encode() for n in range(20)}
    for thread in threads:
        thread.join()


def test_stop_closes_the_port_at_once_and_keeps_the_record() -> None:
    with WebhookReceiver() as hooks:
        port = int(hooks.url.rsplit(":", 1)[1])
        hooks.script(Answer(delay_seconds=30))
        thread = threading.Thread(target=_post_quietly, args=(hooks.url,))
        thread.start()
        hooks.wait_for(1)
        started = time.monotonic()
    thread.join(5)
    assert not thread.is_alive() and time.monotonic() - started < 5
    assert len(hooks.received) == 1
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def _post_quietly(url: str) -> None:
    try:
        requests.post(url, timeout=10)
    except requests.RequestException:
        return
