"""cost_analysis.sql の 10 の問いに、SQL を使わず、分数で誤差なく答える。

``answers(rows, ...)["daily_summary"]`` は、SQL の結果と同じ順に並んだ辞書のリスト。
"""

from __future__ import annotations

import json
from calendar import monthrange
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

Record = dict[str, Any]
NOT_PRICED = ("unpriced", "partial", "missing_usage")


def number(text: Any, below: float) -> Fraction | None:
    """数を表す文字列の値。数でないもの、``below`` 以上のものは ``None``。"""
    try:
        value = Decimal(str(text).strip())
    except InvalidOperation:
        return None
    return Fraction(value) if value.is_finite() and abs(value) < below else None


def field(text: str | None, name: str) -> Any:
    """JSON のオブジェクトの項目。壊れた JSON なら ``None``。"""
    try:
        data = json.loads(text or "")
    except ValueError:
        return None
    return data.get(name) if isinstance(data, dict) else None


def tokens(text: str | None, name: str) -> Fraction | None:
    return number(field(text, name), 1e12)


def weight_of(metadata: Record) -> Fraction:
    found = number(metadata.get("sampling.weight"), 1e7)
    return found if found and found > 0 else Fraction(1)


class Trace:
    """アーカイブの 1 行。"""

    def __init__(self, row: Record, tz: ZoneInfo) -> None:
        metadata, tags = dict(row.get("trace_metadata") or ()), dict(row.get("tags") or ())
        cost, usage = metadata.get("mlflow.trace.cost"), metadata.get("mlflow.trace.tokenUsage")
        usd = number(field(cost, "total_cost"), 1e7)
        self.id = row["trace_id"]
        self.at = row["request_time"]
        self.local = self.at.astimezone(tz).replace(tzinfo=None)
        self.state = row["state"]
        self.name = tags.get("mlflow.traceName", "(unnamed)")
        self.user = metadata.get("mlflow.trace.user")
        self.session = metadata.get("mlflow.trace.session")
        self.weight = weight_of(metadata)
        self.usd = number(tags.get("cost.total_usd"), 1e7) if usd is None else usd
        self.input, self.output = tokens(usage, "input_tokens"), tokens(usage, "output_tokens")
        self.cached = tokens(usage, "cache_read_input_tokens")
        called = usage is not None or cost is not None
        self.unpriced = tags.get("cost.status") in NOT_PRICED or (self.usd is None and called)
        self.spans = row.get("spans") or []


def total(traces: Iterable[Any], what: str) -> Fraction | None:
    """重みを掛けた合計。1 件も値がなければ ``None``(SQL の SUM と同じ)。"""
    found = [v * t.weight for t in traces if (v := getattr(t, what)) is not None]
    return sum(found, Fraction(0)) if found else None


def ratio(top: Fraction | None, bottom: Fraction | None, digits: int, times: int = 1) -> Any:
    """四捨五入した割り算。どちらかがないか、0 で割るなら ``None``。"""
    if top is None or not bottom:
        return None
    exact = times * top / bottom
    scaled = Decimal(int(abs(exact) * 10 ** (digits + 3))).scaleb(-digits - 3)
    rounded = scaled.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return float(rounded if exact >= 0 else -rounded)


def grouped(traces: Iterable[Trace], key: Callable[[Trace], Any]) -> dict[Any, list[Trace]]:
    groups: dict[Any, list[Trace]] = defaultdict(list)
    for trace in traces:
        groups[key(trace)].append(trace)
    return groups


def counts(traces: Sequence[Trace]) -> Record:
    return {
        "stored": len(traces),
        "requests": sum(t.weight for t in traces),
        "unpriced": sum(t.unpriced for t in traces),
        "cost_usd": total(traces, "usd"),
    }


def dearest_first(records: Iterable[Record], name: str) -> list[Record]:
    """コストの大きい順。計算できないものは最後、同じなら名前の順。"""
    return sorted(records, key=lambda r: (r["cost_usd"] is None, -(r["cost_usd"] or 0), r[name]))


def daily_summary(traces: Sequence[Trace]) -> list[Record]:
    def row(day: Any, group: list[Trace]) -> Record:
        priced = [t for t in group if t.usd is not None]
        per_request = ratio(total(group, "usd"), sum((t.weight for t in priced), Fraction(0)), 8)
        parts = {"input_tokens": total(group, "input"), "output_tokens": total(group, "output")}
        return {"day": day, **counts(group), "cost_per_request": per_request, **parts}

    days = grouped(traces, lambda t: t.local.date())
    return [row(day, days[day]) for day in sorted(days, reverse=True)]


class Call:
    """LLM の呼び出しのスパン 1 つ。"""

    def __init__(self, attributes: Record, weight: Fraction) -> None:
        cost = attributes.get("mlflow.llm.cost")
        self.weight = weight
        self.model = model_of(attributes.get("mlflow.llm.model"))
        self.usd = number(field(cost, "total_cost"), 1e7)
        self.tokens = tokens(attributes.get("mlflow.chat.tokenUsage"), "total_tokens")
        self.unpriced = self.usd is None or status_of(attributes) in ("unpriced", "partial")


def model_of(text: str | None) -> str:
    if text is None or text == "null":
        return "(unknown)"
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, str) else text


def status_of(attributes: Record) -> str:
    return (attributes.get("cost.status") or "").strip('"')


def calls_of(trace: Trace) -> Iterable[Call]:
    """親が子の合計を持つときは、子だけ。"""
    spans = {s["span_id"]: dict(s["attributes"] or ()) for s in trace.spans}
    parents = {s["span_id"]: s["parent_span_id"] for s in trace.spans}
    sums: set[str | None] = set()
    for key, attributes in spans.items():
        above = parents[key]
        while "mlflow.chat.tokenUsage" in attributes and above in spans:
            sums.add(above)
            above = parents[above]
    for key, attributes in spans.items():
        status = status_of(attributes)
        of_children = status == "rollup" or (
            status == "partial" and "cost.reason" not in attributes
        )
        is_call = "mlflow.chat.tokenUsage" in attributes or status == "missing_usage"
        if is_call and key not in sums and not of_children:
            yield Call(attributes, trace.weight)


def by_model(traces: Sequence[Trace]) -> list[Record]:
    calls = [call for trace in traces for call in calls_of(trace)]
    everything = total(calls, "usd")

    def row(model: str) -> Record:
        mine = [call for call in calls if call.model == model]
        usd = total(mine, "usd")
        return {
            "model": model,
            "stored_calls": len(mine),
            "calls": sum(call.weight for call in mine),
            "unpriced": sum(call.unpriced for call in mine),
            "cost_usd": usd,
            "tokens": total(mine, "tokens"),
            "cost_pct": ratio(usd, everything, 2, 100),
        }

    return dearest_first(map(row, {call.model for call in calls}), "model")


def top_users(traces: Sequence[Trace]) -> list[Record]:
    groups = grouped(traces, lambda t: "(unknown)" if t.user is None else t.user)
    rows = [{"user_id": user, **counts(group)} for user, group in groups.items()]
    return dearest_first(rows, "user_id")[:10]


def by_hour(traces: Sequence[Trace]) -> list[Record]:
    groups = grouped(traces, lambda t: t.local.hour)
    return [{"hour_of_day": hour, **counts(groups[hour])} for hour in sorted(groups)]


def percentile(values: Sequence[Fraction], share: Fraction) -> Fraction:
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def anomalies(traces: Sequence[Trace]) -> list[Record]:
    found: list[Record] = []
    for group in grouped([t for t in traces if t.usd is not None], lambda t: t.name).values():
        costs = sorted(t.usd for t in group if t.usd is not None)
        median, high = percentile(costs, Fraction(1, 2)), percentile(costs, Fraction(95, 100))
        found += [
            {
                "trace_id": t.id,
                "local_time": t.local,
                "user_id": t.user,
                "cost_usd": t.usd,
                "median_usd": median,
                "times_median": ratio(t.usd, median, 2),
            }
            for t in group
            if t.usd is not None and t.usd > 3 * high
        ]
    return dearest_first(found, "trace_id")[:50]


def week_over_week(traces: Sequence[Trace]) -> list[Record]:
    weeks = grouped(traces, lambda t: (t.local - timedelta(days=t.local.weekday())).date())
    rows: list[Record] = []
    for week in sorted(weeks):
        now, before = counts(weeks[week]), rows[-1]["cost_usd"] if rows else None
        more = None if now["cost_usd"] is None or before is None else now["cost_usd"] - before
        change = {"prev_cost_usd": before, "change_pct": ratio(more, before, 2, 100)}
        rows.append({"week_start": week, **now, **change})
    return rows[::-1]


def sessions(traces: Sequence[Trace]) -> list[Record]:
    def row(session: str, group: list[Trace]) -> Record:
        costs = [t.usd for t in group if t.usd is not None]
        first, last = min(t.at for t in group), max(t.at for t in group)
        micros = (last - first) // timedelta(microseconds=1)
        return {
            "session_id": session,
            "user_id": min((t.user for t in group if t.user is not None), default=None),
            "turns": len(group),
            "unpriced": sum(t.unpriced for t in group),
            "cost_usd": sum(costs, Fraction(0)) if costs else None,
            "started_at": min(t.local for t in group),
            "minutes": ratio(Fraction(micros), Fraction(60_000_000), 1),
        }

    groups = grouped([t for t in traces if t.session is not None], lambda t: t.session)
    rows = [row(name, group) for name, group in groups.items() if len(group) > 1]
    return dearest_first(rows, "session_id")[:20]


def error_waste(traces: Sequence[Trace]) -> list[Record]:
    def row(day: Any, group: list[Trace]) -> Record:
        failed = [t for t in group if t.state == "ERROR"]
        wasted = total(failed, "usd")
        numbers = counts(group)
        return {
            "day": day,
            "errors": sum(t.weight for t in failed),
            "wasted_usd": wasted,
            "wasted_pct": ratio(wasted, numbers.pop("cost_usd"), 2, 100),
            **numbers,
        }

    days = grouped(traces, lambda t: t.local.date())
    return [row(day, days[day]) for day in sorted(days, reverse=True)]


def budget(traces: Sequence[Trace], as_of: datetime, tz: ZoneInfo, usd: Fraction) -> list[Record]:
    now = as_of.astimezone(tz).replace(tzinfo=None)
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    month = [t for t in traces if t.at < as_of and t.local >= first]
    spent = total(month, "usd") or Fraction(0)
    days = monthrange(now.year, now.month)[1]
    elapsed = Fraction((now - first) // timedelta(microseconds=1), 86_400_000_000)
    return [{
        "budget_usd": usd, "spent_usd": spent, "remaining_usd": usd - spent,
        "unpriced": sum(t.unpriced for t in month), "used_pct": ratio(spent, usd, 2, 100),
        "days_elapsed": ratio(elapsed, Fraction(1), 4), "days": days,
        "projected_usd": ratio(spent * days, elapsed, 4),
    }]  # fmt: skip


def token_efficiency(traces: Sequence[Trace]) -> list[Record]:
    def row(name: str, group: list[Trace]) -> Record:
        sent, received = total(group, "input"), total(group, "output")
        known = [t for t in group if t.input is not None and t.output is not None]
        both = [t for t in known if t.usd is not None]
        priced = sum(((t.input + t.output) * t.weight for t in both), Fraction(0))  # type: ignore[operator]

        def weight_with(what: str) -> Fraction:
            return sum((t.weight for t in group if getattr(t, what) is not None), Fraction(0))

        numbers = counts(group)
        usd = numbers.pop("cost_usd")
        return {
            "trace_name": name,
            **numbers,
            "avg_in": ratio(sent, weight_with("input"), 2),
            "avg_out": ratio(received, weight_with("output"), 2),
            "cache_hit": ratio(total(group, "cached") or Fraction(0), sent, 4),
            "out_in": ratio(received, sent, 4),
            "usd_per_mtok": ratio(usd, priced, 4, 1_000_000),
        }

    rows = [row(name, group) for name, group in grouped(traces, lambda t: t.name).items()]
    return sorted(rows, key=lambda r: (-r["stored"], r["trace_name"]))


def answers(
    rows: Iterable[Record], start: datetime, end: datetime, as_of: datetime, usd: str, tz: str
) -> dict[str, list[Record]]:
    zone = ZoneInfo(tz)
    everything = [Trace(row, zone) for row in rows]
    traces = [t for t in everything if start <= t.at < end]
    questions = (
        *(daily_summary, by_model, top_users, by_hour, anomalies),
        *(week_over_week, sessions, error_waste, token_efficiency),
    )
    found = {question.__name__: question(traces) for question in questions}
    return {**found, "budget": budget(everything, as_of, zone, Fraction(usd))}
