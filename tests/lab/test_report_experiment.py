"""任意のエクスペリメントのレポート: 数値、並び、リンク、出来事、誤りの知らせ方。"""

from __future__ import annotations

import doctest
import re
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import mlflow
import mlflow.genai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import AssessmentSource
from samples import ROOT

from chapter8_samples.__main__ import main
from chapter8_samples._lab.report import health, incidents, names, periods
from chapter8_samples.alerting import AlertConfig, PromptRollbackManager
from chapter8_samples.alerting.metrics.measures import TraceRow
from chapter8_samples.alerting.rules.model import AlertRule
from chapter8_samples.cost_tracking import setup_cost_tracking

NOW = datetime(2026, 2, 1, tzinfo=timezone.utc)
JUDGE = AssessmentSource(source_type="LLM_JUDGE", source_id="stub")
PERSON = AssessmentSource(source_type="HUMAN", source_id="u")


def trace(
    name: str = "answer",
    *,
    seconds: float = 0.1,
    failed: bool = False,
    model: str = "gpt-4o-mini",
    user: str = "user-1",
    weight: float | None = None,
    prompt: str = "",
) -> str:
    """いままでに ``seconds`` 秒かかったトレースを 1 件記録する。"""
    end = time.time_ns()
    with mlflow.start_span(name) as root:
        if prompt:
            mlflow.genai.load_prompt(prompt, cache_ttl_seconds=0)
        metadata = {} if weight is None else {"sampling.weight": str(weight)}
        mlflow.update_current_trace(user=user, metadata=metadata)
        with mlflow.start_span("llm", "CHAT_MODEL") as span:
            usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
            span.set_attributes({"mlflow.llm.model": model, "mlflow.chat.tokenUsage": usage})
        if failed:
            root.set_status("ERROR")
        root._span._start_time = end - int(seconds * 1e9)
    return str(root.trace_id)


def report(tmp_path: Path, experiment: str, *more: str) -> str:
    path = tmp_path / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow.get_tracking_uri())
        assert main(["report", "--experiment", experiment, "-o", str(path), *more]) == 0
    return path.read_text(encoding="utf-8")


def cards_of(html: str) -> dict[str, tuple[str, str, str]]:
    """題 -> (値, 補足, 判定)。"""
    pattern = r'class="card ?(\w*)"><div>(.*?)(?:<em>.*?)?</div><b>(.*?)</b><small>(.*?)</small>'
    return {title: (value, note, ok) for ok, title, value, note in re.findall(pattern, html)}


def rows_of(html: str, title: str) -> list[list[str]]:
    """見出し ``title`` の表の中身(タグを外した文字)。"""
    table = re.search(rf"<h3>{re.escape(title)}.*?</table>", html, re.DOTALL)
    assert table, title
    rows = re.findall(r"<tr>(.*?)</tr>", table[0], re.DOTALL)[1:]
    return [
        [re.sub("<.*?>", "", c) for c in re.findall(r"<td.*?>(.*?)</td>", r, re.DOTALL)]
        for r in rows
    ]


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(periods).failed == 0
    assert doctest.testmod(health).failed == 0
    assert doctest.testmod(names).failed == 0


@pytest.mark.slow
def test_sampled_traces_are_weighed(tracking_uri: str, tmp_path: Path) -> None:
    """正常を 9 分の 1 に間引いた 10 件 + 失敗 10 件は、100 件のうち 10 件の失敗。"""
    mlflow.set_experiment("weights")
    for failed in (True, False):
        for _ in range(10):
            trace(failed=failed, weight=1 if failed else 9)
    mlflow.flush_trace_async_logging()
    cards = cards_of(report(tmp_path, "weights"))
    assert cards["エラー率"][0] == "10.00%" and cards["エラー率"][2] == "ng"
    assert cards["リクエスト"][0] == "20 件" and "推定 100 件" in cards["リクエスト"][1]


@pytest.mark.slow
def test_cost_and_worst_traces(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("costs")
    setup_cost_tracking()
    quick = trace(user="みどり")
    slow = trace(seconds=12.5, model="gpt-4o", user="あおい", weight=2)
    bad = trace(failed=True)
    mlflow.flush_trace_async_logging()
    for trace_id, verdict in ((quick, "yes"), (slow, "no")):
        mlflow.log_feedback(trace_id=trace_id, name="safety", value=verdict, source=JUDGE)
    mlflow.log_feedback(trace_id=slow, name="user_thumbs", value=False, source=PERSON)
    mlflow.log_feedback(trace_id=slow, name="user_rating", value=1.0, source=PERSON)
    html = report(tmp_path, "costs")
    _, trace_id, latency, *rest = rows_of(html, "遅いトレース")[0]
    assert trace_id == slow[:15] and re.fullmatch(r"12,\d+ ms", latency)
    assert rest == ["$0.007500", "あおい", "safety が不合格、ユーザーの低評価"]
    assert [row[1] for row in rows_of(html, "失敗したトレース")] == [bad[:15]]
    assert rows_of(html, "コストの高いトレース")[0][1] == slow[:15]
    assert [row[1] for row in rows_of(html, "品質の低いトレース")] == [slow[:15]]
    # gpt-4o は 1 件 $0.0075 を 2 件分、gpt-4o-mini は 1 件 $0.00045 を 2 件
    assert re.findall(r">(gpt-[\w-]+)</text>.*?>(\$[\d.]+)</text>", html) == [
        ("gpt-4o", "$0.0150"),
        ("gpt-4o-mini", "$0.0009"),
    ]
    cards = cards_of(html)
    assert cards["合計コスト"][0] == "$0.0159" and cards["1 件のコスト"][0] == "$0.003975"
    assert cards["safety"][0] == "33.3%" and cards["safety"][2] == "ng"
    assert "user_rating" not in cards  # 1 点を「合格」と数えない


@pytest.mark.slow
def test_judges_are_compared_with_the_votes_of_users(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("agreement")
    pairs = [("yes", True), ("yes", True), ("no", False), ("yes", False)]
    for verdict, vote in pairs:
        trace_id = trace()
        mlflow.flush_trace_async_logging()
        mlflow.log_feedback(trace_id=trace_id, name="safety", value=verdict, source=JUDGE)
        mlflow.log_feedback(trace_id=trace_id, name="user_thumbs", value=vote, source=PERSON)
    rows = {row[0]: row[-1] for row in rows_of(report(tmp_path, "agreement"), "評価ごとの結果")}
    assert rows == {"safety": "0.50(-0.40 から 0.91、4 件)", "ユーザーの高評価": "-"}


@pytest.mark.slow
def test_sections_without_anything_say_so(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("quiet")
    trace()
    mlflow.flush_trace_async_logging()
    html = report(tmp_path, "quiet")
    assert "この期間に、スコアラーの判定とユーザーの評価はありませんでした。" in html
    assert "この期間に、リリース、アラート、ロールバックはありませんでした。" in html


@pytest.mark.slow
def test_long_names_do_not_run_into_the_figures(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("long")
    setup_cost_tracking()
    trace(user="みどり" * 30)
    mlflow.flush_trace_async_logging()
    html = report(tmp_path, "long")
    short = "みどり" * 6 + "み…"
    assert f">{short}</text>" in html and "みどり" * 7 not in html
    assert rows_of(html, "遅いトレース")[0][4] == short


@pytest.mark.slow
def test_links_open_the_trace_on_the_server(mlflow_server_url: str, tmp_path: Path) -> None:
    experiment = mlflow.set_experiment(f"links-{time.time_ns()}")
    trace_id = trace()
    mlflow.flush_trace_async_logging()
    html = report(tmp_path, experiment.name)
    links = re.findall(r'href="(.*?)"', html)
    place = f"{mlflow_server_url}/#/experiments/{experiment.experiment_id}/traces"
    assert links and all(url.startswith(place) and trace_id in url for url in links)


@pytest.mark.slow
def test_no_links_without_a_server(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("local")
    trace()
    mlflow.flush_trace_async_logging()
    html = report(tmp_path, "local")
    assert "href" not in html and "MLFLOW_TRACKING_URI" in html


@pytest.mark.slow
def test_rules_give_the_thresholds(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("rules")
    trace(seconds=2)
    mlflow.flush_trace_async_logging()
    rules = tmp_path / "alerts.yaml"
    rule = "name: slow, metric: latency_p95_ms, window: 5m, threshold: 1500"
    rules.write_text(f"rules:\n  - {{{rule}}}\n", encoding="utf-8")
    cards = cards_of(report(tmp_path, "rules", "--alerts", str(rules)))
    assert cards["応答時間 p95"][1:] == ("しきい値 1,500 ms 以下", "ng")
    assert cards["エラー率"][2] == "" and "しきい値なし" in cards["エラー率"][1]


@pytest.mark.slow
def test_releases_and_rollbacks_of_the_prompts_in_use(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("rollbacks")
    for text in ("良い", "悪い"):
        mlflow.genai.register_prompt("answer", text)
    manager = PromptRollbackManager("answer")
    trace(prompt="prompts:/answer/1")
    mlflow.flush_trace_async_logging()
    manager.promote(1)
    manager.promote(2, reason="長い案内")
    manager.rollback(reason="alert slow")
    trace(prompt="prompts:/answer/1")
    mlflow.flush_trace_async_logging()
    html = report(tmp_path, "rollbacks")
    assert [row[1:] for row in rows_of(html, "出来事")] == [
        ["リリース", "v1 をリリース", "answer@production"],
        ["リリース", "v2 をリリース", "answer@production: v1 から v2、長い案内"],
        ["ロールバック", "v1 へロールバック", "answer@production: v2 から v1、alert slow"],
    ]
    assert html.count('<line class="mark rollback"') >= 3


ERRORS = AlertConfig(
    rules=(AlertRule(name="errors", threshold=0.5, window="5m", severity="critical"),),
    offset="0s",
)


def rows(failed: range, count: int = 60) -> list[TraceRow]:
    """1 分に 1 件。"""
    return [
        TraceRow(
            trace_id=str(i),
            at_ms=round(NOW.timestamp() * 1000) + 60_000 * i,
            state="ERROR" if i in failed else "OK",
        )
        for i in range(count)
    ]


def test_alerts_are_found_again_in_the_stored_traces() -> None:
    events, problems = incidents.replayed_alerts(ERRORS, rows(range(20, 30)))
    assert [(event.kind, event.label) for event in events] == [
        ("alert", "errors 発報"),
        ("resolved", "errors 解消"),
    ]
    assert NOW + timedelta(minutes=20) <= events[0].at <= NOW + timedelta(minutes=25)
    assert problems == []
    fired, resolved = (event.detail for event in events)
    assert fired == "エラー率 60%(しきい値 50%、5 件)" and resolved.startswith("エラー率 40%")


def test_rules_that_cannot_be_computed_are_named() -> None:
    strange = TraceRow(trace_id="x", at_ms=1, assessments=(("tone", "friendly"),))
    rule = AlertRule(name="tone", metric="pass_rate:tone", op="<", threshold=0.5)
    config = AlertConfig(rules=(*ERRORS.rules, rule))
    _, problems = incidents.replayed_alerts(config, [strange])
    assert len(problems) == 1 and problems[0].startswith("tone: ")


@pytest.mark.slow
def test_all_pages_are_read(tmp_path: Path) -> None:
    """1 ページ(500 件)の境目で失わず、障害の時間帯が出来事に現れる。"""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    from report_speed import NAME, seed

    seed(tmp_path / "many.db", 1501)
    # 標準のルールは、1 分に 1 件の通信では、30% の失敗を障害と言わない
    rules = tmp_path / "alerts.yaml"
    rules.write_text(
        "rules: [{name: errors, metric: error_rate, window: 30m, threshold: 0.15}]\n",
        encoding="utf-8",
    )
    html = report(tmp_path, NAME, "--since", "25h", "--alerts", str(rules))
    assert cards_of(html)["リクエスト"][0] == "1,501 件"
    assert "errors 発報" in html


# 誤り ----------------------------------------------------------------------


@given(st.timedeltas(timedelta(seconds=1), timedelta(days=3650)))
def test_durations_and_the_same_moment_agree(ago: timedelta) -> None:
    ago = timedelta(seconds=round(ago.total_seconds()))
    start = periods.since(f"{ago // timedelta(seconds=1)}s", NOW)
    assert start == NOW - ago == periods.since((NOW - ago).isoformat(), NOW)


@given(st.text(max_size=12))
def test_any_other_text_is_refused_with_the_value(text: str) -> None:
    try:
        start = periods.since(text, NOW)
    except ValueError as error:
        assert repr(text) in str(error) and "24h" in str(error)
    else:
        assert start < NOW


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """引数の誤り(終了ステータス 2)の文面。"""
    with pytest.raises(SystemExit) as error:
        main([*arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_bad_since_is_an_argument_error(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0s", "2027-01-01", "5 min", "tomorrow", "-3h", ""):
        said = wrong(capsys, "report", "--experiment", "x", f"--since={text}")
        assert f"--since: {text!r} は" in said


def test_arguments_without_a_meaning_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--fresh", "serve"], "--fresh は serve では使えません"),
        (["serve", "--port", "99999"], "'99999' は 1 から 65535 の番号ではありません"),
        (["ui", "--port", "0"], "'0' は 1 から 65535 の番号ではありません"),
        (["ui", "--port", "http"], "'http' は 1 から 65535 の番号ではありません"),
    ):
        assert message in wrong(capsys, *arguments)


@pytest.mark.slow
def test_what_cannot_be_reported_is_said_with_the_fix(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("empty")
    cases: list[tuple[str, list[str], str]] = [
        ("", [], "エクスペリメント '' は .* にありません"),
        ("nothere", [], "エクスペリメント 'nothere' は .* にありません"),
        ("empty", [], "のトレースがありません"),
        ("empty", ["--alerts", "none.yaml"], "アラートの設定 none.yaml に誤りがあります"),
        ("empty", ["-o", "no/folder/x.html"], "フォルダー .*no/folder がありません"),
    ]
    for experiment, more, message in cases:
        with pytest.raises(SystemExit, match=message) as error:
            report(tmp_path, experiment, *more)
        assert "\n  -> " in str(error.value.code)


def test_a_mistyped_database_is_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "typo.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{missing}")
    with pytest.raises(SystemExit, match=r"typo\.db がありません"):
        main(["report", "--experiment", "x"])
    assert not missing.exists()
