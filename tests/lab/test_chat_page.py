"""チャット画面を、本物の ``serve`` と Chromium で、読者と同じように使う。"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import requests
from chromium import chromium, missing
from openai import OpenAI
from ports import free_port

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.shop.chat import create_app
from chapter8_samples._lab.shop.support_bot import GOOD_PROMPT, Prompt, SupportBot

if TYPE_CHECKING or missing() is None:
    from lab.chat_site import THUMB, Site, ask, launch, served, start
    from playwright.sync_api import Browser, Page, expect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: process groups"),
]

GROUNDED = "groundedness_check"
SHIFTS = """
window.shifts = [];
new PerformanceObserver(list => {
  for (const e of list.getEntries()) if (!e.hadRecentInput)
    window.shifts.push([e.value, ...e.sources.map(s => s.node?.outerHTML?.slice(0, 80))]);
}).observe({type: "layout-shift", buffered: true});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        expect.set_options(timeout=60_000)  # 混んだ機械でも、終わるまで待つ
        yield found


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    found = start(tmp_path_factory.mktemp("serve"))
    yield found
    found.interrupt()


Opener = Callable[..., "Page"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """画面を開く関数。外への通信とスクリプトの誤りがあれば、最後に失敗する。"""
    contexts, wrong = [], list[str]()

    def open_page(url: str, *, width: int = 1280, height: int = 800, **options: Any) -> Page:
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, locale="ja-JP", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("data:", url)) or wrong.append(r.url))
        page.add_init_script(SHIFTS)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def eventually(check: Callable[[], object], seconds: float = 30) -> None:
    """``check`` が通るまで繰り返す。"""
    deadline = time.monotonic() + seconds
    while True:
        try:
            check()
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def press_until(page: Page, key: str, selector: str) -> None:
    """``selector`` に焦点が移るまで、``key`` を押す。"""
    for _ in range(20):
        page.keyboard.press(key)
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    pytest.fail(f"{key} never reaches {selector}")


def test_conversation_and_vote_by_keyboard_only(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    page.evaluate(
        """() => { window.pieces = []; new MutationObserver(() => window.pieces.push(
             [performance.now(), document.querySelector("#log article:last-child").innerText]
           )).observe(document.querySelector("#log"), {childList: true, subtree: true}) }"""
    )
    page.keyboard.type("返品の期限は何日ですか")  # 開いた直後から入力できる
    page.keyboard.press("Enter")
    answer = page.locator("article.bot").last
    expect(answer.locator(".text")).to_contain_text("到着から14日以内")
    tools = answer.locator(".vote")
    trace_id = str(tools.get_attribute("data-trace"))

    ended = page.evaluate(
        "performance.getEntriesByType('resource').find(e => e.name.endsWith('/ask')).responseEnd"
    )
    early = {text for at, text in page.evaluate("window.pieces") if at < ended and "返品" in text}
    assert len(early) >= 2, "the answer must be shown while it arrives"

    press_until(page, "Shift+Tab", THUMB[False])
    page.keyboard.press("Enter")
    expect(tools.get_by_role("status")).to_have_text("記録しました")
    expect(tools.locator(THUMB[False])).to_have_attribute("aria-pressed", "true")

    def stored() -> None:  # 評価は、トレースの情報がそろう前にも記録できる
        found = site.trace(trace_id)
        human = {
            a.name: a.feedback.value for a in found.assessments if a.source.source_id == "web-user"
        }
        assert human == {"user_thumbs": False}
        assert found.trace_metadata.get("mlflow.trace.session", "").startswith("web-")

    eventually(stored)


def test_example_questions_are_asked_with_one_press(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    examples = page.locator("[data-example]")
    assert examples.count() == 3
    for number, words in enumerate(("14日以内", "550円", "注文履歴")):
        expect(examples.nth(number)).to_be_enabled()
        examples.nth(number).click()
        expect(page.locator("article.bot").last.locator(".text")).to_contain_text(words)
        expect(page.locator("article.me").last).to_have_text(examples.nth(number).inner_text())


def test_changed_vote_replaces_the_old_one(site: Site, open_page: Opener) -> None:
    answer = ask(open_page(site.url), "送料はいくらですか")
    trace_id = str(answer.locator(".vote").get_attribute("data-trace"))
    eventually(lambda: site.trace(trace_id))
    for positive in (True, False):
        answer.locator(THUMB[positive]).click()
        expect(answer.locator(THUMB[positive])).to_have_attribute("aria-pressed", "true")
        expect(answer.get_by_role("status")).to_have_text("記録しました")
    expect(answer.locator(THUMB[True])).to_have_attribute("aria-pressed", "false")
    votes = [a for a in site.trace(trace_id).assessments if a.valid is not False]
    assert [a.feedback.value for a in votes if a.name == "user_thumbs"] == [False]


def test_every_tab_stop_shows_its_focus(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    ask(page, "退会したい")
    seen: set[str] = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        name, width = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e);
                 return [e.outerHTML.slice(0, 60), s.outlineStyle === "none" ? 0 :
                         parseFloat(s.outlineWidth)] }"""
        )
        if not name.startswith("<body"):
            assert width >= 3, name
            seen.add(name)
    assert len(seen) >= 10


def test_link_opens_the_trace_in_mlflow(site: Site, open_page: Opener, browser: Browser) -> None:
    answer = ask(open_page(site.url), "海外に送れますか")
    trace_id = str(answer.locator(".vote").get_attribute("data-trace"))
    link = str(answer.get_by_role("link", name="トレースを見る").get_attribute("href"))
    assert link.startswith(site.mlflow_url) and trace_id in link
    eventually(lambda: site.trace(trace_id))
    page = browser.new_page()
    response = page.goto(link)
    assert response is not None and response.status == 200
    expect(page.get_by_text("海外に送れますか").first).to_be_visible()
    expect(page.get_by_text("support_bot").first).to_be_visible()
    assert trace_id in page.url
    page.close()


def figures_from_store(site: Site) -> dict[str, float]:
    """保存されたトレースから、画面の数字を別の方法で求める。"""
    since = (time.time() - 300) * 1000
    infos = [info for info in site.traces() if info.request_time > since]
    costs = [info.cost["total_cost"] for info in infos if info.cost]
    times = [info.execution_duration for info in infos]
    valid = [a for info in infos for a in info.assessments if a.valid is not False]
    grounded = [a.feedback.value == "yes" for a in valid if a.name == GROUNDED]
    thumbs = [a.feedback.value is True for a in valid if a.name == "user_thumbs"]
    return {
        "requests": len(infos),
        "error_rate": float(np.mean([info.state.value == "ERROR" for info in infos])),
        "latency_p50_ms": float(np.percentile(times, 50)),
        "latency_p95_ms": float(np.percentile(times, 95)),
        "cost_usd": sum(costs),
        "cost_usd_per_request": sum(costs) / len(infos),
        "grounded_rate": float(np.mean(grounded)),
        "thumbs_up_rate": float(np.mean(thumbs)),
    }


def test_panel_figures_equal_what_is_stored(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    for question, positive in (("送料はいくらですか", True), ("支払い方法は", False)):
        answer = ask(page, question)
        answer.locator(THUMB[positive]).click()
        expect(answer.get_by_role("status")).to_have_text("記録しました")

    def equal() -> None:
        shown = page.eval_on_selector_all(
            "[data-figure]", "all => all.map(e => [e.dataset.figure, Number(e.dataset.value)])"
        )
        assert dict(shown) == pytest.approx(figures_from_store(site))

    eventually(equal)
    figures = figures_from_store(site)
    expect(page.locator("[data-figure=requests]")).to_have_text(f"{figures['requests']} 件")
    expect(page.locator("[data-figure=cost_usd]")).to_have_text(f"${figures['cost_usd']:.6f}")


def settle(page: Page) -> None:
    """前の試験の事故が残っていれば、ひとりでに回復するのを待つ。"""
    expect(page.locator("#alert")).to_have_attribute("data-state", "calm")
    expect(page.locator("#version")).to_contain_text("v1")
    expect(page.locator("[data-action=burst]")).to_be_enabled()


def test_bad_release_is_noticed_rolled_back_and_resolved(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    version, alert = page.locator("#version"), page.locator("#alert")
    settle(page)
    page.locator("[data-action=release]").click()
    expect(version).to_contain_text("v2")
    page.locator("[data-action=burst]").click()
    expect(alert).to_have_attribute("data-state", "firing")
    expect(alert).to_contain_text("資料に根拠のない答えが増えています")
    expect(version).to_contain_text("v1")
    example = page.locator("[data-kind=alert] a").get_attribute("href")
    assert example is not None and example.startswith(site.mlflow_url)

    expect(page.locator("#next-step")).to_contain_text("悪い答えが集計期間から外れると解消します")
    expect(page.locator("[data-kind=resolved]")).to_be_visible()  # 何も押していない
    expect(alert).to_have_attribute("data-state", "calm")
    kinds = page.eval_on_selector_all("#timeline li", "all => all.map(e => e.dataset.kind)")
    assert kinds == ["release", "alert", "rollback", "resolved"]
    for name in ("grounded_rate", "latency_p95_ms", "cost_usd_per_request"):
        chart = page.locator(f"[data-trend={name}] svg")
        assert chart.locator("polyline").count() >= 1
        marks = chart.locator(".event").evaluate_all("all => all.map(e => e.dataset.mark)")
        assert marks == kinds
        assert "の推移: 最大" in str(chart.get_attribute("aria-label"))
    assert_still(page)
    again = open_page(site.url)  # 開き直しても、出来事は残っている
    expect(again.locator("#timeline li")).to_have_count(4)
    alias = site.client().get_prompt_version_by_alias("support-bot", "production")
    assert str(alias.version) == "1"


def test_phone_has_no_sideways_scroll(site: Site, open_page: Opener) -> None:
    page = open_page(site.url, width=360, height=640, has_touch=True)
    ask(page, "住所を変更したい" + "x" * 200)
    for tab in ("チャット", "監視"):
        page.get_by_role("button", name=tab).tap()
        longest = "e => { e.textContent = '回復を確かめています' }"
        page.locator("[data-action=burst]").evaluate(longest)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        outside = page.evaluate(
            """[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
                 e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        wide = page.eval_on_selector_all(
            "#log, #panel, .message",
            "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.id)",
        )
        assert wide == []
    expect(page.locator("#chat")).to_be_hidden()
    small = page.eval_on_selector_all(
        "button",
        "all => all.map(b => b.getBoundingClientRect()).filter(r => r.height && r.height < 30)",
    )
    assert small == []


CONTRAST = """
() => {
  const parse = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, below) => { const a = top[3] ?? 1;
    return [0, 1, 2].map(i => top[i] * a + below[i] * (1 - a)) };
  const back = e => { if (!e) return [255, 255, 255];
    return over(parse(getComputedStyle(e).backgroundColor), back(e.parentElement)) };
  const light = rgb => { const [r, g, b] = rgb.map(v => v / 255).map(
    v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const bad = [];
  let checked = 0;
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    const kind = e.placeholder ? "::placeholder" : null;
    if (!(text || kind) || !e.checkVisibility({visibilityProperty: true})) continue;
    const below = back(e), ink = over(parse(getComputedStyle(e, kind).color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    checked += 1;
    if ((a + .05) / (b + .05) < 4.5) bad.push([(a + .05) / (b + .05), e.outerHTML.slice(0, 80)]);
  }
  return [checked, bad];
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(site: Site, open_page: Opener, scheme: str) -> None:
    page = open_page(site.url, color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    ask(page, "クーポンは使えますか")
    page.route("**/ask", lambda route: route.abort())
    ask(page, "届かない質問")  # 失敗の文も調べる
    page.locator(THUMB[True]).first.click()
    expect(page.locator(THUMB[True]).first).to_have_attribute("aria-pressed", "true")
    for state in ("calm", "firing", "lost"):
        page.evaluate("s => { document.querySelector('#alert').dataset.state = s }", state)
        checked, bad = page.evaluate(CONTRAST)
        assert checked > 30 and bad == []


def assert_still(page: Page) -> None:
    """見てわかる移動がない(0.1 までが「良い」。ここで許すのは、数字の幅の変化だけ)。"""
    shifts = page.evaluate("window.shifts")
    assert sum(shift[0] for shift in shifts) < 0.001, shifts


def test_nothing_jumps_while_figures_arrive(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    expect(page.locator("[data-figure=requests]")).not_to_have_text("-")
    for question in ("ポイントの有効期限は", "交換したい"):
        ask(page, question)
    for _ in range(2):
        with page.expect_response("**/status"):
            pass
    assert_still(page)


def test_a_silent_server_is_told_with_what_to_do(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    settle(page)
    answer = ask(page, "領収書がほしい")
    page.route("**/feedback", lambda route: route.fulfill(status=503, body="{}"))
    answer.locator(THUMB[True]).click()
    note = answer.get_by_role("status")
    expect(note).to_have_text("記録できませんでした。もう一度押してください")
    expect(answer.locator(THUMB[True])).to_have_attribute("aria-pressed", "false")
    for path in ("ask", "status", "operations/burst"):
        page.route(f"**/{path}", lambda route: route.abort())
    expect(ask(page, "返品できますか")).to_contain_text("serve が動いているか確かめてください")
    expect(page.locator("#alert-title")).to_have_text("監視が止まっています")
    page.locator("[data-action=burst]").click()
    expect(page.locator("[data-kind=refused]")).to_contain_text("serve が動いているか")


def test_a_404_from_a_proxy_does_not_end_the_watch(site: Site, open_page: Opener) -> None:
    page = open_page(site.url)
    settle(page)
    title = page.locator("#alert-title")
    page.route("**/status", lambda route: route.fulfill(status=404, body="{}"))
    expect(title).to_have_text("監視が止まっています")
    page.unroute("**/status")
    expect(title).not_to_have_text("監視が止まっています")


def test_stopped_llm_is_told_with_what_to_do(
    browser: Browser, open_page: Opener, tracking_uri: str
) -> None:
    mlflow.set_experiment("llm-down")
    with StubLlm() as llm:
        client = OpenAI(base_url=llm.base_url, api_key="sk-local-stub", max_retries=0)
    bot = SupportBot(client, prompt=lambda: Prompt("1", GOOD_PROMPT))
    with served(create_app(bot)) as url:
        page = open_page(url)
        answer = ask(page, "返品できますか")
        expect(answer).to_contain_text("LLM につながりません。端末で serve を止め")
        expect(page.locator("#panel")).to_be_hidden()
        trace_id = str(answer.locator(".vote").get_attribute("data-trace"))
        expect(answer.get_by_role("link")).to_have_count(0)
        page.goto("about:blank")
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(trace_id)
    assert trace is not None and trace.info.state.value == "ERROR"


def test_ctrl_c_under_load_leaves_nothing(
    browser: Browser, open_page: Opener, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = start(tmp_path_factory.mktemp("interrupted"))
    page = open_page(site.url)
    ask(page, "返品したい")
    page.locator("[data-action=burst]").click()
    expect(page.locator("[data-action=burst]")).to_have_text("質問を送っています")
    out = site.interrupt()
    assert site.job.returncode == 130 and "Traceback" not in out, out
    assert site.leftovers() == []
    for url in (site.url, site.mlflow_url):
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=5)


def test_taken_port_is_told_and_nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("taken")
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        job = launch(directory, taken.getsockname()[1])
        out, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "--port で別の番号を指定してください" in out and "Traceback" not in out
    assert Site(job, "", "", directory).leftovers() == []
