"""8.4 期間の書き方: ``30s``、``5m``、``1h30m``、``2d``、``1w``、``500ms``。"""

from __future__ import annotations

import re
from datetime import timedelta

Duration = str | timedelta
"""``"5m"`` のような文字列か ``timedelta``。"""

LONGEST = timedelta(days=3650)
"""これより長い期間は、書き誤りとして拒否する。"""
SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0.001}
PART = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|[smhdw])")


def parse_duration(value: Duration) -> timedelta:
    """期間を読む。読めなければ ``ValueError``。

    >>> parse_duration("1h30m"), parse_duration("500ms")
    (datetime.timedelta(seconds=5400), datetime.timedelta(microseconds=500000))
    """
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    else:
        text = str(value).strip()
        parts = PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise ValueError(f"{text!r:.60} is not a duration; write 30s, 5m, 1h30m or 2d")
        seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    if not 0 <= seconds <= LONGEST.total_seconds():
        raise ValueError(f"{str(value)!r:.60} is not between 0s and {LONGEST.days}d")
    return timedelta(seconds=seconds)


def format_duration(value: Duration) -> str:
    """Prometheus と同じ書き方にする。

    >>> format_duration(timedelta(minutes=90))
    '1h30m'
    """
    milliseconds = round(parse_duration(value) / timedelta(milliseconds=1))
    text = ""
    for unit in ("d", "h", "m", "s", "ms"):
        count, milliseconds = divmod(milliseconds, round(SECONDS[unit] * 1000))
        if count:
            text += f"{count}{unit}"
    return text or "0s"
