"""サンプルを手元だけで動かすための部品。

API キーも Databricks もない環境で、本物の MLflow・openai SDK・OTLP を動かす。
アプリにコピーするものは、ここにはない。各サンプルの ``main()`` だけが import する。
"""

from .environment import OFFLINE_DEFAULTS, bypass_proxy, go_offline
from .workbench import sample

__all__ = ["OFFLINE_DEFAULTS", "bypass_proxy", "go_offline", "sample"]
