"""8.5.3 OTLP の設定値と環境変数(リスト8.14, 表8.16)。"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict
from typing_extensions import Unpack
logger = logging.getLogger(__name__)
Protocol = Literal['grpc', 'http/protobuf']
Mode = Literal['dual', 'otlp_only']
Compression = Literal['gzip', 'none']
PROTOCOLS, TRACES_PATH = (('grpc', 'http/protobuf'), '/v1/traces')
OWNED_ENV = ('MLFLOW_ENABLE_DUAL_EXPORT', 'MLFLOW_ENABLE_OTEL_GENAI_SEMCONV', 'MLFLOW_ENABLE_OTLP_EXPORTER', 'MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT', 'OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE', 'OTEL_EXPORTER_OTLP_TRACES_COMPRESSION', 'OTEL_EXPORTER_OTLP_TRACES_ENDPOINT', 'OTEL_EXPORTER_OTLP_TRACES_HEADERS', 'OTEL_EXPORTER_OTLP_TRACES_INSECURE', 'OTEL_EXPORTER_OTLP_TRACES_PROTOCOL', 'OTEL_EXPORTER_OTLP_TRACES_TIMEOUT', 'OTEL_RESOURCE_ATTRIBUTES', 'OTEL_SERVICE_NAME')

class OtlpError(Exception):
    """8.5 の例外の親。"""

class OtlpConfigError(OtlpError, ValueError):
    """設定値の誤り。文面に、誤った値と直し方がある。"""

class OtlpSetupError(OtlpError, RuntimeError):
    """設定値は正しいが、この環境では OTLP の送信を始められない。"""

@dataclass(frozen=True, kw_only=True)
class OtlpConfig:
    """検査済みの OTLP 設定。誤った値では作れない(``dataclasses.replace`` でも同じ)。"""
    endpoint: str
    'トレースの送り先。HTTP なら ``/v1/traces`` まで、gRPC ならパスなし。'
    service_name: str
    protocol: Protocol = 'grpc'
    mode: Mode = 'dual'
    '``dual`` は MLflow と OTLP の両方、``otlp_only`` は OTLP だけに送る。'
    service_version: str | None = None
    deployment_environment: str | None = None
    service_namespace: str | None = 'llm-apps'
    resource_attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    '認証などのヘッダー。値は ``repr`` にもログにも出さない。'
    compression: Compression = 'gzip'
    timeout_seconds: float = 10.0
    '1 回の送信を、再送も含めてあきらめるまでの秒数。'
    certificate_file: str | None = None
    genai_semconv: bool = True
    'GenAI セマンティック規約の属性名に訳して送る(MLflow 側の記録は変わらない)。'

    def __post_init__(self) -> None:
        ...

    def resource(self) -> dict[str, str]:
        """リソース属性。``service.name`` は含まない。"""

    def to_env(self, inherited: str='') -> dict[str, str]:
        """設定する環境変数。

        Args:
            inherited: 基盤が付けた ``OTEL_RESOURCE_ATTRIBUTES``。残して、この設定を重ねる。

        ``OTEL_EXPORTER_OTLP_ENDPOINT`` は使わない。MLflow がそこへメトリクスも送り始め、
        そのラベルにユーザーやセッションの ID が入って、系列が際限なく増えるため。
        """

class OtlpTransportOptions(TypedDict, total=False):
    """``OtlpOptions`` のうち、サービスの版と環境名のほかの項目。"""
    mode: Mode
    service_namespace: str | None
    resource_attributes: Mapping[str, str]
    headers: Mapping[str, str]
    compression: Compression
    timeout_seconds: float
    certificate_file: str | None
    genai_semconv: bool

class OtlpOptions(OtlpTransportOptions, total=False):
    """``build_otlp_config`` に名前で渡せる項目。意味は ``OtlpConfig`` と同じ。"""
    service_version: str | None
    deployment_environment: str | None

@dataclass(frozen=True)
class OtlpStatus:
    """いまの OTLP 送信の状態。鍵やヘッダーは含まない。"""
    mode: str
    '``dual`` ``otlp_only`` ``off`` のどれか。'
    endpoint: str | None = None
    protocol: str | None = None
    service_name: str | None = None
    processors: tuple[str, ...] = ()
    'MLflow のプロバイダーに付いているプロセッサーのクラス名(包まれたものも含む)。'
    genai_semconv: bool = False
    warnings: tuple[str, ...] = ()
    '放っておくとトレースやメトリクスが狂うこと。なければ空。'

def parse_resource_attributes(text: str) -> dict[str, str]:
    """``OTEL_RESOURCE_ATTRIBUTES`` を読む。

    壊れた項目だけを飛ばす(MLflow は 1 つでも壊れていると、全部を捨てる)。

    >>> parse_resource_attributes("team=search,broken,")
    {'team': 'search'}
    """

def write_env(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """環境変数を書き、None のものは消す。戻すための元の値を返す。"""

def build_otlp_config(endpoint: str, service_name: str, protocol: str='grpc', **options: Unpack[OtlpOptions]) -> OtlpConfig:
    """値を検査して ``OtlpConfig`` を作る。

    Args:
        endpoint: ``http://HOST:4317`` (gRPC) や ``http://HOST:4318`` (HTTP)。HTTP では
            ``/v1/traces`` がなければ足し、gRPC ではパスを取り除く。
        service_name: バックエンドで見えるサービス名。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        **options: ``OtlpConfig`` の残りの項目。

    Raises:
        OtlpConfigError: 値が誤っている。
    """

def add_export_attributes() -> None:
    """OTLP に渡すスパンを、属性を足した写しに替える(プロセス全体で 1 回だけ)。

    opentelemetry-sdk 1.43 以降は終わったスパンの属性を書き換えられない。MLflow 3.17 は
    OTLP だけの送信でルートにタグを書こうとして失敗し、ルートスパンが黙って消える。
    """

def main() -> None:
    """設定 1 つを環境変数に直した結果と、誤りの知らせ方を示す。"""
