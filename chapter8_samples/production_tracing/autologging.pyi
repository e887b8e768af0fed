"""8.1.3 LLM ライブラリーの自動トレース(リスト8.4)。"""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
logger = logging.getLogger(__name__)
AUTOLOG_PROVIDERS: Mapping[str, tuple[str, str]] = MappingProxyType({'openai': ('openai', 'openai'), 'anthropic': ('anthropic', 'anthropic'), 'gemini': ('gemini', 'google.genai'), 'bedrock': ('bedrock', 'boto3'), 'mistral': ('mistral', 'mistralai'), 'groq': ('groq', 'groq'), 'litellm': ('litellm', 'litellm'), 'langchain': ('langchain', 'langchain_core'), 'langgraph': ('langchain', 'langgraph'), 'llama_index': ('llama_index', 'llama_index'), 'dspy': ('dspy', 'dspy'), 'crewai': ('crewai', 'crewai'), 'autogen': ('autogen', 'autogen_agentchat'), 'pydantic_ai': ('pydantic_ai', 'pydantic_ai'), 'smolagents': ('smolagents', 'smolagents'), 'strands': ('strands', 'strands'), 'agno': ('agno', 'agno'), 'haystack': ('haystack', 'haystack')})

def enable_autologging(providers: Sequence[str] | None=None) -> list[str]:
    """LLM ライブラリーの自動トレースを有効にし、有効になった名前を返す。

    Args:
        providers: ``AUTOLOG_PROVIDERS`` の名前。``None`` はインストール済みのものすべて。

    Raises:
        ValueError: 知らない名前(使える名前の一覧が付く)。
    """

def main() -> None:
    """OpenAI の自動トレースを有効にして 1 回呼び、記録されたスパンを見る。"""
