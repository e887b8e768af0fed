"""8.4.1 設定に書く値: 期間、時刻、時間帯、数。読めなければ、直し方を添えた ``ValueError``。"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from datetime import timedelta, timezone, tzinfo
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, PlainValidator, StringConstraints

Duration = str | timedelta
"""``"30s"``、``"5m"``、``"1h30m"``、``"500ms"`` のような文字列か ``timedelta``。"""

MAX_DURATION = timedelta(days=3650)
"""これより長い期間は、書き誤りとして拒否する。"""
MAX_NUMBER = 1e300
SEVERITIES = ("info", "warning", "error", "critical")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")


def short(value: object) -> str:
    """文に引用する長さに切った値。"""
    try:
        text = repr(value)
    except ValueError:  # 桁の多すぎる整数
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def near(value: object, known: Iterable[object]) -> str:
    """近い名前を勧める文。なければ空。"""
    text = value if isinstance(value, str) else ""
    close = difflib.get_close_matches(text, [name for name in known if isinstance(name, str)], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_duration(value: Duration) -> timedelta:
    """期間を読む。読めなければ ``ValueError``。

    >>> parse_duration("1h30m"), parse_duration("500ms")
    (datetime.timedelta(seconds=5400), datetime.timedelta(microseconds=500000))
    """
    if isinstance(value, timedelta):
        length = value
    else:
        text = str(value).strip()
        if not _DURATION.fullmatch(text):
            raise ValueError(f"{short(text)} is not a duration; write 30s, 5m, 1h30m or 2d")
        seconds = sum(float(n) * _UNITS[unit] for n, unit in _PART.findall(text))
        length = timedelta(seconds=min(seconds, 2 * MAX_DURATION.total_seconds()))
    if length > MAX_DURATION:
        raise ValueError(f"{short(str(value))} is longer than {MAX_DURATION.days}d; shorten it")
    if length < timedelta(0):
        raise ValueError(f"{str(value)!r} is not a duration: negative; write 30s, 5m or 2d")
    return length


def format_duration(value: Duration) -> str:
    """Prometheus と同じ書き方にする。

    >>> format_duration(timedelta(minutes=90))
    '1h30m'
    """
    milliseconds = round(parse_duration(value) / timedelta(milliseconds=1))
    text = ""
    for unit in ("d", "h", "m", "s", "ms"):
        count, milliseconds = divmod(milliseconds, round(_UNITS[unit] * 1000))
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_clock(value: Any) -> timedelta:
    """一日の中の時刻を、0 時からの長さとして読む。``24:00`` は一日の終わり。

    整数は拒否する: YAML 1.1 は引用符のない 22:00 を 1320 と読み、22 なら 0 時 22 分になる。

    >>> parse_clock("22:30"), parse_clock("24:00")
    (datetime.timedelta(seconds=81000), datetime.timedelta(days=1))
    """
    if value == "24:00":
        return timedelta(days=1)
    if isinstance(value, str) and (found := _CLOCK.fullmatch(value)):
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return timedelta(hours=hours, minutes=minutes, seconds=seconds)
    if type(value) is int and 0 <= value <= 1440:
        hours, minutes = (value, 0) if value <= 24 else divmod(value, 60)
        raise ValueError(f'{value} is not a time of day; write "{hours:02}:{minutes:02}" in quotes')
    hint = 'write "22:00" and put the zone in timezone'
    raise ValueError(f"{short(value)} is not a time of day; {hint}")


def parse_zone(name: Any) -> tzinfo:
    """時間帯の名前を読む。読めなければ ``ValueError``。"""
    try:
        return timezone.utc if name == "UTC" else ZoneInfo(name)
    except (KeyError, OSError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{short(name)} is not a time zone; write Asia/Tokyo or UTC") from None


def _checks(read: Callable[[Any], object]) -> PlainValidator:
    """``read`` に読める値を、書かれたまま受け取る。"""

    def check(value: Any) -> Any:
        read(value)
        return value

    return PlainValidator(check)


def _longer_than_nothing(value: Any) -> None:
    if not parse_duration(value):
        raise ValueError("must be longer than 0s")


def _number(value: Any) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not -MAX_NUMBER <= value <= MAX_NUMBER:
        percent = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value) if isinstance(value, str) else None
        hint = f"; write {float(percent[1]) / 100:g}" if percent else ""
        raise ValueError(f"{short(value)} is not a number{hint}")


def _whole(value: Any) -> None:
    _number(value)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{short(value)} is not a whole number from 0 up")


def _severity(value: Any) -> str:
    if value not in SEVERITIES:
        hint = near(value, SEVERITIES)
        raise ValueError(f"{short(value)} is not one of {', '.join(SEVERITIES)}{hint}")
    return str(getattr(value, "value", value))  # AlertSeverity でもよい


def _some(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise ValueError("the list is empty; name at least one")
    return value


Some = AfterValidator(_some)
"""空でないリスト。"""
Length = Annotated[Duration, _checks(parse_duration)]
PositiveLength = Annotated[Duration, _checks(_longer_than_nothing)]
Clock = Annotated[str, _checks(parse_clock)]
Zone = Annotated[str, _checks(parse_zone)]
Number = Annotated[float, _checks(_number)]
Whole = Annotated[int, _checks(_whole)]
Severity = Annotated[str, PlainValidator(_severity)]
Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, min_length=1)]
