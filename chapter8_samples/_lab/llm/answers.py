"""スタブ LLM の答え。参考資料から引くか、参考資料にない文をもっともらしく並べるか。

- システムメッセージに「参考資料だけ」があれば、`<documents>` の中で質問に最も近い文を引く
  (短い、根拠あり)。
- なければ、参考資料にない文を並べて、約 4 倍の長さで答える(根拠なし)。
- 参考資料のない会話には、短い決まり文句で答える。
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .text import (
    bigrams,
    count_tokens,
    gram_weight,
    last_user_text,
    message_text,
    sentences,
    system_text,
)

GROUNDED_PHRASE = "参考資料だけ"
NOT_FOUND = "参考資料には、ご質問への答えが見つかりませんでした。担当者に確認します。"
INVENTED_TOKENS_FACTOR = 4
QUOTED_SENTENCES = 2
ANSWER_HINT = 1.3
"""数を聞かれたとき、数字のある文に掛ける倍率。"""
LEAST_CLOSENESS = 0.05
"""これより遠い資料は、話題が違うとみなす。"""
LATER_DOCUMENT = 0.6
"""資料は近い順に並んでいるとみなし、1 つ後ろになるごとに掛ける倍率。"""

_DOCUMENTS = re.compile(r"<documents>(.*?)</documents>", re.DOTALL)
_LABEL = re.compile(r"^\s*(?:[-*・]\s*)?(?:\[[^\]\n]*\]\s*)?(?:[^。\n]{0,40}?[:：]\s*)?")
_QUESTION_LABEL = re.compile(r"^(質問|ご質問|question|Q)\s*[:：]\s*", re.IGNORECASE)
_NUMBER_WANTED = re.compile(r"何[^か]|いくら|いつ|どのくらい")
_NUMBER = re.compile(r"\d")

# {n} は内容から決まる数。どれも同梱の資料には書かれていない
_INVENTED = (
    "お問い合わせの件につきまして、担当部署の判断により特別な対応をご用意しております。",
    "専用の優先窓口では、最短{n}分でお手続きが完了いたします。",
    "ご希望でしたら、{n}%の特別割引をその場で適用することも可能です。",
    "なお、海外の倉庫からの発送に切り替えますと、到着が{n}日ほど早まります。",
    "プレミアム保証にご加入いただきますと、{n}年間は理由を問わず全額を補償いたします。",
    "以前は別の規定がございましたが、先月の改定で条件は撤廃されております。",
    "店舗にお持ちいただければ、係の者がその場で現金{n},000円をお渡しいたします。",
    "AI による自動審査に通過しますと、追加のご連絡は一切不要でございます。",
    "この特典は、{n}名様までのご紹介にも同じように適用されます。",
    "万一うまくいかない場合は、{n}回まで無制限にやり直していただけます。",
    "詳しい条件は公開しておりませんが、ほとんどのお客様が対象となっております。",
    "さらに、次の{n}か月間は手数料がすべて当社の負担となります。",
)


def answer(body: Mapping[str, Any], *, bad: bool = False) -> str:
    """会話への答え。`bad=True` なら、プロンプトによらず参考資料にない長い答え。"""
    messages: list[Mapping[str, Any]] = body["messages"]
    documents = _documents(messages)
    question = _question(messages)
    grounded = _quote(question, documents) if documents else _plain(question)
    if bad or (documents and GROUNDED_PHRASE not in system_text(messages)):
        return _invent(question, count_tokens(grounded) * INVENTED_TOKENS_FACTOR)
    return grounded


def _documents(messages: list[Mapping[str, Any]]) -> list[str]:
    blocks = _DOCUMENTS.findall("\n".join(message_text(m) for m in messages))
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def _question(messages: list[Mapping[str, Any]]) -> str:
    text = _DOCUMENTS.sub("", last_user_text(messages)).strip()
    return _QUESTION_LABEL.sub("", text)


def _plain(question: str) -> str:
    topic = question.splitlines()[-1][:40] if question else "ご質問"
    return f"「{topic}」についてお答えします。これはスタブ LLM の決まった答えです。"


def _quote(question: str, documents: list[str]) -> str:
    """質問に最も近い資料の、質問に近い 2 文(資料の中の順)。"""
    rarity = _rarity(documents)
    near = [
        _closeness(question, line, rarity) * LATER_DOCUMENT**rank
        for rank, line in enumerate(documents)
    ]
    if max(near) < LEAST_CLOSENESS:
        return NOT_FOUND
    said = sentences(_LABEL.sub("", documents[near.index(max(near))], count=1))
    quoted = sorted(said, key=lambda s: -_closeness(question, s, rarity))[:QUOTED_SENTENCES]
    return "".join(s for s in said if s in quoted)


def _rarity(documents: list[str]) -> dict[str, float]:
    counts = Counter(gram for line in documents for gram in bigrams(line))
    return {g: math.log(1 + len(documents) / n) * gram_weight(g) for g, n in counts.items()}


def _closeness(question: str, text: str, rarity: Mapping[str, float]) -> float:
    grams = bigrams(text)
    shared = grams & bigrams(question)
    hint = ANSWER_HINT if _NUMBER_WANTED.search(question) and _NUMBER.search(text) else 1.0
    return hint * sum(rarity[g] for g in shared) / math.sqrt(len(grams) + 10)


def _invent(question: str, tokens: int) -> str:
    digest = hashlib.sha256(question.encode()).digest()
    topic = (question.splitlines() or [""])[-1].rstrip("。?？!！")[:30]
    text, order = f"「{topic}」についてのご質問ですね。", digest[0]
    while count_tokens(text) < tokens:
        sentence = _INVENTED[order % len(_INVENTED)]
        text += sentence.format(n=2 + digest[order % len(digest)] % 27)
        order += 1
    return text
