"""8.4.1 アラートの設定ファイル(YAML)を読む。

設定の誤りは、障害の最中ではなく、書いたときに見つけたい。書き方の例は ``alerts.yaml`` にある。

Databricks では、ファイルを Workspace か Volume に置き、秘密はシークレットから環境変数に入れる。
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .checking import AlertConfigError
from .config import AlertConfig
from .values import short

REQUIRED = {
    "rules": ("metric", "window", "threshold"),
    "burn_rates": ("objective", "factor"),
    "mute": ("start", "end"),
}
"""Python では省略できても、ファイルには書いてもらう項目。"""


def load_config(config: AlertConfig | Mapping[str, Any] | str | os.PathLike[str]) -> AlertConfig:
    """``AlertConfig``、その辞書、YAML ファイルのパスから ``AlertConfig`` を得る。

    >>> rule = {"name": "slow", "metric": "latency_p95", "window": "5 min", "threshhold": 3000}
    >>> load_config({"rules": [rule]})
    Traceback (most recent call last):
        ...
    chapter8_samples.alerting.rules.checking.AlertConfigError: invalid alert configuration:
    - rules[0].threshold: Field required
    - rules[0].metric: unknown metric 'latency_p95'; did you mean 'latency_p95_ms'?
    - rules[0].window: '5 min' is not a duration; write 30s, 5m, 1h30m or 2d
    - rules[0].threshhold: unknown key; did you mean 'threshold'?

    Raises:
        AlertConfigError: 誤りのすべて。
    """
    if isinstance(config, AlertConfig):
        return config
    data: Any = _read_yaml(config) if isinstance(config, str | os.PathLike) else config
    if not isinstance(data, Mapping):
        raise AlertConfigError([f"the file must be a mapping, found {short(data)}"])
    fields = {str(key): value for key, value in data.items()}
    found = list(_file_problems(fields))
    fields.pop("version", None)
    try:
        made = AlertConfig(**fields)
    except AlertConfigError as error:
        raise AlertConfigError([*found, *error.problems]) from None
    if not found and not made.rules:
        found = ["rules: no rule is defined"]
    if found:
        raise AlertConfigError(found)
    return made


def _file_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    if fields.get("version", 1) not in (1, "1"):
        yield f"version: {short(fields['version'])} is not supported; write 1"
    for key, required in REQUIRED.items():
        items = fields.get(key)
        for i, item in enumerate(items if isinstance(items, list | tuple) else []):
            for name in required:
                if isinstance(item, Mapping) and name not in item:
                    yield f"{key}[{i}].{name}: Field required"


def _read_yaml(path: str | os.PathLike[str]) -> Any:
    import yaml

    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _strict_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise AlertConfigError([f"cannot read {os.fspath(path)}: {error}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # 例外の文は、秘密かもしれない行を引用する。行の番号と理由だけを使う
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = f"{where}{getattr(error, 'problem', None) or error}"
        raise AlertConfigError([f"{os.fspath(path)} is not YAML: {reason}"]) from None


def _strict_loader() -> Any:
    """同じキーの繰り返しを拒否する(既定では、先のほうが黙って消える)。

    引用符のない値も文字列のまま読み、何を表すかは項目の型で決める。YAML 1.1 は 22:00 を 1320、no を
    false と読む。共通の項目をまとめる ``<<`` だけは、YAML のまま働く。
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node: Any = super().compose_mapping_node(anchor)
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := next((key for key, count in keys.items() if count > 1), None):
                problem = f"key {twice!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return node

    kinds = (None, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")))
    Loader.yaml_constructors = {kind: Loader.yaml_constructors[kind] for kind in kinds}
    Loader.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<$"))]}
    return Loader
