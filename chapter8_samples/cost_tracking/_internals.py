"""MLflow の公開されていない名前(3.17.2 で確かめた)。使う理由と一緒に、ここだけに置く。"""

from __future__ import annotations

# set_tracking_uri は、ここの reset() でスパンの処理の登録を消す。消された直後に付け直すのに要る
from mlflow.tracking._tracking_service import utils as tracking_service

__all__ = ["tracking_service"]
