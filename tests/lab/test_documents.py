"""同梱の資料と質問がそろっていて、スタブ LLM が実際に答えられること。"""

from __future__ import annotations

from collections import Counter

from chapter8_samples._lab.llm import answers, rules
from chapter8_samples._lab.llm.text import count_tokens, sentences
from chapter8_samples._lab.shop.documents import Document, load_documents, load_questions

DOCUMENTS = {document.id: document for document in load_documents()}
QUESTIONS = load_questions()


def answer(system: str, question: str, documents: list[Document]) -> str:
    references = "\n".join(document.text for document in documents)
    content = f"<documents>\n{references}\n</documents>\n\n質問: {question}"
    roles = {"system": system, "user": content}
    return answers.answer(
        {"messages": [{"role": role, "content": text} for role, text in roles.items()]}
    )


def test_there_are_enough_of_both() -> None:
    assert len(load_documents()) >= 36
    assert len(QUESTIONS) >= 72
    assert len({document.category for document in DOCUMENTS.values()}) >= 10


def test_ids_and_questions_are_unique() -> None:
    assert len(DOCUMENTS) == len(load_documents())
    for values in ([q.id for q in QUESTIONS], [q.question for q in QUESTIONS]):
        assert not [value for value, count in Counter(values).items() if count > 1]


def test_documents_are_three_to_five_sentences() -> None:
    assert {3 <= len(sentences(document.text)) <= 5 for document in DOCUMENTS.values()} == {True}


def test_every_expected_answer_is_a_sentence_of_its_document() -> None:
    for question in QUESTIONS:
        document = DOCUMENTS[question.expected_document]
        assert question.expected_answer in sentences(document.text), question.id


def test_every_document_is_asked_about() -> None:
    assert {question.expected_document for question in QUESTIONS} == set(DOCUMENTS)


def test_stub_finds_the_expected_sentence_in_the_right_document() -> None:
    found = [
        q.expected_answer in answer("参考資料だけ", q.question, [DOCUMENTS[q.expected_document]])
        for q in QUESTIONS
    ]
    assert sum(found) / len(found) > 0.85


def test_good_answers_are_grounded_and_bad_ones_are_not() -> None:
    for question in QUESTIONS:
        document = DOCUMENTS[question.expected_document]
        good = answer("参考資料だけ", question.question, [document])
        bad = answer("詳しく答えて", question.question, [document])
        assert rules.grounded(good, document.text).passed
        assert not rules.grounded(bad, document.text).passed
        assert rules.polite(good).passed, good
        assert 3.5 <= count_tokens(bad) / count_tokens(good) <= 5.5
