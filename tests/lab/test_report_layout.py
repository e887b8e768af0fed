"""レポートの見た目: 本物の Chromium で、携帯の幅でも印刷でもはみ出さず、文字が縮まない。"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from chromium import chromium as browser
from chromium import missing

from chapter8_samples._lab.report.health import Point
from chapter8_samples._lab.report.incidents import Event
from chapter8_samples._lab.report.page import write_report
from chapter8_samples._lab.report.sections import Limit, Subject, cards, sections
from chapter8_samples.alerting.metrics.measures import TraceRow

START = datetime(2026, 1, 31, 8, 30, tzinfo=timezone.utc)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="not installed: chromium"),
]
MEASURE = """
<iframe style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe>
<script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument;
  const sizes = [...page.querySelectorAll("svg text")].map(
    text => text.getBoundingClientRect().height);
  document.body.textContent = JSON.stringify(
    {{scroll: page.documentElement.scrollWidth, smallest: Math.min(...sizes)}});
}};
</script>"""


def point(number: int) -> Point:
    row = TraceRow(
        trace_id=f"tr-{number:032x}",
        at_ms=round(START.timestamp() * 1000) + number * 600_000,
        state="ERROR" if number % 9 == 0 else "OK",
        latency_ms=100.0 + number,
        cost_usd=0.01,
        assessments=(("a_very_long_scorer_name_without_spaces", "no" if number % 5 else "yes"),),
    )
    return Point(
        row=row,
        at=number * 600.0,
        user="a-very-long-user-name@example.co.jp",
        models={"claude-3-5-haiku-20241022-with-a-long-suffix": 0.01},
        prompts=frozenset(),
        human=frozenset(),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    subject = Subject(
        started=START,
        history=[point(number) for number in range(60)],
        limits={"error_rate": Limit(">", 0.05), "pass_rate": Limit("<", 0.8)},
        events=[
            Event(START + timedelta(hours=h), "長い名前のアラート 発報", "alert", "エラー率 60%")
            for h in (1, 9)
        ],
    )
    path = tmp_path_factory.mktemp("layout") / "report.html"
    write_report(path, subtitle="", cards=cards(subject), sections=sections(subject))
    return path


def chromium(home: Path, *arguments: str) -> str:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    run = subprocess.run(
        [*command, f"--user-data-dir={home / 'profile'}", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    return run.stdout


@pytest.mark.parametrize("width", [360, 980])
def test_nothing_sticks_out_and_the_text_stays_readable(
    page: Path, tmp_path: Path, width: int
) -> None:
    text = page.read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(text)), encoding="utf-8")
    dom = chromium(tmp_path, "--virtual-time-budget=3000", "--dump-dom", frame.as_uri())
    found = re.search(r'\{"scroll":(\d+),"smallest":([\d.]+)\}', dom)
    assert found, dom[-500:]
    assert int(found[1]) <= width
    assert float(found[2]) >= 11


@pytest.mark.skipif(missing() is not None, reason="needs Playwright")
def test_a_phone_sees_the_main_points_and_print_sees_all(page: Path) -> None:
    folded = "[...document.querySelectorAll('details:not([open]) h3')].map(e => e.textContent)"
    with browser() as found:
        phone = found.new_page(viewport={"width": 390, "height": 844})
        phone.goto(page.as_uri())
        assert phone.evaluate("document.documentElement.scrollHeight") < 4000
        assert {"エラー率", "遅いトレース", "ユーザーごとのコスト"} <= set(phone.evaluate(folded))
        for title in ("応答時間", "1 件のコスト", "合格率", "評価ごとの結果", "出来事"):
            assert title not in phone.evaluate(folded)
        phone.locator("summary", has_text="遅いトレース").focus()
        phone.keyboard.press("Enter")
        assert phone.locator("table", has_text="応答時間").first.is_visible()
        phone.pdf()
        assert phone.evaluate(folded) == []


def test_it_prints(page: Path, tmp_path: Path) -> None:
    """A4 で数ページに収まる。"""
    pdf = tmp_path / "report.pdf"
    chromium(tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 8
