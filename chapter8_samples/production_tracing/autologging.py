"""8.1.3 LLM ライブラリーの自動トレース(リスト8.4)。

使っているライブラリーの名前を渡すだけで、呼び出しごとの入力・出力・トークン数が記録される。
MLflow の ``autolog()`` は、ライブラリーがないと、誤りで止まるか黙って何もしない。ここでは警告する。

Databricks でも ``mlflow-tracing`` だけの本番環境でも同じ(``mlflow.autolog()`` は要らない)。
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence

import mlflow

logger = logging.getLogger(__name__)

# 名前 -> (MLflow のモジュール, 必要なパッケージ)
AUTOLOG_PROVIDERS: Mapping[str, tuple[str, str]] = {
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
    usable = [name for name in names if _is_installed(AUTOLOG_PROVIDERS[name][1])]
    if providers is not None and usable != names:
        missing = {name: AUTOLOG_PROVIDERS[name][1] for name in names if name not in usable}
        logger.warning("autologging skipped, packages are not installed: %s", missing)
    return [name for name in usable if _autolog(name)]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # 親パッケージがない("google.genai" など)
        return False


def _autolog(name: str) -> bool:
    try:
        getattr(mlflow, AUTOLOG_PROVIDERS[name][0]).autolog()
    except ImportError as error:  # mlflow-tracing にないものなど
        logger.warning("autologging of %r skipped: %s", name, error)
        return False
    return True
