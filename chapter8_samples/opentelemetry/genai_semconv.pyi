"""8.5.2 GenAI セマンティック規約(v1.41.1)。"""

from collections.abc import Mapping
from typing import Any
SEMCONV_VERSION = '1.41.1'
GENAI_SEMANTIC_CONVENTIONS: dict[str, str] = {'gen_ai.operation.name': '操作の種類(chat, embeddings, execute_tool など)', 'gen_ai.provider.name': 'プロバイダー(旧名 gen_ai.system)', 'gen_ai.request.model': '要求したモデル', 'gen_ai.response.model': '実際に答えたモデル', 'gen_ai.response.id': '応答の id', 'gen_ai.response.finish_reasons': '終わった理由(配列)', 'gen_ai.request.temperature': '温度', 'gen_ai.request.top_p': 'Top-P', 'gen_ai.request.max_tokens': '最大トークン数', 'gen_ai.request.stop_sequences': '停止列(配列)', 'gen_ai.usage.input_tokens': '入力トークン数(キャッシュ分を含む)', 'gen_ai.usage.output_tokens': '出力トークン数', 'gen_ai.usage.cache_read.input_tokens': 'キャッシュから読んだ入力トークン数', 'gen_ai.usage.cache_creation.input_tokens': 'キャッシュに書いた入力トークン数', 'gen_ai.conversation.id': '会話(セッション)の id', 'gen_ai.agent.name': 'エージェントの名前', 'gen_ai.tool.name': 'ツールの名前', 'gen_ai.input.messages': '入力の本文(任意。個人情報に注意)', 'gen_ai.output.messages': '出力の本文(任意。個人情報に注意)', 'gen_ai.system_instructions': 'システムプロンプト(任意)', 'gen_ai.token.type': 'メトリクス gen_ai.client.token.usage の input / output', 'error.type': '失敗したときの例外の型'}
RENAMED = {'gen_ai.system': 'gen_ai.provider.name', 'gen_ai.usage.prompt_tokens': 'gen_ai.usage.input_tokens', 'gen_ai.usage.completion_tokens': 'gen_ai.usage.output_tokens', 'gen_ai.prompt': 'gen_ai.input.messages', 'gen_ai.completion': 'gen_ai.output.messages'}
INFERENCE = ('chat', 'generate_content', 'text_completion')

def print_semantic_conventions() -> None:
    """規約の属性と意味を一覧にして印字する。"""

def find_semconv_gaps(attributes: Mapping[str, Any]) -> list[str]:
    """1 スパンの属性を規約と比べ、直すところを英語で返す。なければ空。

    失敗したスパン(``error.type`` がある)には、トークン数を求めない。

    >>> find_semconv_gaps({"gen_ai.operation.name": "execute_tool"})
    ['missing gen_ai.tool.name']
    """

def main() -> None:
    """規約の一覧と、MLflow が訳したスパンの確認結果を示す。"""
