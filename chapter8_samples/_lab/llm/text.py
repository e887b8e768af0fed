"""スタブ LLM が使う、文の分け方、比べ方、トークンの数え方。外部の辞書は使わない。"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Message = Mapping[str, Any]

_TOKENS_PER_MESSAGE = 4
_SENTENCE_END = re.compile(r"(?<=[。!?！？])|(?<=[.])\s+|\n")
_NOT_WORD = re.compile(r"[\s\W_]+")
_HIRAGANA = re.compile(r"[ぁ-ん]")
_ASCII_WORD = re.compile(r"[a-z0-9]{3,}")


def count_tokens(text: str) -> int:
    """トークン数の見積もり: ASCII は 4 文字、それ以外(日本語)は 1.5 文字で 1 トークン、最低 1。"""
    ascii_chars = sum(character.isascii() for character in text)
    twelfths = 3 * ascii_chars + 8 * (len(text) - ascii_chars)
    return max(1, -(-twelfths // 12))


def prompt_tokens(messages: Iterable[Message]) -> int:
    """メッセージ列のトークン数。1 通ごとに役割の分として 4 を足す。"""
    return sum(count_tokens(message_text(m)) + _TOKENS_PER_MESSAGE for m in messages)


def message_text(message: Message) -> str:
    """メッセージの本文。"""
    return str(message.get("content") or "")


def system_text(messages: Iterable[Message]) -> str:
    """システムメッセージの本文。"""
    return "\n".join(message_text(m) for m in messages if m.get("role") == "system")


def last_user_text(messages: Iterable[Message]) -> str:
    """最後のユーザーメッセージの本文。なければ空文字列。"""
    texts = [message_text(m) for m in messages if m.get("role") == "user"]
    return texts[-1] if texts else ""


def sentences(text: str) -> list[str]:
    """「。」「?」「!」、英文のピリオド、改行で区切った文。句点は文に含める。"""
    return [s for s in (part.strip() for part in _SENTENCE_END.split(text)) if s]


def bigrams(text: str) -> set[str]:
    """記号と空白を除いた文字の 2 つ組。日本語を辞書なしで比べるのに使う。"""
    letters = _NOT_WORD.sub("", text).lower()
    if len(letters) < 2:
        return {letters} if letters else set()
    return {letters[i : i + 2] for i in range(len(letters) - 1)}


def gram_weight(gram: str) -> float:
    """2 つ組の重み。ひらがなだけの組は、どの文にもあるので軽くする。"""
    return (1.0, 0.5, 0.05)[min(2, len(_HIRAGANA.findall(gram)))]


def key_terms(text: str) -> set[str]:
    """話題を表す語: 英数字は単語、日本語はひらがなを含まない 2 つ組(漢字とカタカナ)。"""
    words = set(_ASCII_WORD.findall(text.lower()))
    japanese = (re.sub(r"[ -~]", " ", text)).split()
    return words | {g for part in japanese for g in bigrams(part) if not _HIRAGANA.search(g)}


def overlap(text: str, reference: str) -> float:
    """`text` の 2 つ組のうち `reference` にもあるものの割合(0 から 1)。"""
    grams = bigrams(text)
    return len(grams & bigrams(reference)) / len(grams) if grams else 0.0
