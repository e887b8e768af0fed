"""配送: 429、5xx、遅い応答、切断のもとで、届く、重ならない、漏らさない。"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.policy import SMTP
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ports import free_port

from chapter8_samples._lab.servers.http_server import LoopbackServer
from chapter8_samples._lab.servers.receivers import Answer, WebhookReceiver
from chapter8_samples.alerting.delivery import (
    Alert,
    AlertmanagerNotificationHandler,
    AlertSeverity,
    AlertStatus,
    Delivery,
    EmailNotificationHandler,
    NotificationConfigError,
    NotificationHandler,
    RetryPolicy,
    TeamsNotificationHandler,
    json_bytes,
    slack_message,
)
from chapter8_samples.alerting.delivery.fanout import ChannelQueue
from chapter8_samples.alerting.delivery.texts import slack_escape
from chapter8_samples.alerting.notification_handlers import (
    ConsoleNotificationHandler,
    MultiChannelNotifier,
    PagerDutyNotificationHandler,
    SlackNotificationHandler,
)

SECRET = "/services/T0SECRET/B0SECRET/XyZsecret"
KEY = "R0UT1NGKEY" * 3 + "99"
# 普通の答えを待ちきれないことのない長さ。遅い答えを試すときだけ SHORT と LATE を使う
FAST = RetryPolicy(timeout_seconds=10)
SHORT, LATE = RetryPolicy(timeout_seconds=1.0), Answer(200, delay_seconds=4.0)


class Clock:
    """待つと進む時計。実際には待たない。"""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def slack(hooks: WebhookReceiver, clock: Clock, **more: Any) -> SlackNotificationHandler:
    options: dict[str, Any] = {"policy": FAST, "clock": clock, "sleep": clock.sleep, **more}
    return SlackNotificationHandler(hooks.url + SECRET, **options)


def pagerduty(
    hooks: WebhookReceiver, clock: Clock, policy: RetryPolicy = FAST
) -> PagerDutyNotificationHandler:
    return PagerDutyNotificationHandler(
        KEY, base_url=hooks.url, policy=policy, clock=clock, sleep=clock.sleep
    )


NO_URLS = ("hooks.slack.com", "ftp://x", "https://", "https://[bad", "https://h:port")
ALERT = Alert(name="high_error_rate", severity=AlertSeverity.CRITICAL, summary="boom", value=0.2)


def test_a_rate_limited_post_waits_as_long_as_it_is_told(
    webhooks: WebhookReceiver, clock: Clock
) -> None:
    webhooks.script(Answer(429, {"Retry-After": "7"}), 200)
    delivery = slack(webhooks, clock).send(ALERT)
    assert (delivery.ok, delivery.attempts, clock.slept) == (True, 2, [7.0])


def test_a_retry_after_date_is_understood_and_capped() -> None:
    def pause(header: str, **policy: float) -> float:
        return RetryPolicy(**policy).pause_seconds(1, header, 1.0)  # type: ignore[arg-type]

    later = datetime.now(timezone.utc) + timedelta(hours=1)
    date = format_datetime(later, usegmt=True)
    assert pause(date, cap_seconds=7200) == pytest.approx(3600, abs=5)
    assert pause(date) == pause("9" * 400) == 30.0
    assert pause(format_datetime(later - timedelta(days=1), usegmt=True)) == 0.0
    for unreadable in ("-3", "soon", "", "Mon, 99 Nov 9999999999 12:00:00 GMT"):
        assert pause(unreadable) == 0.5  # 指数バックオフ


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 301])
def test_a_refusal_is_not_repeated(webhooks: WebhookReceiver, clock: Clock, status: int) -> None:
    webhooks.script(Answer(status, {"Location": "/elsewhere"}, body=b"invalid_payload"))
    delivery = slack(webhooks, clock).send(ALERT)
    assert (delivery.ok, delivery.attempts, delivery.retryable) == (False, 1, False)
    assert delivery.error == f"HTTP {status} from 127.0.0.1: invalid_payload"
    assert len(webhooks.received) == 1


@pytest.mark.slow
def test_a_slow_answer_is_posted_once_to_slack_and_again_to_pagerduty(
    webhooks: WebhookReceiver, clock: Clock
) -> None:
    webhooks.script(LATE, LATE)
    delivery = slack(webhooks, clock, policy=SHORT).send(ALERT)
    assert (delivery.ok, delivery.attempts, delivery.retryable) == (False, 1, False)
    delivery = pagerduty(webhooks, clock, SHORT).send(ALERT)
    assert (delivery.ok, delivery.attempts) == (True, 2)
    events = [r.json for r in webhooks.wait_for(3)[1:]]
    assert len({event["dedup_key"] for event in events}) == 1


def test_a_cut_connection_is_tried_once_more_even_where_copies_count(
    webhooks: WebhookReceiver, clock: Clock
) -> None:
    webhooks.script(Answer(reset=True), 200, Answer(reset=True), Answer(reset=True), 200)
    handler = slack(webhooks, clock)
    assert [(d.ok, d.attempts) for d in (handler.send(ALERT), handler.send(ALERT))] == [
        (True, 2),
        (False, 2),
    ]
    assert repr(handler.poster) == "HttpPoster(host='127.0.0.1')"


def test_a_dead_host_is_retried_and_stays_retryable(clock: Clock) -> None:
    with WebhookReceiver() as hooks:
        handler = slack(hooks, clock)
    delivery = handler.send(ALERT)
    assert (delivery.ok, delivery.attempts, delivery.retryable) == (False, 4, True)


def gateway(answer: bytes) -> str:
    """一言だけ答えて(何も答えずに)切る相手の、ホストとポート。"""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_what_never_left_this_machine_is_retried_and_what_may_have_arrived_is_not_doubled(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses, cuts = gateway(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"), gateway(b"")
    cases = [  # (URL, プロキシ, Slack の試行と後での送り直し, PagerDuty の)
        ("https://hooks.test", f"127.0.0.1:{free_port()}", (4, True), (4, True)),
        ("https://hooks.test", refuses, (4, True), (4, True)),  # CONNECT を断られた
        ("http://hooks.test", cuts, (2, False), (4, True)),  # プロキシは、受け取ってから切った
        (f"https://{cuts}", "", (2, False), (4, True)),  # TLS の握手の途中で切られた
    ]
    for url, proxy, chat, page in cases:
        monkeypatch.setenv("no_proxy", "" if proxy else "*")
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.setenv("https_proxy", f"http://{proxy}")
        options: dict[str, Any] = {"policy": FAST, "clock": clock, "sleep": clock.sleep}
        sent = SlackNotificationHandler(url, **options).send(ALERT)
        paged = PagerDutyNotificationHandler(KEY, base_url=url, **options).send(ALERT)
        assert (sent.attempts, sent.retryable) == chat, (url, proxy, sent.error)
        assert (paged.attempts, paged.retryable) == page, (url, proxy, paged.error)


def test_an_expired_certificate_may_be_renewed(
    clock: Clock, certificate: tuple[Path, Path]
) -> None:
    server = LoopbackServer(lambda _: Answer(), tls=certificate)  # 知らない CA の証明書
    url = f"https://127.0.0.1:{server.server_port}/a"
    delivery = SlackNotificationHandler(url, clock=clock, sleep=clock.sleep).send(ALERT)
    server.stop()
    assert (delivery.ok, delivery.attempts, delivery.retryable) == (False, 4, True)


def test_the_deadline_ends_the_retries(webhooks: WebhookReceiver, clock: Clock) -> None:
    webhooks.script(*[Answer(503, {"Retry-After": "25"})] * 9)
    policy = RetryPolicy(attempts=9, deadline_seconds=60)
    delivery = slack(webhooks, clock, policy=policy).send(ALERT)
    assert (delivery.ok, delivery.attempts, clock.now) == (False, 3, 50.0)


@pytest.mark.parametrize(
    "answer", [400, 500, Answer(reset=True), pytest.param(LATE, marks=pytest.mark.slow)]
)
def test_no_secret_appears_in_a_log_a_repr_or_a_result(
    webhooks: WebhookReceiver, clock: Clock, caplog: pytest.LogCaptureFixture, answer: int | Answer
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = Answer(400, body=f"bad key {KEY} at {SECRET}".encode())
    webhooks.script(answer, echo, answer, echo)
    policy = SHORT if answer is LATE else FAST
    handlers = [slack(webhooks, clock, policy=policy), pagerduty(webhooks, clock, policy)]
    notifier = MultiChannelNotifier()
    for i, handler in enumerate(handlers):
        notifier.add_handler(f"h{i}", handler)
    seen = [repr(handlers), repr(notifier.notify(ALERT)), caplog.text]
    assert "POST" in caplog.text  # urllib3 は DEBUG でパスを書く: 消えているのはパスだけ
    for secret in (SECRET, "XyZsecret", KEY):
        assert not any(secret in text for text in seen)


@pytest.mark.parametrize("url", [None, "", *(f"{start}/SECRET" for start in NO_URLS)])
def test_what_is_no_url_is_refused_without_showing_it(url: Any) -> None:
    with pytest.raises(NotificationConfigError) as caught:
        SlackNotificationHandler(url)
    assert "SECRET" not in str(caught.value)


class Broken(NotificationHandler):
    def deliver(self, alert: Alert) -> Delivery:
        raise RuntimeError(f"cannot post to https://hooks.example{SECRET}")


class Forgetful(NotificationHandler):
    """戻り値を忘れたハンドラー。"""

    def deliver(self, alert: Alert) -> Delivery:
        return cast("Delivery", None)


class Leaving(NotificationHandler):
    """コマンドの ``main`` を呼ぶハンドラー。"""

    def deliver(self, alert: Alert) -> Delivery:
        sys.exit(2)


def test_a_faulty_handler_neither_stops_the_others_nor_quotes_its_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[str] = []
    notifier = MultiChannelNotifier().add_handler("broken", Broken())
    notifier.add_handler("forgetful", Forgetful()).add_handler("leaving", Leaving())
    notifier.add_handler("console", ConsoleNotificationHandler(lines.append))
    results = {d.handler: (d.ok, d.error) for d in notifier.notify(ALERT)}
    assert results == {
        "broken": (False, "raised RuntimeError"),
        "forgetful": (False, "raised AttributeError"),
        "leaving": (False, "raised SystemExit"),
        "console": (True, ""),
    }
    assert len(lines) == 1
    assert "alert high_error_rate not sent by broken: raised RuntimeError" in caplog.text


def test_an_alert_nobody_took_goes_to_the_fallback(
    webhooks: WebhookReceiver, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert [d.handler for d in MultiChannelNotifier().notify(ALERT)] == ["console"]
    warning = replace(ALERT, name="slow_p95", severity=AlertSeverity.WARNING)
    for handler, ok, skipped in (
        (Broken(), False, ""),
        (pagerduty(webhooks, clock), True, "severity warning is below error"),
    ):
        caplog.clear()
        notifier = MultiChannelNotifier().add_handler("only", handler)
        tried, told = notifier.notify(warning)
        assert (tried.ok, tried.skipped, told.ok) == (ok, skipped, True)
        assert "WARNING slow_p95" in caplog.text
    assert webhooks.received == []


def test_routing_follows_the_severity_and_never_drops_what_was_not_listed() -> None:
    notifier = MultiChannelNotifier()
    sent: dict[str, list[str]] = {"page": [], "chat": [], "late": []}
    for name, lines in sent.items():  # late は、経路を決めた後で加える
        if name == "late":
            notifier.set_severity_routing({AlertSeverity.WARNING: ["chat"]})
        notifier.add_handler(name, ConsoleNotificationHandler(lines.append))
    notifier.notify([replace(ALERT, severity=AlertSeverity.WARNING), ALERT])
    assert {name: len(lines) for name, lines in sent.items()} == {"page": 1, "chat": 2, "late": 1}
    with pytest.raises(NotificationConfigError, match=r"unknown handlers \['pager'\]"):
        notifier.set_severity_routing({"critical": ["pager"]})
    with pytest.raises(NotificationConfigError, match=r"must be a list, got 'c'; write \['c'\]"):
        notifier.add_handler("c", ConsoleNotificationHandler(print))
        notifier.set_severity_routing({"critical": "c"})


def test_keep_alive_does_not_report_what_it_did_not_have_to_send(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class EveryCycle(ConsoleNotificationHandler):
        wants_every_cycle = True

    notifier = MultiChannelNotifier()
    notifier.add_handler("log", ConsoleNotificationHandler(list[str]().append))
    notifier.add_handler("alertmanager", EveryCycle(list[str]().append))
    notifier.set_severity_routing({"warning": ["log"], "critical": ["alertmanager"]})
    assert notifier.keep_alive([replace(ALERT, severity=AlertSeverity.WARNING)]) == []
    assert caplog.text == ""


def test_a_resolution_says_that_its_text_is_from_the_firing() -> None:
    lines = list[str]()
    resolved = replace(ALERT, status=AlertStatus.RESOLVED, summary="エラー率が 21% です")
    ConsoleNotificationHandler(lines.append).deliver(resolved)
    assert "[解消]" in lines[0] and "発報時の内容: エラー率が 21% です" in lines[0]


def test_pagerduty_opens_and_closes_one_incident(webhooks: WebhookReceiver, clock: Clock) -> None:
    handler = pagerduty(webhooks, clock)
    handler.send(ALERT)
    handler.send(replace(ALERT, status=AlertStatus.RESOLVED))
    trigger, resolve = (r.json for r in webhooks.received)
    assert (trigger["event_action"], resolve["event_action"]) == ("trigger", "resolve")
    assert trigger["dedup_key"] == resolve["dedup_key"] == ALERT.fingerprint
    assert "payload" not in resolve
    assert {r.path for r in webhooks.received} == {"/v2/enqueue"}


def test_a_change_event_has_its_own_endpoint_and_no_action(
    webhooks: WebhookReceiver, clock: Clock
) -> None:
    at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert pagerduty(webhooks, clock).change_event("v3 -> v2", details={"at": at}).ok
    (request,) = webhooks.received
    assert request.path == "/v2/change/enqueue"
    assert set(request.json) == {"routing_key", "payload"}
    assert "severity" not in request.json["payload"]
    assert request.json["payload"]["custom_details"] == {"at": "2026-01-01T00:00:00+00:00"}


SLACK = SlackNotificationHandler("https://x.example/y")
PAGERDUTY = PagerDutyNotificationHandler(KEY)
TEAMS = TeamsNotificationHandler("https://x.example/workflow?sig=x")
CHANNELS = (SLACK, PAGERDUTY, TEAMS, AlertmanagerNotificationHandler("https://x.example"))
ANY_TEXT = st.text(max_size=6000)
unhurried = settings(suppress_health_check=[HealthCheck.too_slow])


def texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


@unhurried
@given(ANY_TEXT, st.integers(8, 3000))
def test_slack_text_is_harmless_and_fits_for_any_unicode(text: str, limit: int) -> None:
    escaped = slack_escape(text, limit)
    assert len(escaped) <= limit
    assert "<" not in escaped and ">" not in escaped
    rest = escaped.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "")
    assert "&" not in rest  # 実体参照の途中では切らない
    whole = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if len(whole) <= limit:
        assert escaped == whole
    else:  # 入りきらない実体参照は、残りの幅があっても置かない
        assert escaped.endswith("…") and whole.startswith(escaped[:-1])


@unhurried
@given(ANY_TEXT, ANY_TEXT, st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=12))
def test_every_slack_message_stays_within_the_limits(
    name: str, summary: str, labels: dict[str, str]
) -> None:
    message = slack_message(
        Alert(name=name, summary=summary, labels=labels, examples=("t" * 300,) * 9)
    )
    header, *rest = message["blocks"]
    assert 1 <= len(header["text"]["text"]) <= 150
    assert len(message["blocks"]) <= 50 and len(message["text"]) <= 3000
    for block in rest:
        assert len(block.get("fields", [])) <= 10 and len(block.get("elements", [])) <= 10
        assert all(1 <= len(f["text"]) <= 2000 for f in block.get("fields", []))
        if "text" in block:
            assert 1 <= len(block["text"]["text"]) <= 3000
    assert not any("<!" in text or "<@" in text for text in texts(message["blocks"][1:]))


@unhurried
@given(ANY_TEXT, ANY_TEXT, st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=12))
def test_every_pagerduty_event_stays_within_the_limits(
    name: str, summary: str, labels: dict[str, str]
) -> None:
    event = PAGERDUTY.payload(
        Alert(name=name, summary=summary, labels=labels, fingerprint="f" * 400)
    )
    assert len(event["dedup_key"]) <= 255
    assert 1 <= len(event["payload"]["summary"]) <= 1024
    assert len(event["payload"]["source"]) <= 255
    assert event["payload"]["severity"] in {"critical", "error", "warning", "info"}


@unhurried
@given(ANY_TEXT, ANY_TEXT, st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=30))
def test_every_teams_card_stays_below_the_size_limit(
    name: str, summary: str, labels: dict[str, str]
) -> None:
    card = TEAMS.payload(Alert(name=name, summary=summary, labels=labels))
    assert len(json_bytes(card)) <= 21_000


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(days=1)])
def test_alertmanager_learns_when_an_alert_ends_even_from_a_clock_that_was_ahead(
    webhooks: WebhookReceiver, ahead: timedelta
) -> None:
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    handler = AlertmanagerNotificationHandler(webhooks.url, clock=lambda: now)
    firing = replace(ALERT, starts_at=now + ahead)
    handler.send(firing)
    handler.send(replace(firing, status=AlertStatus.RESOLVED, ends_at=now + ahead))
    first, last = (r.json[0] for r in webhooks.received)
    assert first["startsAt"] == last["startsAt"] == last["endsAt"] == "2026-01-01T00:00:00+00:00"
    assert first["endsAt"] == "2026-01-01T00:05:00+00:00"
    assert first["labels"] == last["labels"]


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["pagerduty", "slack"])
def test_a_thousand_alerts_survive_a_bad_network(webhooks: WebhookReceiver, channel: str) -> None:
    rng = random.Random(8)
    bad = [
        Answer(429, {"Retry-After": "0"}),
        Answer(500),
        Answer(503),
        Answer(reset=True),
        Answer(delay_seconds=0.12),
    ]
    script = [rng.choice(bad) if rng.random() < 0.3 else Answer(200) for _ in range(3000)]
    webhooks.script(*script)
    clock = Clock()
    policy = RetryPolicy(attempts=12, base_seconds=0.001, timeout_seconds=0.06)
    handler: NotificationHandler = SlackNotificationHandler(
        webhooks.url + SECRET, policy=policy, clock=clock, sleep=clock.sleep
    )
    if channel == "pagerduty":
        handler = PagerDutyNotificationHandler(
            KEY, base_url=webhooks.url, policy=policy, clock=clock, sleep=clock.sleep
        )
    alerts = [replace(ALERT, name=f"a{i}", fingerprint=f"f{i}") for i in range(1000)]
    results, spent = list[Delivery](), list[float]()
    for alert in alerts:
        began = clock()
        results.append(handler.send(alert))
        spent.append(clock() - began)
    key = {"pagerduty": "dedup_key", "slack": "text"}[channel]

    def taken() -> list[str]:  # 断らずに受け取ったもの(返事が遅い、または切れたものを含む)
        pairs = zip(list(webhooks.received), script, strict=False)
        return [request.json[key] for request, answer in pairs if answer.status == 200]

    give_up = time.monotonic() + 20  # 返事を待つのをやめたリクエストを、受け手が読み終えるまで
    while len(set(taken())) < 1000 and time.monotonic() < give_up:
        time.sleep(0.05)
    copies = Counter(taken())
    assert len(copies) == 1000  # 一つも失われない
    assert max(spent) <= policy.deadline_seconds
    if channel == "pagerduty":
        assert all(delivery.ok for delivery in results)  # 重複は dedup_key が吸収する
    else:
        assert max(copies.values()) <= 2
        assert not any(d.retryable for d in results)  # 届いたかもしれないものは、後でも送らない


def whole_request(connection: socket.socket) -> bytes:
    """本文まで読む。残したまま閉じると、答えではなく切断として届く。"""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head + body


def half_answered(status: str, body: bytes, linger: bool) -> tuple[str, list[bytes]]:
    """本文の途中で黙る(``linger``)か切る相手。受け取ったリクエストも返す。"""
    listener, got = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def answer() -> None:
        for _ in range(8):
            connection, _address = listener.accept()
            with connection:
                got.append(whole_request(connection))
                connection.sendall(f"HTTP/1.1 {status}\r\nConnection: close\r\n".encode() + body)
                time.sleep(4.0 if linger else 0.0)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}{SECRET}", got


@pytest.mark.parametrize(
    ("status", "body", "linger", "ok", "requests_seen"),
    [
        pytest.param(
            "200 OK", b"Content-Length: 100\r\n\r\no", True, True, 1, marks=pytest.mark.slow
        ),
        ("200 OK", b"Content-Length: 100\r\n\r\no", False, True, 1),
        ("500 X", b"Content-Length: 100\r\n\r\nno", False, False, 4),
        ("503 X", b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", False, False, 4),
    ],
)
def test_a_broken_reply_body_changes_nothing_about_the_status(
    status: str, body: bytes, linger: bool, ok: bool, requests_seen: int, clock: Clock
) -> None:
    url, got = half_answered(status, body, linger)
    policy = SHORT if linger else FAST
    delivery = SlackNotificationHandler(url, policy=policy, clock=clock, sleep=clock.sleep).send(
        ALERT
    )
    assert (delivery.ok, delivery.attempts, len(got)) == (ok, requests_seen, requests_seen)
    assert delivery.retryable is not ok


def test_a_lone_surrogate_is_delivered_as_a_question_mark(clock: Clock) -> None:
    alert = replace(ALERT, summary="broken \ud800 text", labels={"service": "\ud800"})
    with WebhookReceiver() as hooks:
        assert slack(hooks, clock).send(alert).ok
        assert "broken ? text" in hooks.received[0].json["text"]
    assert Alert(name="x", labels={"service": "\ud800"}).fingerprint


def test_a_pagerduty_event_stays_below_512_kilobytes() -> None:
    sizes = (1980, 9000) * 6
    text = "\x01" * 5000  # JSON では 1 文字が 6 バイトになる
    huge = replace(
        ALERT,
        name=text,
        labels={f"{i}{text}": text for i in range(300)},
        links={f"{i}{text}": "https://x/" + "\x01" * size for i, size in enumerate(sizes)},
        examples=(text,) * 20,
    )
    event = PAGERDUTY.payload(huge)
    assert len(json.dumps(event)) < 512_000
    assert len(event["links"]) == 6 and all(len(link["href"]) <= 2000 for link in event["links"])


def test_teams_and_mail_show_the_runbook_and_the_example_traces() -> None:
    alert = replace(
        ALERT,
        examples=("tr-1", "tr-2"),
        links={"tr-1": "https://ui/#/tr-1"},
        runbook_url="https://wiki/errors",
    )
    card = TeamsNotificationHandler("https://x/y").payload(alert)["attachments"][0]["content"]
    assert card["body"][-1]["text"] == (
        "[runbook](https://wiki/errors) / [tr-1](https://ui/#/tr-1) / tr-2"
    )
    mail = EmailNotificationHandler("h", sender="a@b.example", to=["c@d.example"])
    assert "runbook: https://wiki/errors" in mail.message(alert).get_content()


@pytest.mark.parametrize("path", ["/services/T0%7eSECRET%2d1", "/a b/é?sig=é0SECRET%7e1&v=1"])
def test_a_path_that_is_encoded_again_on_the_way_is_hidden_in_both_forms(
    path: str, webhooks: WebhookReceiver, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = path.partition("&")[0][-15:]
    webhooks.script(Answer(404, body=f"no hook {key}".encode()))
    handler = SlackNotificationHandler(webhooks.url + path, clock=clock, sleep=clock.sleep)
    assert "SECRET" not in handler.send(ALERT).error
    assert "POST" in caplog.text and "SECRET" not in caplog.text
    assert webhooks.received[0].path != path  # 通信路では別の形になる


@pytest.mark.parametrize("start", range(150, 200, 7))
def test_a_reply_cut_in_the_middle_of_a_secret_shows_no_part_of_it(
    start: int, webhooks: WebhookReceiver, clock: Clock
) -> None:
    webhooks.script(Answer(404, body=b"x" * start + f" {SECRET} not found".encode()))
    error = slack(webhooks, clock).send(ALERT).error
    assert "T0SECRET" not in error and "/services" not in error and len(error) < 300


def test_a_reply_that_quotes_only_the_key_of_the_url_is_hidden_too(
    webhooks: WebhookReceiver, clock: Clock
) -> None:
    webhooks.script(Answer(404, body=b"no hook XyZsecret in this workspace"))
    assert slack(webhooks, clock).send(ALERT).error.endswith("no hook *** in this workspace")


def test_a_decoded_key_and_a_path_before_a_fragment_are_hidden(
    webhooks: WebhookReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="urllib3")
    path = "/h;key1?a=1&sig=Q9%2Bdecoded%2F"
    webhooks.script(Answer(404, body=f"{path}: no Q9+decoded/ here".encode()))
    error = SlackNotificationHandler(f"{webhooks.url}{path}#top").send(ALERT).error
    assert error.endswith(": ***: no *** here")
    assert "POST " in caplog.text and "key1" not in caplog.text


@pytest.mark.slow
def test_one_try_never_takes_longer_than_the_deadline(webhooks: WebhookReceiver) -> None:
    webhooks.script(LATE, LATE)
    policy = RetryPolicy(timeout_seconds=30.0, deadline_seconds=1.0)
    handler = PagerDutyNotificationHandler(KEY, base_url=webhooks.url, policy=policy)
    began = time.monotonic()
    delivery = handler.send(ALERT)
    assert (delivery.ok, delivery.retryable) == (False, True)
    assert time.monotonic() - began < 3.5  # 返事(4 秒)も timeout(30 秒)も待っていない


ANY_CHARACTER = st.text(st.characters(), max_size=300)  # 対になっていないサロゲートも含む


@unhurried
@given(ANY_CHARACTER, ANY_CHARACTER, st.dictionaries(ANY_CHARACTER, ANY_CHARACTER, max_size=3))
def test_any_character_survives_every_channel(
    name: str, summary: str, labels: dict[str, str]
) -> None:
    alert = Alert(name=name, summary=summary, labels=labels, examples=(name,), links={name: name})
    mail = EmailNotificationHandler("h", sender="a@b.example", to=["c@d.example"]).message(alert)
    assert mail.as_bytes(policy=SMTP)
    for handler in CHANNELS:
        json.loads(json_bytes(handler.payload(alert)))
    lines: list[str] = []
    assert ConsoleNotificationHandler(lines.append).send(alert).ok
    assert len(lines[0].encode().splitlines()) == 1


def test_a_console_that_cannot_show_a_character_still_shows_the_alert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="cp932", write_through=True))
    assert ConsoleNotificationHandler().send(replace(ALERT, summary="発報 \U0001f525 \ud800")).ok
    assert "発報 ? ?" in raw.getvalue().decode("cp932")


def test_slack_names_each_link_once_and_cuts_no_address() -> None:
    urls = {"long": "https://x.example/" + "y" * 900, "pipe": "https://x.example/|a"}
    alert = replace(ALERT, examples=("tr-1", "tr-2"), links={"tr-1": "https://ui/1", **urls})
    elements = slack_message(alert)["blocks"][-1]["elements"]
    assert [e["text"] for e in elements] == [
        "<https://ui/1|tr-1>",
        "tr-2",
        "long",
        "<https://x.example/%7Ca|pipe>",
    ]


def test_pagerduty_always_has_a_source() -> None:
    event = PagerDutyNotificationHandler(KEY).payload(replace(ALERT, labels={"service": ""}))
    assert event["payload"]["source"] == "llm-app"


class Slow(NotificationHandler):
    """許されるまで返らない通知先。"""

    def __init__(self) -> None:
        self.go, self.sent = threading.Event(), list[str]()

    def deliver(self, alert: Alert) -> Delivery:
        assert self.go.wait(30)
        self.sent.append(f"{alert.name} {alert.status.value}")
        return self.result(alert, ok=True)


def six() -> list[Alert]:
    return [replace(ALERT, name=f"a{i}", fingerprint=f"f{i}") for i in range(6)]


@pytest.fixture
def slow() -> Iterator[Slow]:
    handler = Slow()
    yield handler
    handler.go.set()  # 送り終えないと、プロセスが終わらない


def slow_and_fast(slow: Slow, wait_seconds: float = 0.2) -> tuple[MultiChannelNotifier, list[str]]:
    notifier, lines = MultiChannelNotifier(wait_seconds=wait_seconds), list[str]()
    notifier.add_handler("slow", slow)
    notifier.add_handler("page", ConsoleNotificationHandler(lines.append))
    return notifier, lines


def slow_only(alerts: list[Alert]) -> dict[str, list[str]]:
    return {alert.fingerprint: ["slow"] for alert in alerts}


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_hanging_channel_delays_neither_the_others_nor_the_caller(
    slow: Slow, one_by_one: bool
) -> None:
    notifier, lines = slow_and_fast(slow)
    started = time.monotonic()
    batches = [[alert] for alert in six()] if one_by_one else [six()]
    results = [d for batch in batches for d in notifier.notify(batch)]
    assert time.monotonic() - started < 20  # 返らない通知先を待ち続けない
    assert len(lines) == 6 and slow.sent == []
    assert [d.ok for d in results if d.handler == "page"] == [True] * 6
    waiting = [d for d in results if d.handler == "slow"]
    assert [(d.ok, d.retryable, d.pending) for d in waiting] == [(False, True, True)] * 6


def test_what_was_pending_is_sent_once_in_order_and_its_result_can_be_asked_for(
    slow: Slow, caplog: pytest.LogCaptureFixture
) -> None:
    notifier, _ = slow_and_fast(slow)
    fired = six()
    ended = [replace(alert, status=AlertStatus.RESOLVED) for alert in fired]
    for batch in (fired, ended):
        notifier.notify(batch)
    for _ in range(2):  # 送り直しても、列にあるものは増えない
        assert all(d.pending for d in notifier.notify(fired, only=slow_only(fired)))
    slow.go.set()
    notifier.wait_seconds = 30.0
    wanted = [f"a{i} {status}" for status in ("firing", "resolved") for i in range(6)]
    give_up = time.monotonic() + 30
    while len(slow.sent) < 12 and time.monotonic() < give_up:
        time.sleep(0.01)
    results = notifier.notify([*fired, *ended], only=slow_only(fired))
    assert slow.sent == wanted
    assert [d.ok for d in results] == [True] * 12
    assert "high_error_rate" not in caplog.text  # 送っている途中のものを、失われたとは言わない


def test_what_stop_took_back_is_reported_at_once(slow: Slow) -> None:
    notifier, _ = slow_and_fast(slow)
    notifier.notify(six())
    threading.Timer(0.2, slow.go.set).start()  # 送っている途中の 1 件だけは、待つ
    notifier.stop()
    notifier.wait_seconds = 30.0
    started = time.monotonic()
    results = notifier.notify(six(), only=slow_only(six()))
    assert time.monotonic() - started < 10
    assert slow.sent == ["a0 firing"]
    assert [(d.ok, d.retryable) for d in results if d.handler == "slow"][1:] == [(False, True)] * 5


def test_a_reminder_is_sent_even_if_the_first_result_was_never_asked_for(slow: Slow) -> None:
    notifier, _ = slow_and_fast(slow)
    notifier.notify(ALERT)
    slow.go.set()
    notifier.wait_seconds = 30.0
    notifier.notify(replace(ALERT, name="next", fingerprint="next"))
    give_up = time.monotonic() + 30
    while len(slow.sent) < 2 and time.monotonic() < give_up:
        time.sleep(0.01)
    notifier.notify(ALERT)
    assert slow.sent.count("high_error_rate firing") == 2


def test_queued_alerts_are_sent_before_the_process_ends(webhooks: WebhookReceiver) -> None:
    webhooks.script(Answer(delay_seconds=0.2))
    code = (
        "from chapter8_samples.alerting import *\n"
        "notifier = MultiChannelNotifier(wait_seconds=0.0)\n"
        f"notifier.add_handler('s', SlackNotificationHandler({webhooks.url!r} + '/a/b'))\n"
        "notifier.notify([Alert(name=f'a{i}') for i in range(3)])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert [r.json["text"].split()[-1] for r in webhooks.received] == ["a0", "a1", "a2"]


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


LOOP: dict[str, Any] = {}
LOOP["self"] = LOOP
ODD = st.floats() | st.integers() | st.text() | st.binary() | st.tuples(st.integers()) | st.none()


@pytest.mark.parametrize(
    "details",
    [
        {"diff": "x" * 2_000_000},
        {f"{i}" * 400: ["\x01" * 5000] * 500 for i in range(500)},
        {"rate": float("nan"), "limit": float("inf")},
        {("support", 3): {"a", "b"}, 7: b"bytes", None: 10**5000},
        {"odd": Unprintable(), "severity": AlertSeverity.ERROR, "loop": LOOP},
    ],
)
def test_any_details_of_a_change_are_limited_and_valid(
    webhooks: WebhookReceiver, clock: Clock, details: Any
) -> None:
    assert pagerduty(webhooks, clock).change_event("v3 -> v2", details=details).ok
    (request,) = webhooks.received
    event = json.loads(request.body, parse_constant=lambda name: pytest.fail(name))
    assert len(request.body) < 512_000 and event["payload"]["custom_details"]


@unhurried
@given(st.recursive(ODD, lambda inner: st.dictionaries(ODD, inner) | st.lists(inner), max_leaves=9))
def test_every_value_becomes_valid_json(value: Any) -> None:
    body = json_bytes({"value": value})
    assert json.loads(body, parse_constant=lambda name: pytest.fail(name))


def in_child(work: Callable[[], bool]) -> bool:
    """fork した子で行い、その答えを返す。10 秒で終わらなければ偽。"""
    child = os.fork()
    if child == 0:
        threading.Timer(10.0, os._exit, [2]).start()
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_sends_too(tmp_path: Path) -> None:
    notifier = MultiChannelNotifier(wait_seconds=10)
    notifier.add_handler("file", ConsoleNotificationHandler((tmp_path / "told").write_text))
    notifier.notify(ALERT)
    assert in_child(
        lambda: all(d.ok for d in notifier.notify(replace(ALERT, summary="from the child")))
    )
    assert "from the child" in (tmp_path / "told").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_forked_while_a_channel_sends_sends_its_own_and_only_that(slow: Slow) -> None:
    notifier = MultiChannelNotifier(wait_seconds=0.05).add_handler("slow", slow)
    notifier.notify([ALERT, replace(ALERT, name="waits", fingerprint="waits")])

    def work() -> bool:
        slow.go.set()
        notifier.wait_seconds = 1.0
        (one,) = notifier.notify(replace(ALERT, name="child", fingerprint="child"))
        notifier.stop()
        return one.ok and slow.sent == ["child firing"]

    assert in_child(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_posts_on_a_connection_of_its_own(clock: Clock) -> None:
    callers: list[int] = []

    class Keeping(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            callers.append(self.client_address[1])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Keeping) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        handler = SlackNotificationHandler(f"http://127.0.0.1:{server.server_port}/a", clock=clock)
        handler.send(ALERT)
        assert in_child(lambda: handler.send(ALERT).ok)
        handler.send(ALERT)
        server.daemon_threads = True
        server.shutdown()
    parent, forked, again = callers
    assert parent == again != forked


def test_what_no_thread_can_be_started_for_is_sent_at_once_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    notifier = MultiChannelNotifier(wait_seconds=30.0)
    notifier.add_handler("page", ConsoleNotificationHandler(told.append))

    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as crowded:
        crowded.setattr(threading.Thread, "start", full)
        assert [d.ok for d in notifier.notify(ALERT)] == [True]
    assert [d.ok for d in notifier.notify(replace(ALERT, name="next"))] == [True]
    assert len(told) == 2


def test_results_that_nobody_takes_are_forgotten() -> None:
    queue = ChannelQueue(ConsoleNotificationHandler(lambda _: None))
    for number in range(1500):
        queue.put(replace(ALERT, fingerprint=f"f-{number}")).result(timeout=10)
    assert len(queue._jobs) <= 1000  # pyright: ignore[reportPrivateUsage]
