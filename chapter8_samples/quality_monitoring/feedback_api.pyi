"""8.3.3 画面からのフィードバックを受け取る HTTP エンドポイント(FastAPI)。"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from mlflow.entities import Assessment
Deliver = Callable[..., Assessment]
RETRY_AFTER = {'Retry-After': '30'}

@dataclass(kw_only=True)
class FeedbackBody:
    """画面が送る JSON。``type`` ごとに使う項目だけを入れる。"""
    trace_id: Any
    type: Literal['thumbs', 'rating', 'comment', 'issue', 'correction'] = 'thumbs'
    is_positive: Any = None
    rating: Any = None
    comment: str | None = None
    category: str | None = None
    issue_type: str | None = None
    description: str | None = None
    severity: str = 'medium'
    expected_response: str | None = None
    feedback_id: str | None = None
    '画面が付ける ID。同じ ID なら、通信のやり直しで何度届いても 1 件になる。'

def create_feedback_router(user_of: 'Callable[[Request], str]', *, outbox: 'FeedbackOutbox | None'=None, path: str='/feedback', timeout_seconds: float=3.0, max_pending: int=10000) -> 'APIRouter':
    """フィードバックを受け取る ``APIRouter`` を作る。

    応答は、200(記録した)、202(送信箱に残した。``outbox.replay()`` で送り直す)、
    422(入力が正しくない)、502(MLflow が内容を拒否した)、503(届かず、残す場所もない)。

    Args:
        user_of: リクエストから、評価した人の ID を求める関数。本文の ID は信用しない。
        outbox: 届かないときの送信箱。省くと 503 を返し、送り直しは画面に任せる。
        timeout_seconds: MLflow に届くまで待つ秒数。
        max_pending: 送信箱に残す上限(件)。超えたら 503 を返す。
    """

def main() -> None:
    """サンプルを実行する。"""
