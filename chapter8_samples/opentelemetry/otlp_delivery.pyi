"""8.5.3 OTLP が届いたことの確認。"""

from collections.abc import Mapping
from dataclasses import dataclass
from .otlp_config import OtlpConfig

@dataclass(frozen=True)
class DeliveryCounts:
    """数え始めてから OTLP へ渡したスパンの数。"""
    accepted: int = 0
    '送信待ちに入れた数。'
    delivered: int = 0
    '送信先が受け取ったと答えた数。'
    lost: int = 0
    '再送してもだめで捨てた数。'

    @property
    def pending(self) -> int:
        """まだ結果の出ていない数(キューがあふれて捨てた分も含む)。"""

@dataclass(frozen=True)
class FlushReport:
    """``flush_all`` の結果。数は ``setup_otlp_export`` からの累計。"""
    mlflow_seconds: float | None
    'MLflow への書き出しにかかった秒数。期限までに終わらなければ None。'
    otlp_seconds: float | None
    'OTLP への書き出しにかかった秒数。期限までに終わらなければ None。'
    accepted: int
    delivered: int
    lost: int
    '捨てた数。書き出しが終わったのに結果がないもの(キューあふれ)も含む。'

    @property
    def timed_out(self) -> bool:
        """どちらかが期限に間に合わなかった。"""

    @property
    def complete(self) -> bool:
        """期限内に終わり、OTLP に渡したスパンが全部届いた(呼んだ後に増えた分があれば False)。"""

def delivery_counts() -> DeliveryCounts:
    """いまの累計。"""

def watch_delivery() -> None:
    """OTLP へ渡したスパンとその結果を、0 から数え始める。``setup_otlp_export`` が呼ぶ。"""

def flush_all(timeout_seconds: float=10.0) -> FlushReport:
    """MLflow と OTLP の両方を書き出す。``timeout_seconds`` 秒で必ず戻る。

    ``mlflow.flush_trace_async_logging()`` は OTLP を書き出さない。プロセスを終える前
    (``os._exit`` やシグナルのハンドラーの中)では、代わりにこれを呼ぶ。
    """

@dataclass(frozen=True)
class ConnectionCheck:
    """``check_otlp_connection`` の結果。"""
    ok: bool
    '送信先がスパンを 1 つ受け取った。'
    reason: str
    '``ok`` ``refused`` ``dns`` ``tls`` ``unauthorized`` ``not_found`` ``timeout``\n    ``busy`` ``wrong_protocol`` ``rejected`` ``invalid`` (設定の誤り)のどれか。'
    detail: str
    '送信先の答えと、直すところ(英語)。'
    seconds: float

def check_otlp_connection(endpoint: str | OtlpConfig, protocol: str='grpc', *, headers: Mapping[str, str] | None=None, timeout_seconds: float=2.0, certificate_file: str | None=None) -> ConnectionCheck:
    """スパンを 1 つ実際に送り、受け取られたかを答える。送信先に 1 スパン残る。

    Args:
        endpoint: HTTP では ``/v1/traces`` まで書く(足したり消したりしない)。``OtlpConfig`` を
            1 つ渡してもよい(``check_config`` と同じ)。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        headers: 認証などのヘッダー。
        timeout_seconds: 答えを待つ秒数。
        certificate_file: プライベート CA の証明書。HTTP では、エクスポーターと同じく、環境変数
            ``REQUESTS_CA_BUNDLE`` ``CURL_CA_BUNDLE`` があればそちらが使われる。
    """

def check_config(config: OtlpConfig, timeout_seconds: float=10.0) -> ConnectionCheck:
    """``OtlpConfig`` (``build_otlp_config`` や ``preset`` の結果)の送り先を確かめる。"""

def main() -> None:
    """正しい設定と誤った設定の答えを見る。"""
