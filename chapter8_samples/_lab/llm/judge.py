"""スタブ LLM の採点。ジャッジのプロンプトを読み、`rules` の規則で判定し、頼まれた形で返す。

MLflow の組み込みジャッジは `<question>` などのタグで、make_judge は「inputs: …」「outputs: …」で
材料を渡してくる。どちらも読み取って同じ規則に掛ける。
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from . import rules
from .rules import Case, Verdict
from .schema import fill
from .text import message_text, system_text

__all__ = ["is_judge", "judge", "verdict"]

_DEFAULT_SCHEMA = {
    "type": "object",
    "properties": {"result": {"type": "string"}, "rationale": {"type": "string"}},
}
_TAG = re.compile(r"<(\w+)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
_FIELD = re.compile(
    r"^(inputs|outputs|expectations|conversation|context|retrieved_context):\s*"
    r"(.*?)(?=^(?:inputs|outputs|expectations|conversation|context|retrieved_context):|\Z)",
    re.DOTALL | re.MULTILINE,
)
# make_judge が {{ trace }} のときに渡す道具のうち、入力と出力を読むもの
_ROOT_SPAN_TOOL = "get_root_span"
_QUESTION_KEYS = ("question", "query", "message", "request", "prompt", "content", "text")
_ANSWER_KEYS = ("answer", "response", "output", "result", "content", "text", "message")
_DOCUMENT_KEYS = ("documents", "document", "context", "retrieved_context", "references")
_EXPECTED_KEYS = ("expected_response", "expected_facts", "expected_answer", "guidelines")


def is_judge(body: Mapping[str, Any]) -> bool:
    """採点のリクエストか(`response_format` に JSON を求めているか)。"""
    return _response_format(body).get("type") in ("json_schema", "json_object")


def verdict(body: Mapping[str, Any]) -> str:
    """採点の答え。`response_format` の JSON Schema に合う JSON の文字列。"""
    wrapped: Any = _response_format(body).get("json_schema") or {}
    schema: Any = wrapped.get("schema") or _DEFAULT_SCHEMA
    messages: list[Mapping[str, Any]] = body["messages"]
    value = fill(schema, judge(messages), _instructions(system_text(messages)))
    return json.dumps(value, ensure_ascii=False)


def tool_calls(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """道具(tools)を渡された採点で、まだ使っていなければ、最初に呼ぶもの。なければ空。"""
    tools: list[Any] = body.get("tools") or []
    used = any(m.get("role") == "tool" for m in body["messages"])
    if used or not any(tool["function"]["name"] == _ROOT_SPAN_TOOL for tool in tools):
        return []
    function = {"name": _ROOT_SPAN_TOOL, "arguments": "{}"}
    return [{"id": "call_root_span", "type": "function", "function": function}]


def judge(messages: list[Mapping[str, Any]]) -> Verdict:
    """プロンプトを読み、合う規則で判定する。"""
    prompt = "\n".join(message_text(m) for m in messages if m.get("role") != "system")
    stated = {name: text.strip() for name, text in _FIELD.findall(prompt)}
    fields = _traced_fields(messages) or stated
    if fields:
        return _judge_fields(fields, system_text(messages))
    tags = _tags("\n".join(message_text(m) for m in messages))
    return _judge_tags(tags) if tags else _judge_text(prompt, system_text(messages))


def _judge_tags(tags: dict[str, list[str]]) -> Verdict:
    """MLflow の組み込みジャッジ。どのタグがあるかで、何を聞かれているかが分かる。"""
    first = {name: texts[0] for name, texts in tags.items()}
    question = _main_text(_parsed(first.get("question", first.get("request", ""))), _QUESTION_KEYS)
    answer = first.get("answer", first.get("response", first.get("actual_output", "")))
    case = Case(
        question=question,
        answer=_main_text(_parsed(answer), _ANSWER_KEYS),
        document=_all_text(_parsed(first.get("document", ""))),
        expected=first.get("expected_output", first.get("claim", "")),
    )
    if "guideline" in tags:
        return rules.follows(case, tags["guideline"])
    if "expected_output" in tags:
        return rules.equivalent(case)
    if "text" in tags:
        return rules.safe(Case(answer=_all_text(_parsed(first["text"]))))
    if "document" in tags and "answer" in tags:
        return rules.grounded(case)
    if "document" in tags and "claim" in tags:
        return rules.supported(Case(expected=case.expected, answer=_without_question(first)))
    return rules.relevant(case)


def _judge_fields(fields: dict[str, str], criteria: str) -> Verdict:
    """make_judge。基準の文にある語で規則を選ぶ。"""
    parsed = {name: _parsed(text) for name, text in fields.items()}
    turns = _turns(parsed.get("conversation"))
    inputs, outputs = parsed.get("inputs"), parsed.get("outputs")
    answer = _main_text(outputs, _ANSWER_KEYS)
    case = Case(
        question=_main_text(inputs, _QUESTION_KEYS),
        answer=answer or "\n".join(text for role, text in turns if role != "user"),
        document="\n".join(_picked(v, _DOCUMENT_KEYS) for v in (inputs, outputs, parsed)),
        expected=_picked(parsed.get("expectations"), _EXPECTED_KEYS),
        user_turns=tuple(text for role, text in turns if role == "user"),
        criteria=_instructions(criteria),
    )
    default = rules.calm if turns else rules.relevant
    rule = rules.rule_for(case.criteria) or default
    return rule(case)


def _traced_fields(messages: list[Mapping[str, Any]]) -> dict[str, str]:
    """道具が返したルートスパンの入力と出力。"""
    for message in messages:
        if message.get("role") == "tool":
            span = _entry(_parsed(message_text(message)), "content")
            attributes = _entry(_parsed(str(span)), "attributes")
            return {
                "inputs": str(_entry(attributes, "mlflow.spanInputs")),
                "outputs": str(_entry(attributes, "mlflow.spanOutputs")),
            }
    return {}


def _entry(value: Any, key: str) -> Any:
    return cast(dict[str, Any], value).get(key, "") if isinstance(value, dict) else ""


def _judge_text(prompt: str, criteria: str) -> Verdict:
    """決まった形のない採点。本文をそのまま回答とみなす。"""
    rule = rules.rule_for(criteria) or rules.safe
    return rule(Case(answer=prompt, criteria=criteria))


def _response_format(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], body.get("response_format") or {})


def _instructions(system: str) -> str:
    """make_judge の定型文を除いた、利用者の書いた基準。"""
    text = system.split("Your task:", 1)[-1].split("Instructions\n", 1)[-1]
    return text.split("You *must* format", 1)[0]


def _tags(prompt: str) -> dict[str, list[str]]:
    """タグの中身。入れ子(`<claim>` の中の `<answer>`)は内側も取り出す。"""
    found: dict[str, list[str]] = {}
    for name, text in _TAG.findall(prompt):
        for inner, texts in _tags(text).items():
            found.setdefault(inner, []).extend(texts)
        found.setdefault(name, []).append(text.strip())
    return found


def _without_question(tags: Mapping[str, str]) -> str:
    # Correctness の document は「質問 - 回答」。質問の語を回答の手柄にしない
    return tags["document"].removeprefix(tags.get("question", "")).removeprefix(" - ")


def _parsed(text: str) -> Any:
    """JSON か Python の表記なら値に、そうでなければ文字列のまま。二重の引用符もほどく。"""
    if not text.startswith(("{", "[", '"', "'")):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
        return _parsed(value) if isinstance(value, str) else value
    return text


def _main_text(value: Any, keys: tuple[str, ...]) -> str:
    return _picked(value, keys) or _all_text(value)


def _picked(value: Any, keys: tuple[str, ...]) -> str:
    if not isinstance(value, dict):
        return ""
    items = cast(dict[str, Any], value)
    return next((_all_text(items[key]) for key in keys if items.get(key)), "")


def _all_text(value: Any) -> str:
    """値に含まれる文字列を、改行でつないだもの。"""
    if isinstance(value, dict):
        items = cast(dict[str, Any], value)
        return "\n".join(_all_text(v) for k, v in items.items() if k not in ("role", "id", "type"))
    if isinstance(value, list):
        return "\n".join(_all_text(item) for item in cast(list[Any], value))
    return value if isinstance(value, str) else ""


def _turns(conversation: Any) -> list[tuple[str, str]]:
    if not isinstance(conversation, list):
        return []
    turns = [cast(dict[str, Any], t) for t in cast(list[Any], conversation) if isinstance(t, dict)]
    return [
        (str(t.get("role")), _main_text(_parsed(str(t.get("content"))), _QUESTION_KEYS))
        for t in turns
    ]
