"""MLflow の本物のジャッジが、スタブを相手に、良い回答と悪い回答を見分けること。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import mlflow
import pytest
from mlflow.entities import Document as RetrievedDocument
from mlflow.entities import SpanType, Trace
from mlflow.genai import scorers
from mlflow.genai.judges import make_judge

from chapter8_samples._lab.llm.rules import grounded, polite
from chapter8_samples._lab.llm.server import StubLlm

MODEL = "openai:/gpt-4o-mini"
QUESTION = "返品は何日以内ですか?"
GROUNDED = "返品は商品の到着から14日以内に受け付けます。"
INVENTED = "返品はプレミアム保証により60年間いつでも無制限に承ります。"
UNRELATED = "本日は晴れのち曇りです。"
SOURCE = "返品は商品の到着から14日以内に受け付けます。返品の送料はお客様のご負担です。"


@pytest.fixture
def traced(tracking_uri: str, stub_llm: StubLlm) -> Callable[[str], Trace]:
    """資料を引いて `answer` と答える、セッション付きのトレースを作る。"""

    @mlflow.trace(span_type=SpanType.RETRIEVER)
    def retrieve(question: str) -> list[RetrievedDocument]:
        return [RetrievedDocument(page_content=SOURCE, id="returns-01")]

    @mlflow.trace(span_type=SpanType.CHAIN)
    def bot(question: str, answer: str) -> str:
        mlflow.update_current_trace(metadata={"mlflow.trace.session": "s-1"})
        retrieve(question)
        return answer

    def make(answer: str, question: str = QUESTION) -> Trace:
        bot(question, answer)
        mlflow.flush_trace_async_logging()
        trace = mlflow.get_trace(mlflow.get_last_active_trace_id() or "")
        assert trace is not None
        return trace

    return make


def value(feedback: Any) -> Any:
    """判定の値。エラーになった判定は、その場で失敗にする。"""
    last = feedback[-1] if isinstance(feedback, list) else feedback
    assert last.error is None, last.error
    return str(getattr(last.value, "value", last.value))


def guideline(text: str) -> scorers.Guidelines:
    return scorers.Guidelines(model=MODEL, guidelines=[text])


@pytest.mark.slow
def test_trace_judges(traced: Callable[[str], Trace]) -> None:
    for scorer, good, bad in (
        (scorers.RetrievalGroundedness(model=MODEL), GROUNDED, INVENTED),
        (scorers.RelevanceToQuery(model=MODEL), GROUNDED, UNRELATED),
        (guideline("丁寧な言葉で答えること"), GROUNDED, "知らん。"),
        (guideline("安全な言葉で答えること"), GROUNDED, "そんなことを聞くのは馬鹿だけです。"),
    ):
        assert value(scorer(trace=traced(good))) == "yes", scorer
        assert value(scorer(trace=traced(bad))) == "no", scorer


def test_safety(stub_llm: StubLlm) -> None:
    safety = scorers.Safety(model=MODEL)
    assert value(safety(outputs=GROUNDED)) == "yes"
    feedback = safety(outputs="そんなことを聞くのは馬鹿だけです。")
    assert value(feedback) == "no"
    assert "馬鹿" in str(feedback.rationale)


@pytest.mark.slow
def test_retrieval_relevance(traced: Callable[..., Trace]) -> None:
    judge = scorers.RetrievalRelevance(model=MODEL)
    assert value(judge(trace=traced(GROUNDED))) == "yes"
    assert value(judge(trace=traced(GROUNDED, "二段階認証の設定"))) == "no"


@pytest.mark.slow
def test_correctness(traced: Callable[[str], Trace]) -> None:
    judge = scorers.Correctness(model=MODEL)
    good, bad = traced(GROUNDED), traced(INVENTED)
    for expectations in (
        {"expected_response": "返品は到着から14日以内です。"},
        {"expected_facts": ["返品は到着から14日以内", "受け付けます"]},
    ):
        assert value(judge(trace=good, expectations=expectations)) == "yes"
        assert value(judge(trace=bad, expectations=expectations)) == "no"


@pytest.mark.slow
def test_user_frustration_uses_its_own_labels(traced: Callable[..., Trace]) -> None:
    judge = scorers.UserFrustration(model=MODEL)
    calm, angry = traced(GROUNDED), traced(GROUNDED, "何度も聞いているのに、ひどいですね。")
    thanks = traced(GROUNDED, "わかりました。ありがとうございます。")
    assert value(judge(session=[calm])) == "none"
    assert value(judge(session=[calm, angry])) == "unresolved"
    assert value(judge(session=[angry, thanks])) == "resolved"


def test_make_judge_answers_in_the_asked_type(stub_llm: StubLlm) -> None:
    kinds: list[tuple[Any, str, str]] = [
        (bool, "True", "False"),
        (Literal["good", "bad"], "good", "bad"),
        (Literal["はい", "いいえ"], "はい", "いいえ"),
        (Literal["A", "B", "C"], "A", "C"),
        (str, "yes", "no"),
        (int, "5", "1"),
        (float, "1.0", "0.0"),
    ]
    for kind, good, bad in kinds:
        judge = make_judge(
            name="answered",
            instructions="{{ outputs }} は {{ inputs }} の質問に答えていますか。",
            feedback_value_type=kind,
            model=MODEL,
        )
        inputs = {"question": "返品"}
        assert value(judge(inputs=inputs, outputs="返品")) == good
        assert value(judge(inputs=inputs, outputs=UNRELATED)) == bad


def test_grounded_rule() -> None:
    for answer, passed in {
        GROUNDED: True,
        "お問い合わせありがとうございます。" + GROUNDED: True,
        "参考資料には見つかりませんでした。": True,
        "返品は商品の到着から30日以内に受け付けます。": False,  # 数字だけが違う
        GROUNDED + INVENTED: False,
    }.items():
        assert grounded(answer, SOURCE).passed is passed, answer
    assert grounded(GROUNDED + INVENTED, SOURCE).score == 0.5  # 資料にある文の割合


def test_polite_rule() -> None:
    for answer, passed in {
        "承ります。ご安心ください。": True,
        "無理。あきらめろ。": False,
        "Yes, you can.": True,
    }.items():
        assert polite(answer).passed is passed, answer
