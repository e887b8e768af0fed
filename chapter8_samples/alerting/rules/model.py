"""8.4.1 アラートのルール: しきい値、待ち時間、統計的な判定。

LLM アプリの通信量では、5 分の窓に数十件しか入らない。割合をそのまま比べると偶然の揺れで呼び出される
ので、しきい値どおりの割合では説明できないときだけ「越えた」と判断する(``confidence``、二項検定)。

Databricks でもそのまま使う(標準ライブラリーだけで動く)。
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import time, timedelta, timezone, tzinfo
from typing import Any, Literal, Protocol
from zoneinfo import ZoneInfo

Duration = str | timedelta
"""``"30s"``、``"5m"``、``"1h30m"``、``"500ms"`` のような文字列か ``timedelta``。"""

MAX_DURATION = timedelta(days=3650)
"""これより長い期間は、書き誤りとして断る。"""
SEVERITIES = ("info", "warning", "error", "critical")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_NUMBER = 1e300
FEW_SAMPLES = 200
"""標本がこれより少ない窓では、``low_traffic_confidence`` を使う。"""
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhdw]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhdw])")


class AlertConfigError(ValueError):
    """設定の誤り。見つけたすべてを ``problems`` に持つ。"""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("invalid alert configuration:\n" + "\n".join(f"- {p}" for p in problems))


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
            raise ValueError(f"{text!r} is not a duration; write 30s, 5m, 1h30m or 2d")
        seconds = sum(float(n) * _UNITS[unit] for n, unit in _PART.findall(text))
        length = timedelta(seconds=min(seconds, 2 * MAX_DURATION.total_seconds()))
    if length > MAX_DURATION:
        raise ValueError(f"{str(value)[:40]!r} is longer than {MAX_DURATION.days}d; shorten it")
    if length < timedelta(0):
        raise ValueError(f"{str(value)!r} is not a duration: negative; write 30s, 5m or 2d")
    return length


def parse_clock(text: str) -> time:
    """一日の中の時刻を読む。読めなければ ``ValueError``。"""
    try:
        found = time.fromisoformat(text)
        if found.tzinfo is None:
            return found
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{text!r} is not a time of day; write 22:00 and put the zone in timezone")


def parse_zone(name: str) -> tzinfo:
    """時間帯の名前を読む。読めなければ ``ValueError``。"""
    try:
        return timezone.utc if name == "UTC" else ZoneInfo(name)
    except (KeyError, OSError, ValueError, TypeError):
        raise ValueError(f"{name!r} is not a time zone; write Asia/Tokyo or UTC") from None


def refusals(checks: Iterable[tuple[str, Callable[[Any], object], Any]]) -> list[str]:
    """(名前, 読む関数, 値) のうち、読めなかったものの名前と理由。"""
    found: list[str] = []
    for name, read, value in checks:
        try:
            read(value)
        except ValueError as error:
            found.append(f"{name}: {error}")
    return found


def _number(value: Any) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"{value!r:.60} is not a number")


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


def chance_of_at_least(count: int, n: int, rate: float) -> float:
    """割合 ``rate`` のものを ``n`` 件見て、``count`` 件以上が当たる確率(二項分布の上側)。

    >>> round(chance_of_at_least(1, 1, 0.05), 3), round(chance_of_at_least(3, 10, 0.05), 4)
    (0.05, 0.0115)
    """
    if count <= 0 or rate >= 1:
        return 1.0
    if count > n or rate <= 0:
        return 0.0
    log_choose = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    term = math.exp(log_choose + count * math.log(rate) + (n - count) * math.log1p(-rate))
    total, odds = term, rate / (1 - rate)
    for k in range(count, n):
        term *= (n - k) / (k + 1) * odds
        total += term
        if k > n * rate and term < total * 1e-12:
            break
    return min(1.0, total)


class Sample(Protocol):
    """判定に使う値(``MetricSample`` など)。"""

    @property
    def value(self) -> float | None: ...
    @property
    def n(self) -> int: ...
    @property
    def successes(self) -> float | None: ...


def ratio(now: Sample, earlier: Sample) -> float | None:
    """前の窓の値に対する、今の値の比。前の値がないか 0 なら ``None``。"""
    return now.value / earlier.value if now.value is not None and earlier.value else None


@dataclass(frozen=True, kw_only=True)
class BaseRule:
    """二種類のルールに共通の項目。"""

    name: str
    metric: str = "error_rate"
    for_: Duration = "0s"
    """越えた状態がこれだけ続いたら発報する。"""
    keep_firing_for: Duration = "0s"
    """戻ってからこれだけ続いたら解消する。"""
    min_samples: int = 0
    no_data: Literal["ok", "keep", "alert"] = "keep"
    """標本がないとき: 正常とみなす、状態を変えない、異常とみなす(``for_`` は待つ)。"""
    severity: str = "warning"
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    summary: str = ""
    runbook_url: str | None = None
    action: Literal["rollback"] | None = None

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise AlertConfigError([f"rule {self.name!r}: {p}" for p in problems])

    def problems(self) -> list[str]:
        """項目の誤り(空なら正しい)。"""
        found = [f"{name}: {p}" for name in self.durations() if (p := self._duration_problem(name))]
        found += self._number_problems("min_samples")
        if not self.name:
            found.append("name: must not be empty")
        if self.severity not in SEVERITIES:
            found.append(f"severity: {str(self.severity)!r} is not one of {', '.join(SEVERITIES)}")
        if self.no_data not in ("ok", "keep", "alert"):
            found.append(f"no_data: {self.no_data!r} is not one of ok, keep, alert")
        if self.action not in (None, "rollback"):
            found.append(f"action: {self.action!r} is not 'rollback'")
        if not self._number_problems("min_samples") and self.min_samples < 0:
            found.append(f"min_samples: {self.min_samples} is negative")
        return found

    def _number_problems(self, *names: str) -> list[str]:
        return refusals((name, _number, getattr(self, name)) for name in names)

    def durations(self) -> tuple[str, ...]:
        """期間の項目の名前。"""
        return ("for_", "keep_firing_for")

    def _duration_problem(self, name: str) -> str:
        try:
            length = parse_duration(getattr(self, name))
        except ValueError as error:
            return str(error)
        zero_is_fine = name in BaseRule.durations(self)
        return "" if zero_is_fine or length else "must be longer than 0s"

    def no_data_verdict(self) -> bool | None:
        """標本がないときの判定。``None`` は状態を変えない。"""
        return {"ok": False, "keep": None, "alert": True}[self.no_data]


@dataclass(frozen=True, kw_only=True)
class AlertRule(BaseRule):
    """一つの指標を一つの窓でしきい値と比べるルール。

    Args:
        clear_threshold: 解消に使うしきい値。発報中は、値そのものをこれと比べる。
        confidence: 0.5 から 1。割合の指標で、しきい値どおりの割合なら ``1 - confidence`` 以下の
            確率でしか起きない偏りのときに「越えた」とする。
        low_traffic_confidence: 標本が 200 件に満たない窓で、代わりに使う。エラーは固まって起きる
            ので、少ない標本は、独立とみなした確率よりずっと偏りやすい。
        compare: これだけ前の同じ長さの窓と比べる。しきい値は、前の値に対する比になる
            (``trace_count``、``compare="1w"``、``op="<"``、``threshold=0.05`` は、先週の 5% 未満)。
        by: ラベルの値ごとに判定する。``model``、``prompt_version``、``tag:名前`` のどれか。
            ラベルの値ごとに 1 件のアラートになり、そのラベルが付く。
    """

    window: Duration = "5m"
    op: Literal[">", "<"] = ">"
    threshold: float = 0.0
    clear_threshold: float | None = None
    confidence: float | None = None
    low_traffic_confidence: float | None = None
    compare: Duration | None = None
    by: str | None = None

    def durations(self) -> tuple[str, ...]:
        """期間の項目の名前。"""
        compare = ("compare",) if self.compare is not None else ()
        return ("window", *compare, *super().durations())

    def problems(self) -> list[str]:
        """項目の誤り(空なら正しい)。"""
        optional = ("clear_threshold", "confidence", "low_traffic_confidence")
        given = [n for n in optional if getattr(self, n) is not None]
        wrong = self._number_problems("threshold", *given)
        found = super().problems() + wrong
        if self.op not in (">", "<"):
            found.append(f"op: {self.op!r} is not '>' or '<'")
        if wrong or self.op not in (">", "<"):
            return found
        for name in optional[1:]:
            if name in given and not 0.5 < getattr(self, name) < 1:
                found.append(f"{name}: {getattr(self, name)} is not between 0.5 and 1")
        clear = self.clear_threshold
        if clear is not None and clear != self.threshold and self._beyond(clear):
            found.append(
                f"clear_threshold: {clear} would never clear; "
                f"with op {self.op!r} it must not be beyond threshold {self.threshold}"
            )
        return found

    def queries(self) -> list[tuple[str, timedelta]]:
        """判定に要る(指標, 窓)。"""
        return [(self.metric, parse_duration(self.window))]

    @property
    def ago(self) -> timedelta | None:
        """どれだけ前の窓と比べるか。比べないルールでは ``None``。"""
        return None if self.compare is None else parse_duration(self.compare)

    def judge(self, samples: Sequence[Sample], firing: bool) -> bool | None:
        """越えているか。標本が足りなければ ``None``。``compare`` では、今と前の二つを渡す。"""
        sample = samples[0]
        value = sample.value if self.compare is None else ratio(sample, samples[1])
        if value is None:
            return self.no_data_verdict()
        # 前の窓と比べるときは、前の窓の標本数で決める(今の件数が減ったことを見つけたい)
        if samples[-1].n < self.min_samples:
            return None
        if not firing:
            return self._beyond(value) and self._is_no_chance(sample)
        clear = self.threshold if self.clear_threshold is None else self.clear_threshold
        return self._beyond(value, clear)

    def _beyond(self, value: float, threshold: float | None = None) -> bool:
        limit = self.threshold if threshold is None else threshold
        return value > limit if self.op == ">" else value < limit

    def _is_no_chance(self, sample: Sample) -> bool:
        confidence = self.confidence
        if sample.n < FEW_SAMPLES and self.low_traffic_confidence is not None:
            confidence = self.low_traffic_confidence
        if confidence is None or sample.successes is None:
            return True
        if self.op == ">":
            count, rate = math.floor(sample.successes + 1e-9), self.threshold
        else:
            count, rate = math.floor(sample.n - sample.successes + 1e-9), 1 - self.threshold
        return chance_of_at_least(count, sample.n, rate) <= 1 - confidence


@dataclass(frozen=True, kw_only=True)
class BurnRateRule(BaseRule):
    """SLO のエラー予算を、長短二つの窓で速く使いすぎていないかを見るルール。

    ``objective=0.99``、``factor=14.4`` なら、エラー率が 14.4% を両方の窓で超えたら発報する
    (SRE ワークブック 5 章: 30 日の予算の 2% を 1 時間で使う速さ)。
    """

    objective: float = 0.99
    factor: float = 14.4
    long: Duration = "1h"
    short: Duration = "5m"

    @property
    def threshold(self) -> float:
        """両方の窓の割合と比べる値。"""
        return round(self.factor * (1 - self.objective), 12)

    @property
    def window(self) -> Duration:
        """長いほうの窓。"""
        return self.long

    def durations(self) -> tuple[str, ...]:
        """期間の項目の名前。"""
        return ("long", "short", *super().durations())

    def problems(self) -> list[str]:
        """項目の誤り(空なら正しい)。"""
        wrong = self._number_problems("objective", "factor")
        found = super().problems() + wrong
        if wrong:
            return found
        if not 0 < self.objective < 1:
            return [*found, f"objective: {self.objective} is not between 0 and 1"]
        if not 0 < self.threshold < 1:
            found.append(
                f"factor: {self.factor} x (1 - {self.objective}) = {self.threshold:g}, "
                "a rate can never exceed it; lower the factor"
            )
        if not found and parse_duration(self.short) >= parse_duration(self.long):
            found.append(f"short: {self.short} is not shorter than long: {self.long}")
        return found

    def queries(self) -> list[tuple[str, timedelta]]:
        """判定に要る(指標, 窓)。長い窓が先。"""
        return [(self.metric, parse_duration(w)) for w in (self.long, self.short)]

    def judge(self, samples: Sequence[Sample], firing: bool) -> bool | None:
        """両方の窓で越えているか。"""
        values = [s.value for s in samples if s.value is not None]
        if len(values) < 2:
            return self.no_data_verdict()
        if samples[0].n < self.min_samples:
            return None
        return all(value > self.threshold for value in values)


Rule = AlertRule | BurnRateRule
