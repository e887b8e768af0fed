"""8.1.3 LLM ライブラリーの自動トレース(リスト8.4)。

使っているライブラリーの名前を渡すだけで、呼び出しごとの入力・出力・トークン数が記録される。
MLflow の連携は 20 以上あり、ライブラリーがないものを有効にすると import の誤りで止まる。
必要なものだけを、有効にできたかどうかを確かめながら有効にする。

Databricks でも ``mlflow-tracing`` だけの本番環境でも同じ(``mlflow.autolog()`` は要らない)。
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import mlflow

logger = logging.getLogger(__name__)

# 名前 -> (MLflow のモジュール, 必要なパッケージ)
AUTOLOG_PROVIDERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "openai": ("openai", "openai"),
        "anthropic": ("anthropic", "anthropic"),
        "gemini": ("gemini", "google.genai"),
        "bedrock": ("bedrock", "boto3"),
        "mistral": ("mistral", "mistralai"),
        "groq": ("groq", "groq"),
        "litellm": ("litellm", "litellm"),
        "langchain": ("langchain", "langchain_core"),
        "langgraph": ("langchain", "langgraph"),  # mlflow.langgraph はなく、LangChain が兼ねる
        "llama_index": ("llama_index", "llama_index"),
        "dspy": ("dspy", "dspy"),
        "crewai": ("crewai", "crewai"),
        "autogen": ("autogen", "autogen_agentchat"),
        "pydantic_ai": ("pydantic_ai", "pydantic_ai"),
        "smolagents": ("smolagents", "smolagents"),
        "strands": ("strands", "strands"),
        "agno": ("agno", "agno"),
        "haystack": ("haystack", "haystack"),
    }
)


def enable_autologging(providers: Sequence[str] | None = None) -> list[str]:
    """LLM ライブラリーの自動トレースを有効にし、有効になった名前を返す。

    Args:
        providers: ``AUTOLOG_PROVIDERS`` の名前。``None`` はインストール済みのものすべて。

    Raises:
        ValueError: 知らない名前(使える名前の一覧が付く)。
    """
    names = list(AUTOLOG_PROVIDERS if providers is None else providers)
    unknown = [name for name in names if name not in AUTOLOG_PROVIDERS]
    if unknown:
        raise ValueError(f"unknown providers {unknown}; choose from {sorted(AUTOLOG_PROVIDERS)}")
    return [name for name in names if _autolog(name, explicit=providers is not None)]


def _autolog(name: str, *, explicit: bool) -> bool:
    flavor, package = AUTOLOG_PROVIDERS[name]
    if not _installed(package):
        if explicit:
            logger.warning("autologging of %r skipped: package %r is not installed", name, package)
        return False
    try:
        getattr(mlflow, flavor).autolog()  # mlflow の属性は、使うときに import される
    except ImportError as error:  # mlflow-tracing にないものなど
        logger.warning("autologging of %r skipped: %s", name, error)
        return False
    return True


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # 親パッケージがない("google.genai" など)
        return False
