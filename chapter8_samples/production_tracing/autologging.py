"""8.1.3 LLM ライブラリーの自動トレース(リスト8.4)。

使っているライブラリーの名前を渡すだけで、呼び出しごとの入力・出力・トークン数が記録される。
MLflow の ``autolog()`` は、ライブラリーがないと、誤りで止まるか黙って何もしない。ここでは警告する。

Databricks でも ``mlflow-tracing`` だけの本番環境でも同じ(``mlflow.autolog()`` は要らない)。
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

import mlflow

logger = logging.getLogger(__name__)

AUTOLOG_PROVIDERS = (
    *("openai", "anthropic", "gemini", "bedrock", "mistral", "groq", "litellm", "langchain"),
    *("langgraph", "llama_index", "dspy", "crewai", "autogen", "pydantic_ai", "smolagents"),
    *("strands", "agno", "haystack"),
)
_PACKAGES = {
    "gemini": "google.genai",
    "bedrock": "boto3",
    "mistral": "mistralai",
    "langchain": "langchain_core",
    "autogen": "autogen_agentchat",
}


def enable_autologging(providers: Sequence[str] | None = None) -> list[str]:
    """LLM ライブラリーの自動トレースを有効にし、有効になった名前を返す。

    Args:
        providers: ``AUTOLOG_PROVIDERS`` の名前。``None`` はインストール済みのものすべて。
    """
    names = list(AUTOLOG_PROVIDERS if providers is None else providers)
    unknown = [name for name in names if name not in AUTOLOG_PROVIDERS]
    if unknown:
        raise ValueError(f"unknown providers {unknown}; choose from {sorted(AUTOLOG_PROVIDERS)}")
    level = logging.INFO if providers is None else logging.WARNING
    enabled: list[str] = []
    for name in names:
        package = _PACKAGES.get(name, name)
        flavor = "langchain" if name == "langgraph" else name  # LangChain が兼ねる
        try:
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"package {package!r} is not installed")
            getattr(mlflow, flavor).autolog()
            enabled.append(name)
        except ImportError as error:
            logger.log(level, "autologging of %r skipped: %s", name, error)
    return enabled
