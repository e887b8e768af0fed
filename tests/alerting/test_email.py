"""メール: 本物の SMTP の会話で、届く文面と、断られたときの扱いを確かめる。"""

from __future__ import annotations

import socketserver
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples.alerting import (
    AlertConfig,
    AlertConfigError,
    NotificationConfigError,
    notifier_from_config,
)
from chapter8_samples.alerting.delivery import (
    Alert,
    AlertSeverity,
    AlertStatus,
    EmailNotificationHandler,
)

ALERT = Alert(
    name="high_error_rate",
    severity=AlertSeverity.CRITICAL,
    summary="エラー率が 5% 超\nBcc: everyone@example.com",
    metric="error_rate",
    value=0.2,
    examples=("tr-1",),
)
TO = ["ops@example.com", "oncall@example.com"]


class SmtpServer(socketserver.ThreadingTCPServer):
    """受け取ったメールを残す SMTP サーバー。``answers`` で、動詞ごとの答えを替えられる。"""

    daemon_threads = True

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], EmailMessage]] = []
        self.answers: dict[str, bytes] = {}
        self.refused: set[str] = set()
        super().__init__(("127.0.0.1", 0), SmtpConversation)


class SmtpConversation(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, SmtpServer)
        recipients: list[str] = []
        self.wfile.write(b"220 loopback\r\n")
        for line in self.rfile:
            verb = line.split()[0].decode().upper()
            usual = b"221 bye" if verb == "QUIT" else b"250 ok"
            answer = server.answers.get(verb, usual)
            if verb == "RCPT":
                recipients.append(line.decode().partition("<")[2].partition(">")[0])
                answer = b"550 no such user" if recipients[-1] in server.refused else answer
            if verb == "DATA" and verb not in server.answers:
                self.wfile.write(b"354 go on\r\n")
                body = b"".join(iter(self.rfile.readline, b".\r\n"))
                mail = message_from_bytes(body, _class=EmailMessage, policy=policy.default)
                server.mails.append((recipients, mail))
            self.wfile.write(answer + b"\r\n")
            if verb == "QUIT" or answer.startswith(b"421"):
                return


@pytest.fixture
def smtp(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmtpServer]:
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")  # 名前解決を待たない
    with SmtpServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def handler(smtp: SmtpServer, **more: Any) -> EmailNotificationHandler:
    options: dict[str, Any] = {"sender": "bot@example.com", "to": TO, "tls": "none", **more}
    return EmailNotificationHandler("127.0.0.1", port=smtp.server_address[1], **options)


def test_the_mail_arrives_as_written_at_every_address(smtp: SmtpServer) -> None:
    delivery = handler(smtp).send(ALERT)
    assert (delivery.ok, delivery.error) == (True, "")
    ((recipients, mail),) = smtp.mails
    assert recipients == TO
    assert mail["Subject"] == (
        "[発報] CRITICAL high_error_rate エラー率が 5% 超 Bcc: everyone@example.com"
    )
    assert (mail["From"], mail["To"], mail["Bcc"]) == ("bot@example.com", ", ".join(TO), None)
    text = mail.get_content()
    assert "error_rate: 0.2" in text and "トレース: tr-1" in text


def test_the_end_of_an_alert_joins_its_thread(smtp: SmtpServer) -> None:
    sender = handler(smtp)
    for status in AlertStatus:
        assert sender.send(replace(ALERT, status=status)).ok
    (_, first), (_, last) = smtp.mails
    assert first["References"] == last["References"] == f"<{ALERT.fingerprint}@alerts.invalid>"
    assert (first["Subject"][:4], last["Subject"][:4]) == ("[発報]", "[解消]")


@pytest.mark.parametrize(
    ("verb", "answer", "retryable"),
    [
        ("MAIL", b"451 try again later", True),
        ("DATA", b"452 no space", True),
        ("EHLO", b"421 going down", True),
        ("RCPT", b"550 no such user", False),
        ("MAIL", b"553 sender refused", False),
        ("DATA", b"554 spam", False),
    ],
)
def test_only_a_temporary_refusal_may_be_sent_again(
    smtp: SmtpServer, verb: str, answer: bytes, retryable: bool
) -> None:
    smtp.answers[verb] = answer
    delivery = handler(smtp).send(ALERT)
    assert (delivery.ok, delivery.retryable) == (False, retryable), delivery.error
    assert smtp.mails == []


def test_a_quarrel_after_the_mail_was_taken_sends_no_second_mail(smtp: SmtpServer) -> None:
    smtp.answers["QUIT"] = b"451 busy"
    delivery = handler(smtp).send(ALERT)
    assert (delivery.ok, delivery.retryable, len(smtp.mails)) == (True, False, 1)


def test_a_bad_password_is_permanent_and_is_not_repeated_in_the_error(smtp: SmtpServer) -> None:
    smtp.answers.update(EHLO=b"250-loopback\r\n250 AUTH PLAIN", AUTH=b"535 wrong: s3cret-word")
    sender = handler(smtp, user="bot", password="s3cret-word")
    delivery = sender.send(ALERT)
    assert (delivery.ok, delivery.retryable) == (False, False)
    assert delivery.error == "SMTPAuthenticationError from 127.0.0.1"
    assert "s3cret-word" not in repr(sender) + repr(delivery)


def test_a_login_that_fails_only_now_may_be_tried_again(
    smtp: SmtpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    smtp.answers.update(EHLO=b"250-loopback\r\n250 AUTH PLAIN", AUTH=b"454 try again later")
    assert handler(smtp, user="bot", password="s3cret-word").send(ALERT).retryable

    def cut(*_: Any, **__: Any) -> Any:
        raise ssl.SSLEOFError(8, "EOF occurred in violation of protocol")

    monkeypatch.setattr("smtplib.SMTP_SSL", cut)
    assert handler(smtp, tls="implicit").send(ALERT).retryable


def test_a_server_without_tls_gets_neither_the_password_nor_the_mail(smtp: SmtpServer) -> None:
    delivery = handler(smtp, tls="starttls", user="bot", password="s3cret-word").send(ALERT)
    assert (delivery.ok, delivery.retryable) == (False, False)
    assert smtp.mails == []


def test_a_dead_server_is_a_failure_that_may_be_sent_again(smtp: SmtpServer) -> None:
    smtp.shutdown()
    smtp.server_close()
    delivery = handler(smtp).send(ALERT)
    assert (delivery.ok, delivery.retryable) == (False, True)


def test_one_refused_address_does_not_stop_the_other(
    smtp: SmtpServer, caplog: pytest.LogCaptureFixture
) -> None:
    smtp.refused = {TO[0]}
    delivery = handler(smtp).send(ALERT)
    assert delivery.ok and len(smtp.mails) == 1
    assert TO[0] in delivery.error  # 届かなかった宛先は、結果にも、ログにも残る
    assert f"refused: {TO[0]}" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"to": "ops@example.com"}, "to must be a list of addresses, got 'ops@example.com'"),
        ({"to": []}, "to must be a list"),
        ({"to": ["ops@example.com", ""]}, "one line, got ''"),
        ({"to": ["ops@example.com\nBcc: x@example.com"]}, "one line"),
        ({"sender": "bot@example.com\n"}, "one line"),
    ],
)
def test_wrong_addresses_are_refused_before_the_first_alert(
    smtp: SmtpServer, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotificationConfigError, match=message):
        handler(smtp, **wrong)


def test_every_mail_has_its_own_message_id_and_a_date(smtp: SmtpServer) -> None:
    now = datetime(2026, 1, 1, 9, tzinfo=timezone.utc)
    sender = handler(smtp, clock=lambda: now)
    for _ in range(2):
        assert sender.send(ALERT).ok
    mails = [mail for _, mail in smtp.mails]
    assert [mail["Date"] for mail in mails] == ["Thu, 01 Jan 2026 09:00:00 +0000"] * 2
    ids = {mail["Message-ID"] for mail in mails}
    assert len(ids) == 2 and all(i.endswith("@example.com>") for i in ids)


def test_implicit_tls_speaks_tls_from_the_first_byte(
    smtp: SmtpServer, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    smtp.socket = context.wrap_socket(smtp.socket, server_side=True)
    unknown = handler(smtp, tls="implicit").send(ALERT)
    assert (unknown.ok, unknown.retryable) == (
        False,
        False,
    )  # 知らない証明書は、送り直しても通らない
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert handler(smtp, tls="implicit").send(ALERT).ok
    assert len(smtp.mails) == 1


@pytest.mark.parametrize(("port", "spoken"), [(465, "SMTP_SSL"), (587, "SMTP"), (25, "SMTP")])
def test_port_465_means_implicit_tls(
    port: int, spoken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []  # 465 番を本当に開くには特権が要るので、どちらで話すかだけを見る
    for name in ("SMTP", "SMTP_SSL"):

        def refuse(*_: Any, name: str = name, **__: Any) -> Any:
            used.append(name)
            raise OSError("not in a test")

        monkeypatch.setattr(f"smtplib.{name}", refuse)
    EmailNotificationHandler("h", sender="a@b.example", to=TO, port=port).send(ALERT)
    assert used == [spoken]


def test_a_relay_without_tls_can_be_named_in_the_configuration(smtp: SmtpServer) -> None:
    receiver = {
        "type": "email",
        "host": "127.0.0.1",
        "port": smtp.server_address[1],
        "sender": "bot@example.com",
        "to": TO,
        "tls": "none",
    }
    notifier = notifier_from_config(AlertConfig(receivers={"mail": receiver}))
    assert [d.ok for d in notifier.notify(ALERT)] == [True]
    with pytest.raises(AlertConfigError, match=r"receivers\.mail\.tls: 'off' is not one of"):
        AlertConfig(receivers={"mail": {**receiver, "tls": "off"}})
    with pytest.raises(NotificationConfigError, match="starttls, implicit or none, got 'off'"):
        handler(smtp, tls="off")
