"""コマンドラインの ``--since`` の読み方。"""

from __future__ import annotations

from datetime import datetime, timezone

from chapter8_samples.alerting.rules import parse_duration


def since(text: str, now: datetime | None = None) -> datetime:
    """``30m``、``24h``、``7d`` か、日付・日時(時差がなければ現地時間)。

    Raises:
        ValueError: どれでもない、または未来。

    >>> since("24h", datetime(2026, 2, 1, tzinfo=timezone.utc)).isoformat()
    '2026-01-31T00:00:00+00:00'
    """
    now = now or datetime.now(timezone.utc)
    try:
        start = now - parse_duration(text)
    except (ValueError, OverflowError):
        start = _moment(text)
    if start >= now:
        raise ValueError(f"{text!r} は過去ではありません。30m、24h、7d のように書きます")
    return start


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone()
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{text!r} は期間でも日時でもありません。30m、24h、7d か、"
            "2026-01-31 や 2026-01-31T09:00 のように書きます"
        ) from error
