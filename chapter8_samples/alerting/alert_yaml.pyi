"""8.4.1 アラートの設定ファイル(YAML)を読み、誤りをすべてまとめて報告する。"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from .alert_config import AlertConfig
Convert = Callable[[Any], Any]
Schema = Mapping[str, Convert]
SECRET_LIKE = re.compile('https?://\\S*|\\S*sig=\\S*|\\b(?=\\w*\\d)[0-9a-z]{32}\\b|\\bwhsec_\\S*|\\bxox[bp]-\\S*', re.IGNORECASE)

def _text(value: Any) -> str:
    ...

def _number(value: Any) -> float:
    ...

def _whole(value: Any) -> int:
    ...

def _flag(value: Any) -> bool:
    ...

def _duration(value: Any) -> str:
    ...

def _labels(value: Any) -> dict[str, str]:
    ...

def _names(value: Any) -> tuple[str, ...]:
    ...

def _some_names(value: Any) -> tuple[str, ...]:
    ...

def _one_of(*choices: str) -> Convert:
    ...

def _metric(value: Any, rate_for: str='') -> str:
    ...

def _rate(value: Any) -> str:
    ...

def _clock_time(value: Any) -> str:
    ...

def _days(value: Any) -> tuple[str, ...]:
    ...

def _zone(value: Any) -> str:
    ...

def _variable(value: Any) -> str:
    ...
SEVERITY = _one_of('info', 'warning', 'error', 'critical')
COMMON: Schema = {'name': _text, 'metric': _metric, 'for': _duration, 'keep_firing_for': _duration, 'min_samples': _whole, 'no_data': _one_of('ok', 'keep', 'alert'), 'severity': SEVERITY, 'labels': _labels, 'summary': _text, 'runbook_url': _text, 'action': _one_of('rollback')}
RULE: Schema = {**COMMON, 'window': _duration, 'op': _one_of('>', '<'), 'threshold': _number, 'clear_threshold': _number, 'confidence': _number}
BURN_RATE: Schema = {**COMMON, 'metric': _rate, 'objective': _number, 'factor': _number, 'long': _duration, 'short': _duration}
INHIBIT: Schema = {'when': _labels, 'mute': _labels, 'equal': _names}
MUTE: Schema = {**dict.fromkeys(('start', 'end'), _clock_time), **{'match': _labels, 'days': _days, 'timezone': _zone}}
ROUTE: Schema = {'match': _labels, 'to': _names, 'repeat': _duration}
RECEIVER_COMMON: Schema = {'send_resolved': _flag, 'min_severity': SEVERITY}
RECEIVERS: Mapping[str, tuple[Schema, tuple[str, ...]]] = {'slack': ({'url_env': _variable}, ('url_env',)), 'pagerduty': ({'routing_key_env': _variable, 'region': _one_of('us', 'eu'), 'source': _text}, ('routing_key_env',)), 'teams': ({'url_env': _variable}, ('url_env',)), 'webhook': ({'url_env': _variable, 'secret_env': _variable}, ('url_env', 'secret_env')), 'email': ({**dict.fromkeys(('host', 'sender'), _text), **dict.fromkeys(('user_env', 'password_env'), _variable), 'port': _whole, 'to': _some_names}, ('host', 'sender', 'to')), 'alertmanager': ({'url_env': _variable}, ('url_env',)), 'console': ({}, ())}
TOP: Schema = {'version': _whole, 'experiment': _text, 'offset': _duration, 'repeat': _duration, 'evaluation_failure_for': _duration, 'labels': _labels}
LISTS = ('rules', 'burn_rates', 'inhibit', 'mute', 'routes')

def config_from_mapping(data: Any) -> AlertConfig:
    """辞書から ``AlertConfig`` を作る。

    Raises:
        AlertConfigError: 誤りのすべて(``rules[2].for: '5 min' is not a duration`` のような形)。
    """

def delivery_problems(config: AlertConfig) -> list[str]:
    """Python で書いた設定の、通知先と経路の誤り。"""

def read_yaml(path: str | os.PathLike[str]) -> Any:
    """YAML ファイルを読む。

    Raises:
        AlertConfigError: ファイルがない、または YAML として読めない。
    """

def main() -> None:
    """誤りだらけの設定を読む。"""
