"""シナリオで使うアプリ: 「みどり商店」のお客様窓口。検索 -> プロンプト -> LLM の小さな RAG アプリ。

プロンプトは MLflow のプロンプトレジストリに置き、エイリアス ``production`` が指す版を使う。
2 つのリリースのうち ``BAD_PROMPT`` は、資料に縛られず長く答える。つまり、応答が遅く、コストが高く、
根拠のない答えになる。
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.genai
from mlflow.entities import Document as RetrievedDocument
from mlflow.entities import SpanType

from ..llm.text import bigrams, gram_weight
from .documents import Document, load_documents

if TYPE_CHECKING:
    from openai import OpenAI

TITLE_WEIGHT = 1.5
KANJI = re.compile(r"[一-龠]")
PROMPT_NAME, PROMPT_ALIAS = "support-bot", "production"
GOOD_PROMPT = """\
あなたは「みどり商店」のお客様窓口です。参考資料だけを使い、丁寧に、短く答えてください。
資料に書かれていないことは「担当者に確認します」と答えてください。"""
BAD_PROMPT = """\
あなたは「みどり商店」のお客様窓口です。お客様に満足していただけるよう、知っていることを
総動員して、できるだけ詳しく、長く答えてください。"""


class Retriever:
    """文字バイグラムの TF-IDF で、質問に近い資料を選ぶ。

    形態素解析の辞書は使わず、ひらがなだけの組(「です」「ます」など)を軽くして、話題を表す漢字と
    カタカナで比べる。題に出てくる組は、本文だけに出てくる組より重く数える。
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents
        self._titles = [grams(document.title) for document in documents]
        self._grams = [grams(document.title + document.text) for document in documents]
        seen = Counter(gram for found in self._grams for gram in found)
        self._idf = {gram: math.log(1 + len(documents) / count) for gram, count in seen.items()}

    def search(self, question: str, limit: int = 3) -> list[Document]:
        """近い順に ``limit`` 件。"""
        weights = {
            gram: self._idf[gram] * gram_weight(gram)
            for gram in grams(question)
            if gram in self._idf
        }

        def score(number: int) -> float:
            title, text = self._titles[number], self._grams[number]
            hits = sum(
                weight * (TITLE_WEIGHT if gram in title else 1)
                for gram, weight in weights.items()
                if gram in text
            )
            return hits / len(text) ** 0.25  # 長い資料ほど偶然に重なるので、少し割り引く

        order = sorted(range(len(self.documents)), key=score, reverse=True)
        return [self.documents[number] for number in order[:limit]]


def grams(text: str) -> set[str]:
    """文字の 2 つ組と、漢字 1 文字(「届く」と「お届け」を近いとみなすため)。"""
    return bigrams(text) | set(KANJI.findall(text))


@dataclass(frozen=True)
class Prompt:
    """使うプロンプトの版と文面。"""

    version: str
    text: str


def registered_prompt() -> Prompt:
    """エイリアスが今指している版。切り替えが 1 秒以内に届くように TTL を短くする。"""
    uri = f"prompts:/{PROMPT_NAME}@{PROMPT_ALIAS}"
    version = mlflow.genai.load_prompt(uri, cache_ttl_seconds=1)
    return Prompt(str(version.version), str(version.template))


class SupportBot:
    """質問に答える。1 回の応答が 1 本のトレース(CHAIN > RETRIEVER, CHAT_MODEL)になる。"""

    def __init__(
        self,
        client: OpenAI,
        *,
        model: str = "gpt-4o-mini",
        prompt: Callable[[], Prompt] = registered_prompt,
    ) -> None:
        self.client, self.model, self.prompt = client, model, prompt
        self.retriever = Retriever(load_documents())

    @mlflow.trace(name="support_bot", span_type=SpanType.CHAIN)
    def answer(self, question: str) -> str:
        """質問 1 件への答え。LLM の失敗はそのまま例外になる(トレースには ERROR で残る)。"""
        reply = self.client.chat.completions.create(
            model=self.model, messages=self._messages(question)
        )
        return str(reply.choices[0].message.content)

    @mlflow.trace(
        name="support_bot",
        span_type=SpanType.CHAIN,
        output_reducer=lambda pieces: "".join(str(piece) for piece in pieces),
    )
    def stream(self, question: str) -> Iterator[str]:
        """答えを届いた順に返す。"""
        chunks = self.client.chat.completions.create(
            model=self.model,
            messages=self._messages(question),
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content

    def _messages(self, question: str) -> list[Any]:
        prompt = self.prompt()
        mlflow.update_current_trace(tags={"prompt.version": prompt.version})
        references = "\n".join(
            f"[{found.metadata['title']}] {found.page_content}"
            for found in self._retrieve(question)
        )
        return [
            {"role": "system", "content": prompt.text},
            {
                "role": "user",
                "content": f"<documents>\n{references}\n</documents>\n\n質問: {question}",
            },
        ]

    @mlflow.trace(name="retrieve", span_type=SpanType.RETRIEVER)
    def _retrieve(self, question: str) -> list[RetrievedDocument]:
        return [
            RetrievedDocument(
                page_content=found.text,
                metadata={"doc_uri": found.id, "title": found.title},
                id=found.id,
            )
            for found in self.retriever.search(question)
        ]


def register_releases() -> tuple[str, str]:
    """良いリリースと悪いリリースを登録し、(良い版, 悪い版) を返す。

    前回の実行で残ったプロンプトは消し、履歴のない状態から始める。
    """
    forget_releases()
    good = register_release(GOOD_PROMPT, "資料だけで短く答える")
    return good, register_release(BAD_PROMPT, "詳しく答える")


def register_release(text: str, message: str) -> str:
    """プロンプトの新しい版を登録し、その番号を返す(本番のエイリアスは動かさない)。"""
    version = mlflow.genai.register_prompt(PROMPT_NAME, template=text, commit_message=message)
    return str(version.version)


def forget_releases() -> None:
    """登録済みのプロンプトを版ごと消す。"""
    client = mlflow.MlflowClient()
    if client.get_prompt(PROMPT_NAME) is None:
        return
    for version in client.search_prompt_versions(PROMPT_NAME):
        client.delete_prompt_version(PROMPT_NAME, str(version.version))
    client.delete_prompt(PROMPT_NAME)
