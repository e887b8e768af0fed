"""8.5.2 スパンの属性を、GenAI セマンティック規約と比べる。

属性の名前が規約どおりなら、どのバックエンドでも同じ画面と集計が使える。MLflow は送るときに
この名前へ訳せる。訳した後に足りないものを ``find_semconv_gaps`` で確かめる。

Databricks のトレース画面は MLflow の属性を使うので、訳は OTLP 側だけで起きる。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .conventions import (
    GENAI_SEMANTIC_CONVENTIONS,
    REMOVED,
    RENAMED,
    RENAMED_IN_RETRIEVAL,
    RENAMED_METRICS,
    SEMCONV_VERSION,
)

INFERENCE = ("chat", "generate_content", "text_completion")
_MODEL = ("gen_ai.provider.name", "gen_ai.request.model", "gen_ai.usage.input_tokens")
_NEEDED = {
    **dict.fromkeys(INFERENCE, (*_MODEL, "gen_ai.usage.output_tokens")),
    "embeddings": _MODEL,
    "execute_tool": ("gen_ai.tool.name",),
    "invoke_agent": ("gen_ai.agent.name",),
}
_TYPES: dict[str, type] = {
    **{name: int for name in GENAI_SEMANTIC_CONVENTIONS if name.endswith(("_tokens", "top_k"))},
    "gen_ai.prompt.name": str,
    "gen_ai.prompt.version": str,
}


def print_semantic_conventions() -> None:
    """規約の属性と意味を一覧にして印字する。"""
    print(f"規約 {SEMCONV_VERSION}: {len(GENAI_SEMANTIC_CONVENTIONS)} 属性")
    for name, meaning in GENAI_SEMANTIC_CONVENTIONS.items():
        print(f"  {name:42} {meaning}")


def find_semconv_gaps(attributes: Mapping[str, Any]) -> list[str]:
    """1 スパンの属性を規約と比べ、直すところを英語で返す。なければ空。

    古い名前には、新しい名前を挙げる(メトリクスの名前でも)。失敗したスパン(``error.type`` がある)
    には、トークン数を求めない。

    >>> find_semconv_gaps({"gen_ai.operation.name": "execute_tool"})
    ['missing gen_ai.tool.name']
    >>> find_semconv_gaps({"gen_ai.operation.name": "chat", "error.type": "TimeoutError",
    ...     "gen_ai.system": "openai", "gen_ai.request.model": "gpt-4o"})
    ['rename gen_ai.system to gen_ai.provider.name']
    """
    renamed = _renamed(attributes)
    missing = [name for name in _empty(attributes) if name not in renamed.values()]
    return [
        *(f"missing {name}" for name in missing),
        *(f"rename {old} to {new}" for old, new in renamed.items()),
        *(f"remove {name}: {why}" for name, why in REMOVED.items() if name in attributes),
        *_wrong_types(attributes),
    ]


def _renamed(attributes: Mapping[str, Any]) -> dict[str, str]:
    operation = attributes.get("gen_ai.operation.name")
    table = dict(RENAMED)
    if operation == "retrieval":
        table |= RENAMED_IN_RETRIEVAL
    if operation is None or operation in INFERENCE:
        table |= {old: " and ".join(new) for old, new in RENAMED_METRICS.items()}
    return {old: new for old, new in table.items() if old in attributes}


def _empty(attributes: Mapping[str, Any]) -> list[str]:
    needed = _NEEDED.get(str(attributes.get("gen_ai.operation.name")), ())
    if "error.type" in attributes:
        needed = tuple(name for name in needed if ".usage." not in name)
    names = ("gen_ai.operation.name", *needed)
    return [name for name in names if attributes.get(name) in (None, "")]


def _wrong_types(attributes: Mapping[str, Any]) -> Iterator[str]:
    for name, expected in _TYPES.items():
        value = attributes.get(name, expected())
        if not isinstance(value, expected) or isinstance(value, bool):
            yield f"{name} is {type(value).__name__}, not {expected.__name__}"
