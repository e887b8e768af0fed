"""サポートボットが使う資料と質問。架空のネット通販「みどり商店」のもの(`data/` に同梱)。"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

__all__ = ["Document", "Question", "load_documents", "load_questions"]


@dataclass(frozen=True, kw_only=True)
class Document:
    """資料 1 件。`text` は 3 から 5 文。"""

    id: str
    title: str
    category: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """質問 1 件と、答えの載っている資料の id。`expected_answer` はその資料の 1 文。"""

    id: str
    question: str
    expected_document: str
    expected_answer: str


def load_documents() -> list[Document]:
    """同梱の資料をすべて読む(ファイルの順)。"""
    return [Document(**row) for row in _rows("documents.jsonl")]


def load_questions() -> list[Question]:
    """同梱の質問をすべて読む(ファイルの順)。"""
    return [Question(**row) for row in _rows("questions.jsonl")]


def _rows(name: str) -> list[dict[str, str]]:
    file = resources.files(__package__ or __name__) / "data" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
