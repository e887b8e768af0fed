"""8.4.4 同じルールを、Prometheus、Alertmanager、Databricks の形で書き出す。"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from .alert_rules import Rule
from .alert_config import AlertConfig
logger = logging.getLogger(__name__)
PREFIX = 'llm_app_'

def selector(metric: str, window: str) -> str:
    """指標の名前と窓を、Prometheus のセレクターにする。

    >>> selector("pass_rate:relevance", "1h")
    'llm_app_pass_rate{window="1h",assessment="relevance"}'
    """

def label_name(key: str) -> str:
    """Prometheus のラベルの名前にする(英数字と ``_`` だけ)。

    >>> label_name("team-name")
    'team_name'
    """

def expression(rule: Rule) -> str:
    """PromQL の条件式。信頼区間は式にできないので、件数の下限だけを移す。"""

def to_prometheus_rules(config: AlertConfig, *, interval: str='30s') -> dict[str, Any]:
    """Prometheus のルールファイル。

    Prometheus にない ``clear_threshold`` と ``confidence`` は、アノテーションに残して知らせる。
    """

def to_alertmanager_config(config: AlertConfig, urls: Mapping[str, str]) -> dict[str, Any]:
    """Alertmanager の設定。通知先は、署名の要らない Webhook の中継(``urls``)にする。

    知らせない時間帯(``mute``)は移さず、警告をログに残す。

    Args:
        urls: 通知先の名前 -> Webhook の URL。秘密の URL は Alertmanager の秘密として渡すこと。

    Raises:
        AlertConfigError: ``urls`` にない通知先がある。
    """

def to_databricks_alert(rule: Rule, *, query: str, warehouse_id: str, destination_ids: Sequence[str]=(), cron: str='0 */5 * * * ?', timezone: str='UTC') -> Any:
    """Databricks の SQL アラート(v2)。``WorkspaceClient().alerts_v2.create_alert(...)`` に渡す。

    Args:
        query: 列 ``value`` に指標の値を 1 行だけ返す SQL。
        destination_ids: 通知先の ID。

    Raises:
        AlertConfigError: 二つの窓を見る burn rate は、一つの SQL アラートにできない。
    """

def main() -> None:
    """標準のルールを Prometheus の形で書き出し、promtool があれば検査する。"""
