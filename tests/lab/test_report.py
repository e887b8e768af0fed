"""グラフとレポート。"""

from __future__ import annotations

import doctest
import re
import xml.etree.ElementTree as ET
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from chapter8_samples._lab.console import width
from chapter8_samples._lab.report import charts
from chapter8_samples._lab.report.charts import (
    LineChart,
    Marker,
    Series,
    axis_ticks,
    bars,
    time_ticks,
)
from chapter8_samples._lab.report.page import Card, Section, Table, link, write_report

START = datetime(2026, 1, 31, 8, 30, tzinfo=timezone.utc)


def svg_of(markup: str) -> ET.Element:
    return ET.fromstring(markup[: markup.rindex("</svg>") + 6])


def percent(text: str | None) -> float:
    assert text is not None and text.endswith("%"), text
    return float(text[:-1])


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(charts).failed == 0


@given(st.floats(min_value=0, max_value=1e12))
def test_ticks_cover_the_peak(peak: float) -> None:
    ticks = axis_ticks(peak)
    assert ticks[0] == 0 and ticks[-1] >= peak * (1 - 1e-6) and 2 <= len(ticks) <= 6
    assert ticks == sorted(set(ticks))


@given(st.floats(min_value=1, max_value=5 * 365 * 86400))
@example(99_000.0)  # 27 時間半: 「12:00」が 2 度あった
@example(86_400.0)
def test_time_ticks_are_few_and_inside(seconds: float) -> None:
    """携帯の幅でも重ならない数で、どの長さの図にも 1 つはある。"""
    ticks = time_ticks(seconds, START)
    assert 1 <= len(ticks) <= charts.MAX_TIME_TICKS + 1
    assert all(0 <= time <= seconds for time, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), min_size=2, max_size=30))
def test_chart_is_valid_svg_and_stays_inside_its_frame(values: list[float | None]) -> None:
    chart = LineChart(
        START, list(range(len(values))), [Series("p95 <b>", values)], "{:.0f} ms", 100.0
    )
    svg = svg_of(chart.svg())
    dots = svg.findall("circle")
    assert len(dots) == sum(value is not None for value in values)
    for dot in dots:
        assert 0 <= percent(dot.get("cx")) <= 100
        assert 0 <= float(dot.get("cy", "-1")) <= charts.HEIGHT


def test_line_and_its_dots_are_drawn_at_the_same_place() -> None:
    svg = svg_of(LineChart(START, [0, 5, 10], [Series("x", [1.0, 2.0, 3.0])]).svg())
    dots = [(percent(dot.get("cx")), float(dot.get("cy", "0"))) for dot in svg.findall("circle")]
    line = next(svg.iter("polyline")).get("points", "")
    assert [tuple(map(float, pair.split(","))) for pair in line.split()] == dots
    frame = svg.find("svg")
    assert frame is not None and frame.get("viewBox") == f"0 0 100 {charts.HEIGHT}"


def test_line_breaks_where_nothing_happened() -> None:
    """アクセスのない区間を、線でつないで見せかけない。"""
    chart = LineChart(START, [0, 1, 2, 3, 4], [Series("x", [1.0, 2.0, None, 3.0, 4.0])])
    lengths = [
        len(str(line.get("points")).split()) for line in svg_of(chart.svg()).iter("polyline")
    ]
    assert lengths == [2, 2]


def test_long_charts_show_clock_times() -> None:
    chart = LineChart(START, [0, 6 * 3600], [Series("x", [1.0, 2.0])])
    text = str(chart.svg())
    assert ">10:30</text>" in text and "<title>01/31 14:30 x: 2</title>" in text
    assert "10 秒" in LineChart(START, [0, 20], [Series("x", [1, 2])]).svg()


def test_markers_and_names_are_escaped() -> None:
    chart = LineChart(
        START, [0, 10], [Series("x", [1, 2])], markers=[Marker(5, "<script>", "alert")]
    )
    assert "<script>" not in chart.svg() and "&lt;script&gt;" in chart.svg()
    assert "<i>" not in bars([("<i>", 1.0)], "{:g}")


def test_a_crowd_of_markers_leaves_the_chart_readable() -> None:
    many = [Marker(i, f"印{i}", "alert" if i else "release") for i in range(charts.MAX_LABELS + 1)]
    html = LineChart(START, [0, 10], [Series("x", [1, 2])], markers=many).svg()
    svg = svg_of(html)
    marks = [line for line in svg.findall("line") if str(line.get("class")).startswith("mark ")]
    assert '<i class="mark alert"></i>アラート' in html and "ロールバック" not in html
    assert len(marks) == len(many) and all(float(m.get("y2", "99")) < charts.TOP for m in marks)
    assert not [text for text in svg.findall("text") if text.get("class") == "mark alert"]


@given(st.lists(st.floats(0, 60), min_size=4, max_size=4).map(sorted))
def test_names_of_markers_never_overlap_on_a_phone(moments: list[float]) -> None:
    names = ("v2 をリリース", "とても長い名前のルール_too_long 発報", "ロールバック", "解消")
    many = [
        Marker(at, name, kind) for at, name, kind in zip(moments, names, charts.KINDS, strict=True)
    ]
    svg = svg_of(LineChart(START, [0, 60], [Series("x", [1, 2])], markers=many).svg())
    spans: dict[str, list[tuple[float, float]]] = {}
    for text in (t for t in svg.findall("text") if str(t.get("class")).startswith("mark ")):
        x, pixels = percent(text.get("x")) * 3.36, 5.5 * width(str(text.text)) + 4
        left = x - pixels if text.get("text-anchor") == "end" else x
        assert left >= -1 and left + pixels <= 337
        spans.setdefault(str(text.get("y")), []).append((left, left + pixels))
    assert sum(map(len, spans.values())) == len(names)
    for row in spans.values():
        for (_, end), (start, _) in pairwise(sorted(row)):
            assert end <= start + 1


def test_bars_are_proportional() -> None:
    widths = [
        percent(r.get("width")) for r in svg_of(bars([("a", 2.0), ("b", 1.0)], "{:g}")).iter("rect")
    ]
    assert widths[0] == 2 * widths[1] > 0


def test_report_escapes_and_marks_the_verdict(tmp_path: Path) -> None:
    table = Table("表", ("時刻",), [("<b>",), (link("tr-1", 'http://h/?a="b"'),)])
    path = tmp_path / "report.html"
    write_report(
        path,
        subtitle="<健全性>",
        cards=[
            Card("p95", "900 ms", "350 ms 以下", False),
            Card("コスト", "$1", "", True),
            Card("件数", "3 件"),
        ],
        sections=[Section("8.4", "アラート", "", tables=[table])],
        notes=["<注>"],
    )
    html = path.read_text(encoding="utf-8")
    assert "<健全性>" not in html and "<注>" not in html
    assert "<b>900 ms</b>" in html and "<td>&lt;b&gt;</td>" in html
    assert '<a href="http://h/?a=&#34;b&#34;">tr-1</a>' in html
    assert re.findall(r'class="card (\w+)"', html) == ["ng", "ok"]
    assert re.findall("<em>(.*?)</em>", html) == ["要確認", "正常"]


def test_no_link_where_the_ui_is_not_known() -> None:
    assert link("tr-<1>", "") == '<span class="id">tr-&lt;1&gt;</span>'
