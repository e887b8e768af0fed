"""8.3.4 サーバーに採点させるための、ジャッジの接続先(AI Gateway エンドポイント)を作る。"""

class JudgeEndpointError(Exception):
    """ジャッジの接続先を作れない。"""

def ensure_judge_endpoint(name: str='judge', *, api_key: str, model: str='gpt-4.1-mini', provider: str='openai', api_base: str | None=None) -> str:
    """ジャッジの接続先がなければ作り、モデルの URI(``gateway:/judge`` の形)を返す。

    同じ名前の接続先があれば、そのまま使う(モデルやキーは変えない)。

    Args:
        name: 接続先の名前。
        api_key: プロバイダーの API キー。サーバーに送って保存する。
        model: ジャッジに使うモデル。
        api_base: 互換サーバーの URL。省略するとプロバイダーの公式の URL。

    Raises:
        JudgeEndpointError: 接続先が MLflow サーバーでない、サーバーが断った、など。
    """

def judge_endpoint_exists(name: str='judge') -> bool:
    """接続先の MLflow サーバーに、その名前のジャッジの接続先があるか。"""

def main() -> None:
    """サンプルを実行する。"""
