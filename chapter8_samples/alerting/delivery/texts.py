"""8.4.2 通知の文: 見出し、値の列、リンク、JSON。どの通知先でも同じ言葉になる。"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from enum import Enum
from itertools import islice
from typing import Any, cast

from .alert import Alert, AlertStatus

PAGERDUTY_MAX_BYTES = 300_000
"""イベントの上限は 512 KB。リンクの分を残す。"""
_MARKS = {AlertStatus.FIRING: "発報", AlertStatus.RESOLVED: "解消"}


def encodable(text: str, encoding: str = "utf-8") -> str:
    """``encoding`` で書けない文字(対になっていないサロゲートなど)を「?」にする。

    >>> encodable("broken \\ud800 text"), encodable("発報 \\U0001f600", "cp932")
    ('broken ? text', '発報 ?')
    """
    return text.encode(encoding, "replace").decode(encoding)


def clip(text: str, limit: int) -> str:
    """``limit`` 文字を超えたら切って「…」を付ける。"""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def json_bytes(data: Any, *, ascii_only: bool = False) -> bytes:
    """UTF-8 の JSON。JSON や UTF-8 にできない値も、失敗させずに近い文字列にする。

    >>> json_bytes({1: float("nan")})
    b'{"1": "nan"}'
    """
    return json.dumps(json_ready(data), ensure_ascii=ascii_only).encode("utf-8", "replace")


def json_ready(
    value: Any, chars: int | None = None, items: int | None = None, depth: int = 20
) -> Any:
    """必ず JSON になる値。``chars`` は文字列の、``items`` は列の長さの上限。"""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, datetime):
        value = value.isoformat()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and abs(value) < 1e300:  # nan と inf は、比べると偽になる
        return value
    if depth and isinstance(value, Mapping):
        pairs = islice(cast("Mapping[Any, Any]", value).items(), items)
        return {_text(k, chars): json_ready(v, chars, items, depth - 1) for k, v in pairs}
    if depth and isinstance(value, list | tuple | set | frozenset):
        found = islice(cast("Iterable[Any]", value), items)
        return [json_ready(item, chars, items, depth - 1) for item in found]
    return _text(value, chars)


def _text(value: Any, chars: int | None) -> str:
    try:
        text = str(value)
    except Exception:  # 桁の多すぎる整数、壊れた __str__
        text = f"<{type(value).__name__}>"
    return text if chars is None else clip(text, chars)


def slack_escape(text: str, limit: int) -> str:
    """Slack の制御文字を無害にし、エスケープ後の長さを ``limit`` 文字以内にする。

    >>> slack_escape("<!channel> a & b", 100)
    '&lt;!channel&gt; a &amp; b'
    >>> slack_escape("<<<<", 9)
    '&lt;&lt;…'
    """
    escaped = html.escape(text[: limit + 1], quote=False)
    if len(escaped) <= limit:
        return escaped
    cut = re.sub(r"&[a-z]*$", "", escaped[: limit - 1])  # 実体参照の途中では切らない
    return cut + "…"


def headline(alert: Alert) -> str:
    """1 行の見出し。

    >>> headline(Alert(name="slow_p95", severity="critical"))
    '[発報] CRITICAL slow_p95'
    """
    return f"[{_MARKS[alert.status]}] {alert.severity.value.upper()} {alert.name}"


def summary(alert: Alert) -> str:
    """本文の 1 文。解消では、書かれているのが発報したときの内容だと分かるようにする。"""
    if alert.summary and alert.status is AlertStatus.RESOLVED:
        return f"発報時の内容: {alert.summary}"
    return alert.summary


def facts(alert: Alert) -> Iterator[tuple[str, str]]:
    """表示する(見出し, 値)の列。値のない項目は省く。"""
    if alert.value is not None:
        yield alert.metric or "value", f"{alert.value:.6g}"
    if alert.threshold is not None:
        yield "しきい値", f"{alert.threshold:.6g}"
    if alert.n is not None:
        yield "標本数", str(alert.n)
    if alert.window_seconds is not None:
        yield "集計期間", f"{alert.window_seconds:g} 秒"
    yield "開始", alert.starts_at.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield from alert.labels.items()


def links(alert: Alert) -> list[tuple[str, str]]:
    """手順書、例のトレース、そのほかのリンク(表示名, URL)。URL の分からないトレースでは空。"""
    found = {"runbook": alert.runbook_url} if alert.runbook_url else {}
    found |= dict.fromkeys(alert.examples, "")
    found |= alert.links
    return list(found.items())


def one_line(alert: Alert) -> str:
    """端末やログの 1 行。"""
    parts = ", ".join(f"{key} {value}" for key, value in islice(facts(alert), 3))
    return encodable(" ".join(f"{headline(alert)} {summary(alert)} ({parts})".split()))


def slack_message(alert: Alert) -> dict[str, Any]:
    """Incoming Webhook の本文。Slack の文字数とブロック数の上限を守る。"""
    fields = [
        {"type": "mrkdwn", "verbatim": True, "text": slack_escape(f"*{k}*\n{v}", 2000)}
        for k, v in facts(alert)
    ]
    notes = [_slack_link(name, url) for name, url in links(alert)[:10]]
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": clip(headline(alert), 150)}},
        {"type": "section", "fields": fields[:10]},
    ]
    if alert.summary:
        text = {"type": "mrkdwn", "verbatim": True, "text": slack_escape(summary(alert), 3000)}
        blocks.insert(1, {"type": "section", "text": text})
    if notes:
        elements = [{"type": "mrkdwn", "verbatim": True, "text": note} for note in notes]
        blocks.append({"type": "context", "elements": elements})
    text = slack_escape(f"{headline(alert)} {summary(alert)}".strip(), 3000)
    return {"text": text, "blocks": blocks}


def _slack_link(name: str, url: str) -> str:
    """リンク。長すぎる URL は、切ると別の場所を指すので、名前だけにする。"""
    target = slack_escape(url.replace("|", "%7C"), 900)
    label = slack_escape(name, 60)
    return f"<{target}|{label}>" if target and not target.endswith("…") else label


def pagerduty_event(alert: Alert, source: str) -> dict[str, Any]:
    """Events API v2 の trigger または resolve(``routing_key`` を除く)。"""
    key = alert.fingerprint[:255]
    if alert.status is AlertStatus.RESOLVED:
        return {"event_action": "resolve", "dedup_key": key}
    fields = {
        "source": clip(alert.labels.get("service") or source, 255),
        "severity": alert.severity.value,
        "timestamp": alert.starts_at.isoformat(),
    }
    title = f"{alert.name}: {alert.summary or alert.metric}"
    details = dict(facts(alert)) | {"examples": alert.examples[:10]}
    short = [(name, url) for name, url in links(alert) if 0 < len(url) <= 2000]
    return {
        "event_action": "trigger",
        "dedup_key": key,
        "payload": pagerduty_payload(title, fields, details),
        "links": [{"text": clip(name, 255), "href": url} for name, url in short[:10]],
    }


def pagerduty_payload(title: str, fields: Mapping[str, str], details: object) -> dict[str, Any]:
    """イベントの上限(512 KB)に収まるまで ``details`` を短くした、イベントの中身。"""
    payload: dict[str, Any] = {"summary": clip(title, 1024), **fields}
    for chars, items in ((1024, 50), (100, 50), (50, 5)):
        payload["custom_details"] = json_ready(details, chars, items, depth=5)
        if len(json_bytes(payload, ascii_only=True)) <= PAGERDUTY_MAX_BYTES:
            break
    return payload
