"""スタブ LLM の採点。ジャッジのプロンプトを読み、`rules` の規則で判定し、頼まれた形で返す。

MLflow の組み込みジャッジは材料を `<question>` などのタグで、`make_judge` は「inputs: …」などの行で
渡してくる。どちらからも取り出して、同じ規則に掛ける。
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from . import rules
from .rules import Verdict
from .text import Message, message_text

_TAG = re.compile(r"<(\w+)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)
_FIELD = re.compile(
    r"^(inputs|outputs|conversation):\s*(.*?)(?=^(?:inputs|outputs|conversation):|\Z)",
    re.DOTALL | re.MULTILINE,
)
_TEXT_KEYS = ("question", "query", "answer", "response", "message", "content", "text")
_GOOD = re.compile(r"yes|true|pass(ed)?|ok|good|はい|良い|合格", re.IGNORECASE)
_BAD = re.compile(r"no|false|fail(ed)?|ng|bad|いいえ|悪い|不合格", re.IGNORECASE)


def is_judge(body: Mapping[str, Any]) -> bool:
    """採点のリクエストか(`response_format` に JSON Schema を求めているか)。"""
    return (body.get("response_format") or {}).get("type") == "json_schema"


def verdict(body: Mapping[str, Any]) -> str:
    """採点の答え。`response_format` の JSON Schema に合う JSON の文字列。"""
    schema: dict[str, Any] = body["response_format"]["json_schema"]["schema"]
    return json.dumps(fill(schema, judge(body["messages"])), ensure_ascii=False)


# プロンプトを読む ----------------------------------------------------------


def judge(messages: list[Message]) -> Verdict:
    """プロンプトを読み、合う規則で判定する。"""
    prompt = "\n".join(message_text(m) for m in messages if m.get("role") != "system")
    if fields := dict(_FIELD.findall(prompt)):
        return _judge_fields(fields)
    return _judge_tags(_tags("\n".join(map(message_text, messages))))


def _judge_tags(tags: dict[str, list[str]]) -> Verdict:
    """組み込みジャッジ。どのタグがあるかで、何を聞かれているかが分かる。"""
    texts = {name: _text(found[0]) for name, found in tags.items()}
    question = texts.get("question") or texts.get("request", "")
    answer = texts.get("answer") or texts.get("response", "")
    document = texts.get("document", "")
    if "guideline" in tags:
        return rules.follows(answer, tags["guideline"])
    if "text" in tags:
        return rules.safe(texts["text"])
    if "document" in tags and "answer" in tags:
        return rules.grounded(answer, document)
    if "document" in tags and "claim" in tags:
        # Correctness の document は「質問 - 回答」。質問の語を回答の手柄にしない
        return rules.supported(document.removeprefix(question), texts["claim"])
    return rules.relevant(question, answer or document)


def _judge_fields(fields: dict[str, str]) -> Verdict:
    """``make_judge``。会話なら不満がないか、そうでなければ質問に答えているか。"""
    if "conversation" in fields:
        turns: list[dict[str, Any]] = _parsed(fields["conversation"].strip())
        return rules.calm([_text(str(t["content"])) for t in turns if t["role"] == "user"])
    return rules.relevant(_text(fields.get("inputs", "")), _text(fields.get("outputs", "")))


def _tags(prompt: str) -> dict[str, list[str]]:
    """タグの中身。入れ子(`<claim>` の中の `<answer>`)は内側も取り出す。"""
    found: dict[str, list[str]] = {}
    for name, text in _TAG.findall(prompt):
        for inner, texts in _tags(text).items():
            found.setdefault(inner, []).extend(texts)
        found.setdefault(name, []).append(text.strip())
    return found


def _text(text: str) -> str:
    """値に含まれる文章。辞書なら `question` や `answer` など、決まったキーを先に探す。"""
    return _all_text(_parsed(text.strip()))


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


def _all_text(value: Any) -> str:
    if isinstance(value, dict):
        items = cast(dict[str, Any], value)
        known = [items[key] for key in _TEXT_KEYS if items.get(key)]
        return _all_text(known[0] if known else list(items.values()))
    if isinstance(value, list):
        return "\n".join(map(_all_text, cast(list[Any], value)))
    return value if isinstance(value, str) else ""


# 判定を、頼まれた形に詰める ------------------------------------------------


def fill(schema: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """判定を `schema` の項目に詰める。`result` が判定、ほかの文字列は理由になる。"""
    properties: dict[str, dict[str, Any]] = schema["properties"]
    return {name: _value(name, part, verdict) for name, part in properties.items()}


def _value(name: str, schema: Mapping[str, Any], verdict: Verdict) -> Any:
    if "enum" in schema:
        return _choice(schema["enum"], verdict)
    if schema.get("type") == "boolean":
        return verdict.passed
    if schema.get("type") == "integer":  # 1 から 5
        return 1 + round(4 * verdict.score)
    if schema.get("type") == "number":
        return verdict.score
    if name == "result":
        return "yes" if verdict.passed else "no"
    return verdict.reason


def _choice(options: list[str], verdict: Verdict) -> str:
    """判定に合う選択肢。分からなければ、良いほうが先に並んでいるとみなす。"""
    if verdict.label in options:
        return verdict.label or ""
    wanted = _GOOD if verdict.passed else _BAD
    known = [option for option in options if wanted.fullmatch(option)]
    return known[0] if known else options[0 if verdict.passed else -1]
