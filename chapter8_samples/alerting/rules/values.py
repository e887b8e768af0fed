"""8.4.1 設定に書く値の型: 期間、時刻、時間帯、数。読めない値は、直し方を添えて断る。"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta, timezone, tzinfo
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

from pydantic import Field, PlainValidator

from ..durations import Duration, parse_duration

CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")
SECRET_LIKE = re.compile(
    r"\b\w+://\S*|\bsig=\S*|(?<![0-9a-z])(?=[a-z]*\d)[0-9a-z]{32,}|\bwhsec_\S*|\bxox[bp]-\S*",
    re.IGNORECASE,
)
Severity = Literal["info", "warning", "error", "critical"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
Name = Annotated[str, Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, le=1_000_000_000)]


def parse_clock(value: object) -> timedelta:
    """一日の中の時刻を、0 時からの長さとして読む。``24:00`` は一日の終わり。

    整数は拒否する: YAML 1.1 は引用符のない 22:00 を 1320 と読み、22 なら 0 時 22 分と区別できない。

    >>> parse_clock("22:30"), parse_clock("24:00")
    (datetime.timedelta(seconds=81000), datetime.timedelta(days=1))
    """
    text = str(value)
    if text == "24:00":
        return timedelta(days=1)
    if found := CLOCK.fullmatch(text):
        return timedelta(hours=int(found[1]), minutes=int(found[2]))
    hint = 'write "22:00" and put the zone in timezone'
    if re.fullmatch(r"\d\d?", text) and int(text) <= 24:
        hint = f'write "{int(text):02}:00"'
    elif type(value) is int and 0 < value <= 1440:
        hint = f'write "{value // 60:02}:{value % 60:02}"'
    raise ValueError(f"{short(value)} is not a time of day; {hint}")


def parse_zone(name: Any) -> tzinfo:
    """時間帯の名前を読む。読めなければ ``ValueError``。"""
    try:
        return timezone.utc if name == "UTC" else ZoneInfo(name)
    except (KeyError, OSError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{short(name)} is not a time zone; write Asia/Tokyo or UTC") from None


def short(value: object) -> str:
    """文に引用する長さに切った値。リストや辞書は、秘密や巨大なもの(別名の入れ子)を含みうる。"""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    text = SECRET_LIKE.sub("***", repr(value))  # 先に切ると、秘密の前半が残る
    return text if len(text) <= 60 else f"{text[:57]}..."


def _longer_than_nothing(value: Any) -> None:
    if not parse_duration(value):
        raise ValueError("must be longer than 0s")


def _checked_by(read: Callable[[Any], object]) -> PlainValidator:
    """``read`` に読める値を、書かれたまま受け取る。"""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict):
            raise ValueError(f"must be text, found {short(value)}")
        read(value)
        return value

    return PlainValidator(check)


Length = Annotated[Duration, _checked_by(parse_duration)]
PositiveLength = Annotated[Duration, _checked_by(_longer_than_nothing)]
Clock = Annotated[str, _checked_by(parse_clock)]
Zone = Annotated[str, _checked_by(parse_zone)]
