"""8.4.1 アラートの設定ファイル(YAML)を読み、誤りをすべてまとめて報告する。

設定の誤りは、障害の最中ではなく、書いたときに見つけたい。知らないキーには近い名前を示す。URL や
キーをファイルに直接書くことは断る(環境変数の名前だけを書く)。

Databricks では、ファイルを Workspace か Volume に置き、秘密はシークレットから環境変数に入れる。
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics import metric_problem
from .config import AlertConfig, Inhibit, MuteWindow
from .model import (
    DAYS,
    MAX_NUMBER,
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    parse_clock,
    parse_duration,
    parse_zone,
)

Convert = Callable[[Any], Any]
Schema = Mapping[str, Convert]

SECRET_LIKE = re.compile(
    r"https?://\S*|\S*sig=\S*|\b(?=\w*\d)[0-9a-z]{32}\b|\bwhsec_\S*|\bxox[bp]-\S*", re.IGNORECASE
)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a non-empty string")
    return value


def _number(value: Any) -> float:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"{value!r:.60} is not a number")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _duration(value: Any) -> str:
    parse_duration(_text(value) if isinstance(value, str) else f"{value}")
    return value


def _labels(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a mapping of labels")
    return {_text(key): _text(item) for key, item in value.items()}


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{value!r} is not a list of names")
    return tuple(_text(item) for item in value)


def _some_names(value: Any) -> tuple[str, ...]:
    if not (found := _names(value)):
        raise ValueError("the list is empty; name at least one")
    return found


def _one_of(*choices: str) -> Convert:

    def convert(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{value!r} is not one of {', '.join(choices)}{_near(value, choices)}")
        return value

    return convert


def _metric(value: Any, rate_for: str = "") -> str:
    if problem := metric_problem(_text(value), rate_for=rate_for):
        raise ValueError(problem)
    return value


def _rate(value: Any) -> str:
    return _metric(value, "a burn rate")


def _clock_time(value: Any) -> str:
    text: Any = value
    if type(value) is int and 0 <= value < 1440:  # YAML は、引用符のない 22:00 を 1320 と読む
        text = f"{value // 60:02}:{value % 60:02}"
    parse_clock(_text(text))
    return text


def _days(value: Any) -> tuple[str, ...]:
    return tuple(_one_of(*DAYS)(day) for day in _some_names(value))


def _zone(value: Any) -> str:
    parse_zone(_text(value))
    return value


def _variable(value: Any) -> str:
    # 値を文に入れない: 変数の名前の代わりに、秘密そのものが書かれているかもしれない
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
        raise ValueError("not the name of an environment variable; secrets stay out of the file")
    return value


SEVERITY = _one_of("info", "warning", "error", "critical")
COMMON: Schema = {
    "name": _text,
    "metric": _metric,
    "for": _duration,
    "keep_firing_for": _duration,
    "min_samples": _whole,
    "no_data": _one_of("ok", "keep", "alert"),
    "severity": SEVERITY,
    "labels": _labels,
    "summary": _text,
    "runbook_url": _text,
    "action": _one_of("rollback"),
}
RULE: Schema = {
    **COMMON,
    "window": _duration,
    "op": _one_of(">", "<"),
    "threshold": _number,
    "clear_threshold": _number,
    "confidence": _number,
    "low_traffic_confidence": _number,
    "compare": _duration,
    "by": _text,
}
BURN_RATE: Schema = {
    **COMMON,
    "metric": _rate,
    "objective": _number,
    "factor": _number,
    "long": _duration,
    "short": _duration,
}
INHIBIT: Schema = {"when": _labels, "mute": _labels, "equal": _names}
MUTE: Schema = {
    **dict.fromkeys(("start", "end"), _clock_time),
    **{"match": _labels, "days": _days, "timezone": _zone},
}
ROUTE: Schema = {"match": _labels, "to": _names, "repeat": _duration}
RECEIVER_COMMON: Schema = {"send_resolved": _flag, "min_severity": SEVERITY}
RECEIVERS: Mapping[str, tuple[Schema, tuple[str, ...]]] = {
    "slack": ({"url_env": _variable}, ("url_env",)),
    "pagerduty": (
        {"routing_key_env": _variable, "region": _one_of("us", "eu"), "source": _text},
        ("routing_key_env",),
    ),
    "teams": ({"url_env": _variable}, ("url_env",)),
    "webhook": ({"url_env": _variable, "secret_env": _variable}, ("url_env", "secret_env")),
    "email": (
        {
            **dict.fromkeys(("host", "sender"), _text),
            **dict.fromkeys(("user_env", "password_env"), _variable),
            "port": _whole,
            "tls": _one_of("starttls", "implicit", "none"),
            "to": _some_names,
        },
        ("host", "sender", "to"),
    ),
    "alertmanager": ({"url_env": _variable}, ("url_env",)),
    "console": ({}, ()),
}
TOP: Schema = {
    "version": _whole,
    "experiment": _text,
    "offset": _duration,
    "repeat": _duration,
    "evaluation_failure_for": _duration,
    "labels": _labels,
    "watchdog_severity": SEVERITY,
    "interval": _duration,
}
LISTS = ("rules", "burn_rates", "inhibit", "mute", "routes")


class _Reader:
    """誤りを集めながら、辞書を読む。"""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def note(self, path: str, problem: object) -> None:
        """誤りを一つ加える。場所や引用した値に秘密があれば隠す。"""
        text = SECRET_LIKE.sub("***", str(problem))
        where = SECRET_LIKE.sub("***", path)  # 秘密が、値ではなくキーに書かれていることもある
        self.problems.append(f"{where}: {text}" if path else text)

    def fields(
        self, path: str, data: Any, schema: Schema, required: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """``schema`` に従って読む。誤りがあれば ``None``。"""
        if not isinstance(data, Mapping):
            return self.note(path, f"{_short(data)} is not a mapping")
        before, found = len(self.problems), dict[str, Any]()
        for key, value in data.items():
            where = f"{path}.{key}" if path else str(key)
            if key not in schema:
                self.note(where, f"unknown key{_near(key, schema)}")
                continue
            try:
                found[key] = schema[key](value)
            except (ValueError, OverflowError) as error:
                self.note(where, error)
        for key in required:
            if key not in data:
                self.note(path, f"{key} is missing")
        return found if len(self.problems) == before else None

    def items(self, data: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
        """リストの項目を、場所の名前と一緒に返す。"""
        value = data.get(key, [])
        if isinstance(value, str) or not isinstance(value, Sequence):
            self.note(key, f"{_short(value)} is not a list")
            return []
        return [(f"{key}[{i}]", item) for i, item in enumerate(value)]

    def build(
        self, path: str, make: Callable[..., Any], fields: dict[str, Any] | None
    ) -> list[Any]:
        """読めていれば作る。作れなければ、その理由を誤りに加える。"""
        if fields is None:
            return []
        fields = {{"for": "for_"}.get(key, key): value for key, value in fields.items()}
        try:
            return [make(**fields)]
        except AlertConfigError as error:
            prefix = f"rule {fields.get('name')!r}: "
            for problem in error.problems:
                self.note(path, problem.removeprefix(prefix).replace("for_:", "for:"))
            return []


def load_config(config: AlertConfig | Mapping[str, Any] | str | os.PathLike[str]) -> AlertConfig:
    """``AlertConfig``、その辞書、YAML ファイルのパスから ``AlertConfig`` を得る。

    >>> rule = {"name": "slow", "metric": "latency_p95", "window": "5 min", "threshhold": 3000}
    >>> load_config({"rules": [rule]})
    Traceback (most recent call last):
        ...
    chapter8_samples.alerting.rules.model.AlertConfigError: invalid alert configuration:
    - rules[0].metric: unknown metric 'latency_p95'; did you mean 'latency_p95_ms'?
    - rules[0].window: '5 min' is not a duration; write 30s, 5m, 1h30m or 2d
    - rules[0].threshhold: unknown key; did you mean 'threshold'?
    - rules[0]: threshold is missing

    Raises:
        AlertConfigError: 誤りのすべて。
    """
    if isinstance(config, AlertConfig):
        return config
    is_path = isinstance(config, str | os.PathLike)
    return config_from_mapping(read_yaml(config) if is_path else config)


def config_from_mapping(data: Any) -> AlertConfig:
    """辞書から ``AlertConfig`` を作る。

    Raises:
        AlertConfigError: 誤りのすべて(``rules[2].for: '5 min' is not a duration`` のような形)。
    """
    reader = _Reader()
    if not isinstance(data, Mapping):
        raise AlertConfigError([f"the file must be a mapping, found {_short(data)}"])
    known = {*TOP, *LISTS, "receivers"}
    for key in data:
        if key not in known:
            reader.note(str(key), f"unknown key{_near(key, known)}")
    top = reader.fields("", {k: v for k, v in data.items() if k in TOP}, TOP)
    if data.get("version", 1) != 1:
        reader.note("version", f"{data['version']!r} is not supported; write 1")
    rules = _many(reader, data, "rules", AlertRule, RULE, "name metric window threshold")
    rules += _many(reader, data, "burn_rates", BurnRateRule, BURN_RATE, "name objective factor")
    inhibit = _many(reader, data, "inhibit", Inhibit, INHIBIT, "when mute")
    mute = _many(reader, data, "mute", MuteWindow, MUTE, "start end")
    receivers = _receivers(reader, data.get("receivers", {}))
    routes = _many(reader, data, "routes", dict, ROUTE, "to")
    declared: Any = data.get("receivers", {})
    _check_routes(reader, routes, declared if isinstance(declared, Mapping) else {})
    if not rules and not reader.problems:
        reader.note("rules", "no rule is defined")
    settings = {key: value for key, value in (top or {}).items() if key != "version"}
    settings.update(rules=rules, inhibit=tuple(inhibit), mute=tuple(mute))
    settings.update(receivers=receivers, routes=tuple(routes))
    made = reader.build("", AlertConfig, settings)
    if reader.problems:
        raise AlertConfigError(reader.problems)
    return made[0]


def delivery_problems(config: AlertConfig) -> list[str]:
    """Python で書いた設定の、通知先と経路の誤り。"""
    reader = _Reader()
    _receivers(reader, config.receivers)
    read = (reader.fields(f"routes[{i}]", r, ROUTE, ["to"]) for i, r in enumerate(config.routes))
    _check_routes(reader, [route for route in read if route], config.receivers)
    return reader.problems


def _many(
    reader: _Reader,
    data: Mapping[str, Any],
    key: str,
    make: Callable[..., Any],
    schema: Schema,
    required: str,
) -> list[Any]:
    found: list[Any] = []
    for path, item in reader.items(data, key):
        fields = reader.fields(path, item, schema, required.split())
        gates = ("confidence", "low_traffic_confidence")
        gate = next((name for name in gates if fields and name in fields), "")
        if fields and gate and (problem := metric_problem(fields["metric"], rate_for=gate)):
            reader.note(f"{path}.{gate}", problem)
        found += reader.build(path, make, fields)
    return found


def _receivers(reader: _Reader, data: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(data, Mapping):
        reader.note("receivers", f"{_short(data)} is not a mapping")
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for name, settings in data.items():
        if fields := _receiver(reader, f"receivers.{name}", settings):
            found[str(name)] = fields
    return found


def _receiver(reader: _Reader, path: str, settings: Any) -> dict[str, Any] | None:
    if not isinstance(settings, Mapping):
        return reader.note(path, f"{_short(settings)} is not a mapping")
    kind = settings.get("type")
    if not isinstance(kind, str) or kind not in RECEIVERS:
        hint = _near(kind, RECEIVERS)
        return reader.note(path, f"type must be one of {', '.join(RECEIVERS)}{hint}")
    schema, required = RECEIVERS[kind]
    public: dict[str, Any] = {}
    for key, value in settings.items():
        if f"{key}_env" in schema or (isinstance(value, str) and SECRET_LIKE.search(value)):
            hint = f"secrets stay out of the file; write {_env(key, schema)}: NAME"
            reader.note(f"{path}.{key}", hint)
        else:
            public[key] = value
    schema = {"type": _text, **RECEIVER_COMMON, **schema}
    given = {str(key).removesuffix("_env") for key in settings}
    missing = [key for key in required if key.removesuffix("_env") not in given]
    return reader.fields(path, public, schema, missing)


def _env(key: Any, schema: Schema) -> str:
    names = [name for name in schema if name.endswith("_env")]
    return (difflib.get_close_matches(f"{key}", names, 1) or names or [f"{key}_env"])[0]


def _check_routes(
    reader: _Reader, routes: Sequence[Mapping[str, Any]], receivers: Mapping[str, Any]
) -> None:
    readable = not any(problem.startswith("routes[") for problem in reader.problems)
    for i, route in enumerate(routes):
        for name in route["to"]:
            if name not in receivers:
                reader.note(f"routes[{i}].to", f"unknown receiver {name!r}{_near(name, receivers)}")
    if readable and routes and routes[-1].get("match"):
        reader.note("routes", "the last route must match everything; add {match: {}, to: [...]}")


def _near(value: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(value), [str(k) for k in known], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _short(value: Any) -> str:
    return repr(value)[:60]


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """YAML ファイルを読む。

    Raises:
        AlertConfigError: ファイルがない、または YAML として読めない。
    """
    import yaml

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _strict_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise AlertConfigError([f"cannot read {os.fspath(path)}: {error}"]) from error
    except yaml.MarkedYAMLError as error:  # 例外の文は、秘密かもしれない行を引用する
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = f"{os.fspath(path)} is not YAML: {where}{error.problem or error.context}"
        raise AlertConfigError([SECRET_LIKE.sub("***", problem)]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AlertConfigError([f"{os.fspath(path)} is not YAML: {error}"]) from error


def _strict_loader() -> Any:
    """同じキーが二度あれば断る(既定では、先に書いたほうが黙って消える)。"""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                problem = f"key {twice!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
