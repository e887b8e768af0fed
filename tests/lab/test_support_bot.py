"""お客様窓口のボット: 検索、トレースの形、2 つのリリースの違い。"""

from __future__ import annotations

import json
import re
import warnings
from importlib.resources import files
from statistics import mean

# 先に読み込む。MLflow のスレッドが(litellm のために)読み込む途中では、openai SDK が失敗する
import httpx  # noqa: F401
import mlflow
import pytest
from openai import OpenAI

from chapter8_samples import _lab
from chapter8_samples._lab import shop
from chapter8_samples._lab.llm.answers import NOT_FOUND
from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.shop.documents import load_documents, load_questions
from chapter8_samples._lab.shop.support_bot import (
    PROMPT_ALIAS,
    PROMPT_NAME,
    Retriever,
    SupportBot,
    register_releases,
)


@pytest.fixture
def bot(stub_llm: StubLlm, tracking_uri: str) -> SupportBot:
    mlflow.set_experiment("bot")
    mlflow.openai.autolog()
    good, _ = register_releases()
    mlflow.MlflowClient().set_prompt_alias(PROMPT_NAME, PROMPT_ALIAS, int(good))
    return SupportBot(OpenAI())


def test_retrieval_finds_the_right_document() -> None:
    retriever, questions = Retriever(load_documents()), load_questions()
    found = [[d.id for d in retriever.search(q.question)] for q in questions]
    wanted = [q.expected_document for q in questions]
    assert [ids[0] for ids in found] == wanted


OBVIOUS = [
    ("返品の期限は何日ですか", "returns-01", "到着から14日以内"),
    ("返品できますか", "returns-01", "未使用で、タグと箱がそろっている"),
    ("送料はいくらですか", "shipping-01", "550円"),
    ("送料無料はいくらから", "shipping-01", "5,000円以上"),
    ("いつ届きますか", "shipping-02", "2日から4日"),
    ("支払い方法は", "payment-01", "クレジットカード"),
    ("ポイントの有効期限は", "points-03", "12か月"),
    ("パスワードを忘れた", "account-01", "再設定"),
    ("退会したい", "account-03", "退会"),
    ("領収書がほしい", "receipt-01", "発行できます"),
    ("返金はいつですか", "returns-03", "3営業日以内"),
    ("海外に送れますか", "shipping-08", "海外"),
    ("注文をキャンセルしたい", "order-01", "取り消せ"),
    ("商品が壊れていた", "trouble-01", "30日以内"),
    ("交換したい", "returns-04", "交換"),
    ("荷物はいつ届きますか", "shipping-02", "2日から4日"),
    ("明日届けてほしい", "shipping-03", "翌日"),
    ("配送状況を知りたい", "shipping-05", "追跡番号"),
    ("ログインできない", "account-01", "再設定"),
    ("領収書はどこで発行できますか", "receipt-01", "注文履歴"),
]


def test_the_questions_offered_on_the_page_are_among_the_obvious_ones() -> None:
    page = (files(shop) / "templates" / "chat.html").read_text(encoding="utf-8")
    offered = re.findall(r"data-example[^>]*>([^<]+)<", page)
    placeholder = re.findall(r"placeholder=\"例: ([^\"]+)\"", page)
    assert len(offered) == 3 and placeholder
    assert {*offered, *placeholder} <= {question for question, _, _ in OBVIOUS}


@pytest.mark.slow
def test_obvious_questions_get_the_obvious_answer(bot: SupportBot) -> None:
    wrong = [
        (question, found, said)
        for question, document, answer in OBVIOUS
        for found in [bot.retriever.search(question)[0].id]
        for said in [bot.answer(question)]
        if found != document or answer not in said
    ]
    assert wrong == []


@pytest.mark.slow
def test_what_the_documents_do_not_say_is_left_to_people(bot: SupportBot) -> None:
    for question in ("ありがとう", "今日の天気を教えてください"):
        assert bot.answer(question) == NOT_FOUND


@pytest.mark.slow
def test_trace_has_the_three_kinds_of_span(bot: SupportBot) -> None:
    question = load_questions()[2]
    answer = bot.answer(question.question)
    assert question.expected_answer in answer
    mlflow.flush_trace_async_logging()
    (trace,) = mlflow.search_traces(return_type="list")
    assert [span.span_type for span in trace.data.spans] == ["CHAIN", "RETRIEVER", "CHAT_MODEL"]
    assert trace.info.tags["prompt.version"] == "1"
    assert (trace.info.token_usage or {})["output_tokens"] > 0


@pytest.mark.slow
def test_streamed_answer_is_one_complete_trace(bot: SupportBot) -> None:
    question = load_questions()[0].question
    assert "".join(bot.stream(question)) == bot.answer(question)
    mlflow.flush_trace_async_logging()
    usages = [t.info.token_usage for t in mlflow.search_traces(return_type="list")]
    assert usages[0] == usages[1] and usages[0]


@pytest.mark.slow
def test_bad_release_is_ungrounded_and_longer(bot: SupportBot) -> None:
    questions = load_questions()[:6]
    good = [bot.answer(q.question) for q in questions]
    mlflow.MlflowClient().set_prompt_alias(PROMPT_NAME, PROMPT_ALIAS, 2)
    bad = [bot.answer(q.question) for q in questions]
    assert mean(map(len, bad)) > 2 * mean(map(len, good))
    text = json.dumps([document.text for document in load_documents()], ensure_ascii=False)
    assert all(answer.split("。")[1] not in text for answer in bad)


@pytest.mark.slow
def test_releases_start_over_without_history(bot: SupportBot) -> None:
    mlflow.MlflowClient().set_prompt_tag(PROMPT_NAME, "rollback_production_1", "old")
    assert register_releases() == ("1", "2")
    assert "rollback_production_1" not in mlflow.MlflowClient().get_prompt(PROMPT_NAME).tags


@pytest.mark.slow
def test_the_migration_warning_that_leaks_between_threads_is_not_shown(bot: SupportBot) -> None:
    """MLflow の止め方はスレッドごとではないので、ほかのスレッドからは出たままに見える。"""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _lab.go_offline()
        mlflow.load_prompt(f"prompts:/{PROMPT_NAME}@{PROMPT_ALIAS}")  # 警告を出す古い名前
    assert [str(warning.message) for warning in seen] == []
