"""8.5.2 GenAI セマンティック規約の名前(データだけ)。

GenAI の規約は、本体の規約(1.42)から分かれて、別のリポジトリーになった。版が上がったら、ここだけを
その移行の案内(``docs/gen-ai/non-normative/migration.md``)と見比べて直す。
"""

from __future__ import annotations

SEMCONV_VERSION = "0.1.0"
"""semantic-conventions-genai の版。Development なので、今後も変わりうる。"""
SOURCE = "https://github.com/open-telemetry/semantic-conventions-genai"

GENAI_SEMANTIC_CONVENTIONS: dict[str, str] = {
    "gen_ai.operation.name": "操作の種類(chat, embeddings, execute_tool など)",
    "gen_ai.provider.name": "プロバイダー(旧名 gen_ai.system)",
    "gen_ai.request.model": "要求したモデル",
    "gen_ai.response.model": "実際に答えたモデル",
    "gen_ai.response.id": "応答の id",
    "gen_ai.response.finish_reasons": "終わった理由(配列)",
    "gen_ai.response.time_to_first_chunk": "ストリーミングで、最初の断片までの秒数",
    "gen_ai.request.temperature": "温度",
    "gen_ai.request.top_p": "Top-P",
    "gen_ai.request.top_k": "Top-K(整数)",
    "gen_ai.request.seed": "乱数の種",
    "gen_ai.request.max_tokens": "最大トークン数",
    "gen_ai.request.stop_sequences": "停止列(配列)",
    "gen_ai.usage.input_tokens": "入力トークン数(キャッシュ分を含む)",
    "gen_ai.usage.output_tokens": "出力トークン数(推論の分を含む)",
    "gen_ai.usage.cache_read.input_tokens": "キャッシュから読んだ入力トークン数",
    "gen_ai.usage.cache_write.input_tokens": "キャッシュに書いた入力トークン数",
    "gen_ai.usage.reasoning.output_tokens": "推論(思考)に使った出力トークン数",
    "gen_ai.conversation.id": "会話(セッション)の id",
    "gen_ai.prompt.name": "プロンプトの名前",
    "gen_ai.prompt.version": "プロンプトの版(文字列)",
    "gen_ai.agent.name": "エージェントの名前",
    "gen_ai.tool.name": "ツールの名前",
    "gen_ai.retrieval.top_k": "検索で取る件数(整数)",
    "gen_ai.output.type": "求めた出力の種類(text, json など)",
    "gen_ai.input.messages": "入力の本文(任意。個人情報に注意)",
    "gen_ai.output.messages": "出力の本文(任意。個人情報に注意)",
    "gen_ai.system_instructions": "システムプロンプト(任意)",
    "gen_ai.evaluation.name": "評価の名前(イベント gen_ai.evaluation.result)",
    "gen_ai.evaluation.score.value": "評価の点数",
    "gen_ai.evaluation.score.label": "評価の言葉(yes, pass など)",
    "gen_ai.evaluation.explanation": "評価の理由",
    "gen_ai.token.modality": "メトリクス gen_ai.client.inference.usage.* の text / image など",
    "error.type": "失敗したときの例外の型",
}
"""属性の名前と意味。"""

RENAMED: dict[str, str] = {
    "gen_ai.system": "gen_ai.provider.name",
    "gen_ai.prompt": "gen_ai.input.messages",
    "gen_ai.completion": "gen_ai.output.messages",
    "gen_ai.usage.prompt_tokens": "gen_ai.usage.input_tokens",
    "gen_ai.usage.completion_tokens": "gen_ai.usage.output_tokens",
    "gen_ai.usage.cache_creation.input_tokens": "gen_ai.usage.cache_write.input_tokens",
    "gen_ai.openai.request.seed": "gen_ai.request.seed",
    "gen_ai.openai.request.response_format": "gen_ai.output.type",
    "gen_ai.openai.request.service_tier": "openai.request.service_tier",
    "gen_ai.openai.response.service_tier": "openai.response.service_tier",
    "gen_ai.openai.response.system_fingerprint": "openai.response.system_fingerprint",
}
"""使われなくなった属性の名前と、いまの名前。"""

RENAMED_IN_RETRIEVAL = {"gen_ai.request.top_k": "gen_ai.retrieval.top_k"}
"""検索(``retrieval``)のスパンだけで変わった名前。"""

_INFERENCE = "gen_ai.client.inference"
_OPERATION = "gen_ai.client.operation"
DURATION = f"{_INFERENCE}.duration"
FIRST_CHUNK = f"{_INFERENCE}.time_to_first_chunk"
NEXT_CHUNK = f"{_INFERENCE}.time_per_output_chunk"
USAGE = {
    "input_tokens": f"{_INFERENCE}.usage.input_tokens",
    "output_tokens": f"{_INFERENCE}.usage.output_tokens",
    "cache_read.input_tokens": f"{_INFERENCE}.usage.cache_read.input_tokens",
    "cache_write.input_tokens": f"{_INFERENCE}.usage.cache_write.input_tokens",
    "reasoning.output_tokens": f"{_INFERENCE}.usage.reasoning.output_tokens",
}
"""属性 ``gen_ai.usage.*`` の名前の後半と、その累計のカウンター。"""
PER_CALL = {
    "input_tokens": f"{_INFERENCE}.operation.input_tokens",
    "output_tokens": f"{_INFERENCE}.operation.output_tokens",
}
"""呼び出し 1 回のトークン数のヒストグラム。"""
OLD_DURATION = f"{_OPERATION}.duration"
OLD_TOKENS = "gen_ai.client.token.usage"
"""1.41 の名前。推論のほかの操作(embeddings)は、0.1.0 でもこの名前のまま。"""
SECONDS = (DURATION, FIRST_CHUNK, NEXT_CHUNK, OLD_DURATION)
TOKENS = (*PER_CALL.values(), OLD_TOKENS)
"""秒とトークン数の、ヒストグラムの名前。"""

RENAMED_METRICS: dict[str, tuple[str, ...]] = {
    OLD_DURATION: (DURATION,),
    OLD_TOKENS: (*USAGE.values(), *PER_CALL.values()),
    f"{_OPERATION}.time_to_first_chunk": (FIRST_CHUNK,),
    f"{_OPERATION}.time_per_output_chunk": (NEXT_CHUNK,),
}
"""使われなくなったメトリクスの名前と、いまの名前。"""

REMOVED = {"gen_ai.token.type": "the metric's name tells input from output"}
"""なくなった属性と、その代わり。"""
