"""8.5.2 GenAI セマンティック規約(v1.41.1)。

属性の名前が規約どおりなら、どのバックエンドでも同じ画面と集計が使える。MLflow は送るときに
この名前へ訳せる。訳した後に足りないものを ``find_semconv_gaps`` で確かめる。

Databricks のトレース画面は MLflow の属性を使うので、訳は OTLP 側だけで起きる。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SEMCONV_VERSION = "1.41.1"
"""対応する規約の版。GenAI の部分は Development で、今後も変わりうる。"""

GENAI_SEMANTIC_CONVENTIONS: dict[str, str] = {
    "gen_ai.operation.name": "操作の種類(chat, embeddings, execute_tool など)",
    "gen_ai.provider.name": "プロバイダー(旧名 gen_ai.system)",
    "gen_ai.request.model": "要求したモデル",
    "gen_ai.response.model": "実際に答えたモデル",
    "gen_ai.response.id": "応答の id",
    "gen_ai.response.finish_reasons": "終わった理由(配列)",
    "gen_ai.request.temperature": "温度",
    "gen_ai.request.top_p": "Top-P",
    "gen_ai.request.max_tokens": "最大トークン数",
    "gen_ai.request.stop_sequences": "停止列(配列)",
    "gen_ai.usage.input_tokens": "入力トークン数(キャッシュ分を含む)",
    "gen_ai.usage.output_tokens": "出力トークン数",
    "gen_ai.usage.cache_read.input_tokens": "キャッシュから読んだ入力トークン数",
    "gen_ai.usage.cache_creation.input_tokens": "キャッシュに書いた入力トークン数",
    "gen_ai.conversation.id": "会話(セッション)の id",
    "gen_ai.agent.name": "エージェントの名前",
    "gen_ai.tool.name": "ツールの名前",
    "gen_ai.input.messages": "入力の本文(任意。個人情報に注意)",
    "gen_ai.output.messages": "出力の本文(任意。個人情報に注意)",
    "gen_ai.system_instructions": "システムプロンプト(任意)",
    "gen_ai.token.type": "メトリクス gen_ai.client.token.usage の input / output",
    "error.type": "失敗したときの例外の型",
}

RENAMED = {
    "gen_ai.system": "gen_ai.provider.name",
    "gen_ai.usage.prompt_tokens": "gen_ai.usage.input_tokens",
    "gen_ai.usage.completion_tokens": "gen_ai.usage.output_tokens",
    "gen_ai.prompt": "gen_ai.input.messages",
    "gen_ai.completion": "gen_ai.output.messages",
}
"""使われなくなった名前と、いまの名前。"""

INFERENCE = ("chat", "generate_content", "text_completion")
_NEEDED = {
    **dict.fromkeys(
        INFERENCE,
        (
            "gen_ai.provider.name",
            "gen_ai.request.model",
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.output_tokens",
        ),
    ),
    "embeddings": ("gen_ai.provider.name", "gen_ai.request.model", "gen_ai.usage.input_tokens"),
    "execute_tool": ("gen_ai.tool.name",),
    "invoke_agent": ("gen_ai.agent.name",),
}
_INTEGERS = tuple(name for name in GENAI_SEMANTIC_CONVENTIONS if name.endswith("_tokens"))


def print_semantic_conventions() -> None:
    """規約の属性と意味を一覧にして印字する。"""
    print(f"規約 {SEMCONV_VERSION}: {len(GENAI_SEMANTIC_CONVENTIONS)} 属性")
    for name, meaning in GENAI_SEMANTIC_CONVENTIONS.items():
        print(f"  {name:42} {meaning}")


def find_semconv_gaps(attributes: Mapping[str, Any]) -> list[str]:
    """1 スパンの属性を規約と比べ、直すところを英語で返す。なければ空。

    失敗したスパン(``error.type`` がある)には、トークン数を求めない。

    >>> find_semconv_gaps({"gen_ai.operation.name": "execute_tool"})
    ['missing gen_ai.tool.name']
    """
    operation, failed = str(attributes.get("gen_ai.operation.name")), "error.type" in attributes
    needed = ("gen_ai.operation.name", *_NEEDED.get(operation, ()))
    needed = tuple(name for name in needed if not (failed and ".usage." in name))
    renamed = {old: new for old, new in RENAMED.items() if old in attributes}
    empty = {name for name in needed if attributes.get(name) in (None, "")}
    missing = [name for name in needed if name in empty and name not in renamed.values()]
    return [
        *(f"missing {name}" for name in missing),
        *(f"rename {old} to {new}" for old, new in renamed.items()),
        *_wrong_types(attributes),
    ]


def _wrong_types(attributes: Mapping[str, Any]) -> Iterator[str]:
    for name in _INTEGERS:
        value = attributes.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool):
            yield f"{name} is {type(value).__name__}, not int"
