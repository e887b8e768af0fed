"""設定ファイル: 誤りはすべて一度に、場所と直し方を付けて。"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from chapter8_samples._lab.servers.receivers import WebhookReceiver
from chapter8_samples.alerting import notifier_from_config, rules, verify_signature
from chapter8_samples.alerting.__main__ import main
from chapter8_samples.alerting.alert_config import AlertConfig, load_config
from chapter8_samples.alerting.delivery import (
    Alert,
    AlertStatus,
    NotificationConfigError,
)
from chapter8_samples.alerting.rules import AlertConfigError, AlertRule, BurnRateRule

GOOD = """
version: 1
offset: 10s
repeat: 4h
labels: {service: support-bot, environment: prod}
rules:
  - {name: high_error_rate, metric: error_rate, window: 5m, op: ">", threshold: 0.05,
     clear_threshold: 0.03, for: 1m, keep_firing_for: 5m, confidence: 0.95,
     severity: critical, action: rollback, runbook_url: "https://example.com/errors"}
  - {name: quality, metric: "pass_rate:relevance", window: 1h, op: "<", threshold: 0.88}
burn_rates:
  - {name: budget, objective: 0.99, factor: 14.4, long: 1h, short: 5m, severity: critical}
inhibit: [{when: {severity: critical}, mute: {severity: warning}, equal: [service]}]
mute: [{match: {severity: warning}, start: "22:00", end: "07:00", timezone: Asia/Tokyo}]
receivers:
  oncall: {type: pagerduty, routing_key_env: PD_KEY, region: eu}
  ops: {type: slack, url_env: SLACK_URL, send_resolved: false, min_severity: warning}
  local: {type: console}
routes: [{match: {severity: critical}, to: [oncall, ops]}, {match: {}, to: [local]}]
"""


RULES = "rules: [{name: errors, metric: error_rate, window: 5m, threshold: 0.5}]\n"


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "alerts.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def keys_of(kind: type[Any]) -> set[str]:
    """設定に書けるキー。"""
    return {name.rstrip("_") for name in kind.__dataclass_fields__}


def problems(data: Any) -> tuple[str, ...]:
    with pytest.raises(AlertConfigError) as caught:
        load_config(data)
    return caught.value.problems


def test_a_good_file_is_read_completely(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    errors, quality, budget = config.rules
    assert isinstance(errors, AlertRule) and isinstance(budget, BurnRateRule)
    assert (errors.for_, errors.confidence, errors.action) == ("1m", 0.95, "rollback")
    assert quality.metric == "pass_rate:relevance"
    assert config.offset == "10s"
    assert config.mute[0].timezone == "Asia/Tokyo"


def test_receivers_and_routes_become_a_notifier(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    with pytest.raises(NotificationConfigError, match=r"PD_KEY \(receiver oncall\), SLACK_URL"):
        notifier_from_config(config, {})
    url = "https://hooks.example.com/services/T/B/SECRET"
    notifier = notifier_from_config(config, {"PD_KEY": "k" * 32, "SLACK_URL": url})
    assert notifier.route(Alert(name="a", severity="critical")) == ("oncall", "ops")  # type: ignore[arg-type]
    assert notifier.route(Alert(name="a")) == ("local",)


def test_every_kind_of_receiver_is_built_from_its_settings(webhooks: WebhookReceiver) -> None:
    receivers: dict[str, dict[str, Any]] = {
        "team": {"type": "teams", "url_env": "TEAMS_URL", "send_resolved": False},
        "am": {"type": "alertmanager", "url_env": "AM_URL"},
        "chat": {"type": "slack", "url_env": "SLACK_URL", "min_severity": "error"},
        "hook": {"type": "webhook", "url_env": "HOOK_URL", "secret_env": "HOOK_SECRET"},
        "page": {"type": "pagerduty", "routing_key_env": "PD_KEY", "source": "bot"},
        "mail": {"type": "email", "host": "h", "port": 25, "sender": "a@b", "to": ["c@d"],
                 "min_severity": "critical"},
        "local": {"type": "console"},
    }  # fmt: skip
    names = {v for s in receivers.values() for k, v in s.items() if k.endswith("_env")}
    config = load_config({**yaml.safe_load(RULES), "receivers": receivers})
    with pytest.raises(NotificationConfigError) as caught:
        notifier_from_config(config, {})
    assert all(name in str(caught.value) for name in names)
    environ = {name: f"{webhooks.url}/{name}?sig=SECRET" for name in names}
    notifier = notifier_from_config(config, environ | {"AM_URL": webhooks.url})
    alert = Alert(name="slow", summary="遅延の p95 が 3 秒超")
    sent = {delivery.handler: delivery for delivery in notifier.notify(alert)}
    assert list(sent) == list(receivers) and all(delivery.ok for delivery in sent.values())
    assert {name for name, delivery in sent.items() if delivery.skipped} == {"chat", "page", "mail"}
    posts = {request.path.partition("?")[0]: request for request in webhooks.wait_for(3)}
    card = posts["/TEAMS_URL"].json["attachments"][0]["content"]
    assert [block["text"] for block in card["body"][:2]] == [
        "[発報] WARNING slow",
        "遅延の p95 が 3 秒超",
    ]
    (posted,) = posts["/api/v2/alerts"].json
    assert posted["labels"] == {"alertname": "slow", "severity": "warning"}
    signed = posts["/HOOK_URL"]
    verify_signature(environ["HOOK_SECRET"], dict(signed.headers.items()), signed.body)
    resolved = notifier.notify(
        replace(alert, status=AlertStatus.RESOLVED), only={alert.fingerprint: ["team"]}
    )
    assert [delivery.skipped for delivery in resolved] == ["send_resolved is off"]


def test_every_mistake_is_reported_at_once_with_its_place() -> None:
    rules = [
        {"name": "a", "metric": "error_rat", "window": "5 min", "threshold": "high"},
        {"name": "b", "metric": "error_rate", "window": "5m", "threshhold": 1, "for": "x"},
        "not a rule",
        {"name": "c", "metric": "error_rate", "window": "5m", "threshold": 0.5, "confidence": 95},
        {"name": "c", "metric": "error_rate", "window": "5m", "threshold": 0.5},
    ]
    receivers = {"ops": {"type": "slak"}, "chat": {"type": "slack"}, "page": {}}
    found = problems(
        {"rule": [], "rules": rules, "receivers": receivers, "routes": [{"to": ["opss"]}]}
    )
    assert found == (
        "rules[1].threshold: Field required",
        "rules[0].metric: unknown metric 'error_rat'; did you mean 'error_rate'?",
        "rules[0].window: '5 min' is not a duration; write 30s, 5m, 1h30m or 2d",
        "rules[0].threshold: 'high': Input should be a valid number, unable to parse string as a "
        "number",
        "rules[1].for: 'x' is not a duration; write 30s, 5m, 1h30m or 2d",
        "rules[1].threshhold: unknown key; did you mean 'threshold'?",
        "rules[2]: 'not a rule': Input should be a dictionary or an instance of AlertRule",
        "rules[3].confidence: 95: Input should be less than 1; write 0.95 for 95%",
        "receivers.ops: 'slak' is not one of slack, teams, alertmanager, webhook, pagerduty, "
        "email, console; did you mean 'slack'?",
        "receivers.chat.url_env: Field required",
        "receivers.page: type is missing",
        "rule: unknown key; did you mean 'rules'?",
        "rules: duplicate name 'c'",
        "routes[0].to: unknown receiver 'opss'; did you mean 'ops'?",
    )


SECRET = "https://hooks.slack.com/services/T0/B0/SECRET"


@pytest.mark.parametrize(
    "receiver",
    [
        {"type": "slack", "url": SECRET},
        {"type": "slack", "url_env": SECRET},
        {"type": "slack", "url_env": "not a SECRET name"},
        {"type": "pagerduty", "routing_key": "0123456789abcdefSECRET0123456789"},
        {"type": "pagerduty", "routing_key_env": "R0HJ5XSECRETXSECRETXSECRETXSECRE"},
        {"type": "teams", "url_env": "x.logic.azure.com/?sig=SECRET"},
        {
            "type": "pagerduty",
            "routing_key_env": "KEY",
            "source": "0R5XSECRETXSECRETXSECRETXSECRE00",
        },
        {"type": "email", "host": "https://u:SECRET@h/x", "sender": "a@b.c", "to": ["a@b.c"]},
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(receiver: Any) -> None:
    found = problems({**yaml.safe_load(RULES), "receivers": {"ops": receiver}})
    assert "secrets stay out of the file" in found[-1]
    assert all(problem.startswith("receivers.ops") for problem in found)
    assert "SECRET" not in "".join(found)


def test_what_is_no_mapping_is_refused(tmp_path: Path) -> None:
    for content, message in (("rules: [", "is not YAML"), ("- a", "a mapping"), ("", "a mapping")):
        assert message in problems(write(tmp_path, content))[0]
    for data in ([1], None, b"x", 5):
        assert "must be a mapping" in problems(data)[0]
    assert "cannot read nowhere.yaml" in problems("nowhere.yaml")[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
KEYS = ["version", "rules", "burn_rates", "inhibit", "mute", "receivers", "routes", "offset"]
PLAUSIBLE = st.sampled_from(
    ["5m", "1h", "0s", "error_rate", "pass_rate:x", ">", "<", 0.05, 0.99, 30, "critical", "keep"]
)


def records(kind: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(sorted(keys_of(kind))), PLAUSIBLE | JSON, max_size=12)


ANYTHING = (
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6)
    | st.fixed_dictionaries(
        {"rules": st.lists(records(AlertRule), max_size=3)},
        optional={"burn_rates": st.lists(records(BurnRateRule), max_size=2), "offset": PLAUSIBLE},
    )
    | JSON
)


@settings(max_examples=30)
@given(ANYTHING)
def test_no_input_gives_anything_but_a_config_or_a_config_error(data: Any) -> None:
    check_config_or_config_error(data)


@pytest.mark.slow
@settings(max_examples=600)
@given(ANYTHING)
def test_600_inputs_give_a_config_or_a_config_error(data: Any) -> None:
    check_config_or_config_error(data)


def check_config_or_config_error(data: Any) -> None:
    try:
        assert isinstance(load_config(data), AlertConfig)
    except AlertConfigError as error:
        assert error.problems


def test_times_of_day_may_stand_without_quotes(tmp_path: Path) -> None:
    minutes_of = {"6:30": 510, "06:30": 510, "22:00": 1440, "24:00": 120, '"24:00"': 120}
    for end, minutes in minutes_of.items():
        text = f"{RULES}mute: [{{start: 22:00, end: {end}}}]"
        (window,) = load_config(write(tmp_path, text)).mute
        day = [datetime(2026, 1, 1, m // 60, m % 60, tzinfo=timezone.utc) for m in range(1440)]
        assert sum(window.covers(at) for at in day) == minutes


def test_a_time_of_day_that_yaml_read_as_a_number_is_refused_with_its_spelling() -> None:
    """YAML 1.1 は、引用符のない 22:00 を 1320、7:30 を 450 と読む。"""
    for written, spelling in ((22, "22:00"), (7, "07:00"), (1320, "22:00"), (450, "07:30"),
                              (0, "00:00"), (1440, "24:00"), (24, "24:00")):  # fmt: skip
        data = {**yaml.safe_load(RULES), "mute": [{"start": written, "end": "06:00"}]}
        expected = f'mute[0].start: {written} is not a time of day; write "{spelling}"'
        assert problems(data) == (expected,)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("mute: [{start: 22, end: 7}]", "mute[0].start: '22' is not a time of day; write "),
        ("mute: [{start: 0700, end: 0900}]", "mute[0].start: '0700' is not a time of day; write "),
        ("mute: [{start: 22.30, end: 7:00}]", "mute[0].start: '22.30' is not a time of day"),
        ("offset: 30", "offset: '30' is not a duration; write 30s"),
        ("offset: 5:00", "offset: '5:00' is not a duration"),
        ("repeat:", "repeat: '' is not a duration"),
        (
            "receivers: {a: {type: console, send_resolved: maybe}}",
            "receivers.a.send_resolved: 'maybe': Input should be a valid boolean",
        ),
        (
            "receivers: {a: {type: email, host: h, sender: a@b, to: [c@d], tls: off}}",
            "receivers.a.tls: 'off' is not one of starttls, implicit, none",
        ),
    ],
)
def test_what_yaml_1_1_would_misread_is_named(line: str, problem: str, tmp_path: Path) -> None:
    assert problems(write(tmp_path, f"{RULES}{line}\n"))[0].startswith(problem)


def test_words_and_dates_without_quotes_stay_what_they_are(tmp_path: Path) -> None:
    text = f"{RULES}labels: {{country: no, since: 2026-11-30, on: y, version: 1.10, ratio: 1:20}}"
    assert load_config(write(tmp_path, text)).labels == {
        "country": "no", "since": "2026-11-30", "on": "y", "version": "1.10", "ratio": "1:20",
    }  # fmt: skip
    flag = f"{RULES}receivers: {{a: {{type: console, send_resolved: no}}}}"
    assert load_config(write(tmp_path, flag)).receivers["a"]["send_resolved"] is False


def test_what_rules_have_in_common_is_written_once(tmp_path: Path) -> None:
    content = """
rules:
  - &common {name: errors, metric: error_rate, window: 5m, threshold: 0.5, severity: critical}
  - {<<: *common, name: more, threshold: 0.8}
"""
    first, second = load_config(write(tmp_path, content)).rules
    assert second == replace(first, name="more", threshold=0.8)  # type: ignore[call-arg]


def test_a_key_written_twice_does_not_silently_replace_the_first(tmp_path: Path) -> None:
    for text in (RULES + RULES, RULES.replace("threshold: 0.5", "threshold: 1, threshold: 0.5")):
        assert "is written twice" in problems(write(tmp_path, text))[0]


@pytest.mark.parametrize(
    "receiver",
    [
        f"{{type: slack, url_env: [{SECRET}]}}",
        SECRET,
        f'{{type: slack, url: "{SECRET}}}',
        f"{{type: slack, {SECRET}: 1}}",
        f"{{}}\n  {SECRET}: {{type: slak}}",
        f"{{}}\n{SECRET}: 1",
    ],
)
def test_no_message_repeats_a_secret_wherever_it_stands(receiver: str, tmp_path: Path) -> None:
    found = problems(write(tmp_path, f"{RULES}receivers:\n  ops: {receiver}\n"))
    assert found and "SECRET" not in "".join(found)


def test_a_value_is_cut_only_after_its_secret_is_hidden() -> None:
    key = "0123456789abcdef0123456789abcdef"
    with pytest.raises(AlertConfigError) as caught:
        load_config({"watchdog_severity": f"the routing key of the rotation is {key}"})
    assert key[:8] not in str(caught.value)


@pytest.mark.parametrize(
    "secret",
    [
        "dapi0123456789abcdef0123456789abcdef",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "postgresql://app:hunter2@db/mlflow",
        "smtp://app:hunter2@mail",
    ],
)
def test_a_token_longer_than_a_key_and_a_password_in_a_uri_are_hidden_too(secret: str) -> None:
    for fields in ({"repeat": secret}, {"watchdog_severity": secret}, {secret: "1"}):
        assert secret[-9:] not in "".join(problems({**yaml.safe_load(RULES), **fields}))


@pytest.mark.parametrize("tagged", ["!!int '-'", "!!float ''", "!!bool x", "!!map x", "!env HOME"])
def test_a_tag_is_refused_with_its_line(tagged: str, tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, f"{RULES}repeat: {tagged}\n"))
    assert "line 2, column 9: " in found


@pytest.mark.parametrize(
    "text",
    [
        "repeat: *x",
        "version: *x",
        "mute: [{start: *x, end: '7:00'}]",
        "watchdog_severity: *x",
        "routes: [{match: {name: *x}, to: *x}]",
        "burn_rates: [{name: b, objective: 0.9, factor: 2, metric: *x, severity: *x}]",
        f"watchdog_severity: {'critical' * 100_000}",
        f"evaluation_failure_for: {'9' * 200_000}",
        f"labels: {{{', '.join(f'k{i}: v' for i in range(20_000))}}}\nrepeat: 4",
    ],
)
def test_aliases_within_aliases_and_huge_values_are_refused_at_once(
    text: str, tmp_path: Path
) -> None:
    nested = "".join(f"  - &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 12))
    text = f"x:\n  - &x0 [a, b]\n{nested}  - &x [*x11]\n{RULES}{text}\n"
    started = time.process_time()
    assert problems(write(tmp_path, text))
    assert time.process_time() - started < 10  # すべて書き出すと、1 時間では済まない


def test_a_broken_last_route_is_not_also_a_missing_catch_all() -> None:
    routes = [{"match": {"severity": "critical"}, "to": []}, {"match": {}, "to": "ops"}]
    found = problems({**yaml.safe_load(RULES), "routes": routes})
    (problem,) = found
    assert problem.startswith("routes[1].to: 'ops': ")


def test_receivers_written_in_python_are_checked_before_they_are_used() -> None:
    receivers = {"ops": {"type": "slack", "url": "https://hooks.slack.com/services/SECRET"}}
    routes = ({"match": {"severity": "critical"}, "to": ["opps"]},)
    with pytest.raises(AlertConfigError) as caught:
        AlertConfig(rules=[AlertRule(name="a")], receivers=receivers, routes=routes)
    assert "SECRET" not in str(caught.value)
    hint = "unknown key; did you mean 'url_env'? (secrets stay out of the file)"
    for expected in (
        f"receivers.ops.url: {hint}",
        "unknown receiver 'opps'",
        "must match everything",
    ):
        assert expected in str(caught.value)


def test_the_name_of_the_built_in_alert_is_taken() -> None:
    found = problems(yaml.safe_load(RULES.replace("name: errors", "name: alert_evaluation_failed")))
    assert found == ("rules: 'alert_evaluation_failed' is a built-in alert; rename the rule",)


EXAMPLE = Path(rules.__file__).with_name("alerts.yaml")


def test_the_example_beside_the_part_is_complete_and_passes_the_check(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", str(EXAMPLE)]) == 0
    assert capsys.readouterr().out == "OK: 8 rules, 7 receivers\n"
    data = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert data.keys() == {"version", *keys_of(AlertConfig)}
    written = {key for rule in data["rules"] for key in rule}
    assert written | {"no_data"} == keys_of(AlertRule)
    assert {receiver["type"] for receiver in data["receivers"].values()} == {
        "slack", "pagerduty", "teams", "webhook", "email", "alertmanager", "console"
    }  # fmt: skip
    environ = dict.fromkeys(variables(data["receivers"]), "https://example.com/x")
    assert len(notifier_from_config(load_config(EXAMPLE), environ).queues) == 7


def variables(receivers: Any) -> set[str]:
    return {v for r in receivers.values() for k, v in r.items() if k.endswith("_env")}


WORDS = (
    "{",
    "}",
    "[",
    "]",
    ":",
    "- ",
    "*a",
    "&a",
    "!!x",
    "22:00",
    "no",
    "~",
    "1e400",
    "-1",
    "error_rate",
    "'",
    '"',
    "\n",
    "  ",
    "\t",
    "#",
    "<<",
    "9" * 50,
    "\x00",
    "\ud83d",
    "0x1f",
    "https://u:p@h/x?sig=SECRET",
)


def mutated(text: str, rng: random.Random) -> str:
    """文字か行を消す、写す、置き換える。"""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(lines))
        at = rng.randrange(len(lines[i]) + 1)
        cut = at + rng.randint(0, 6)
        change = rng.randrange(3)
        if change == 0:
            lines[i] = lines[i][:at] + rng.choice(WORDS) + lines[i][cut:]
        elif change == 1:
            lines[i] = lines[rng.randrange(len(lines))]
        else:
            lines[i] = lines[i].replace(rng.choice(lines[i].split() or ["x"]), rng.choice(WORDS))
    return "".join(lines)


def check_mutated(count: int, tmp_path: Path) -> None:
    text, read = EXAMPLE.read_text(encoding="utf-8"), 0
    for seed in range(count):
        path = tmp_path / "mutated.yaml"
        path.write_bytes(mutated(text, random.Random(seed)).encode("utf-8", "surrogatepass"))
        try:
            load_config(path)
            read += 1
        except AlertConfigError as error:
            assert error.problems and "sig=SECRET" not in str(error)
    assert 0 < read < count


def test_20_mutated_files_give_a_config_or_a_config_error(tmp_path: Path) -> None:
    check_mutated(20, tmp_path)


@pytest.mark.slow
def test_300_mutated_files_give_a_config_or_a_config_error(tmp_path: Path) -> None:
    check_mutated(300, tmp_path)


def test_alertmanager_holds_an_alert_until_after_the_next_evaluation(
    webhooks: WebhookReceiver,
) -> None:
    """10 分おきの評価で、次の評価の前に解消とみなされない。"""
    for interval, minutes in ((None, 5), ("30s", 5), ("10m", 30), (timedelta(hours=1), 180)):
        config = AlertConfig(
            interval=interval, receivers={"am": {"type": "alertmanager", "url_env": "AM_URL"}}
        )
        before = datetime.now(timezone.utc)
        notifier_from_config(config, {"AM_URL": webhooks.url}).notify(Alert(name="a"))
        (posted,) = webhooks.wait_for(1)[-1].json
        left = datetime.fromisoformat(posted["endsAt"]) - before
        assert timedelta(0) <= left - timedelta(minutes=minutes) < timedelta(minutes=1)
    assert problems({**yaml.safe_load(RULES), "interval": "0s"}) == (
        "interval: must be longer than 0s",
    )


ODD: list[Any] = [None, True, -1, 22, 0.5, math.nan, 10**400, "", "x", "5m", [], {}, [1],
                  [[]], {1: 2}, b"x", object(), {"a": {"b": 1}}]  # fmt: skip


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """書き換えられるところ(入れ物と、その中の位置)。"""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        yield data, key
        if isinstance(value, dict | list):
            yield from places(value)


def test_any_value_at_any_place_of_the_example_is_a_mistake_with_a_place_or_fine() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    original = yaml.safe_load(text)
    for i in range(len(list(places(original)))):
        for odd in random.Random(i).sample(ODD, 3):
            data = copy.deepcopy(original)
            holder, key = list(places(data))[i]
            holder[key] = odd
            check_config_or_config_error(data)


def test_a_key_of_another_place_is_no_hint() -> None:
    found = problems({"rules": [{**yaml.safe_load(RULES)["rules"][0], "interval": "1m"}]})
    assert found == ("rules[0].interval: unknown key",)
