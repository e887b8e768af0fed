"""MLflow の本物のジャッジが、スタブを相手に、良い回答と悪い回答を見分けること。"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Document as RetrievedDocument
from mlflow.entities import SpanType, Trace
from mlflow.genai import scorers
from mlflow.genai.judges import make_judge
from openai import OpenAI

from chapter8_samples._lab.llm.rules import Case, Verdict, grounded, polite
from chapter8_samples._lab.llm.schema import fill
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
        (scorers.Completeness(model=MODEL), GROUNDED, UNRELATED),
        (guideline("丁寧な言葉で答えること"), GROUNDED, "知らん。"),
        (guideline("20文字以内"), "14日以内です。", GROUNDED),
        (guideline("根拠のない約束をしない"), GROUNDED, INVENTED),
        (scorers.Fluency(model=MODEL), GROUNDED, "はい。はい。はい。"),
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
    inputs = {"question": QUESTION, "documents": [SOURCE]}
    kinds: list[tuple[Any, str, str]] = [
        (bool, "True", "False"),
        (Literal["grounded", "ungrounded"], "grounded", "ungrounded"),
        (Literal["はい", "いいえ"], "はい", "いいえ"),
        (str, "yes", "no"),
        (int, "5", "1"),
        (float, "1.0", "0.0"),
    ]
    for kind, good, bad in kinds:
        judge = make_judge(
            name="grounded",
            instructions="{{ outputs }} は {{ inputs }} の参考資料に根拠がありますか。",
            feedback_value_type=kind,
            model=MODEL,
        )
        assert value(judge(inputs=inputs, outputs=GROUNDED)) == good
        assert value(judge(inputs=inputs, outputs=INVENTED)) == bad


@pytest.mark.slow
def test_make_judge_on_a_trace_reads_it_with_a_tool(
    traced: Callable[[str], Trace], stub_llm: StubLlm
) -> None:
    judge = make_judge(
        name="promise",
        instructions="{{ trace }} の回答は、根拠のない約束をしていませんか。",
        feedback_value_type=Literal["pass", "fail"],
        model=MODEL,
    )
    assert value(judge(trace=traced(GROUNDED))) == "pass"
    assert value(judge(trace=traced(INVENTED))) == "fail"
    assert stub_llm.requests[-1]["messages"][-1]["role"] == "tool"


def test_json_object_format_gets_result_and_rationale(stub_llm: StubLlm) -> None:
    reply = OpenAI().chat.completions.create(
        model="gpt-4o",
        messages=[{"role": "user", "content": "<text>ご注文ありがとうございます。</text>"}],
        response_format={"type": "json_object"},
    )
    assert json.loads(str(reply.choices[0].message.content))["result"] == "yes"


PASSED = Verdict(True, "理由です。")
FAILED = Verdict(False, "理由です。", 0.0, evidence=["根拠のない文。"])


SCHEMAS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"type": "boolean"}, True, False),
    ({"enum": ["bad", "good"]}, "good", "bad"),
    ({"enum": ["A", "B", "C"]}, "A", "C"),
    ({"enum": [1, 2, 3]}, 3, 1),
    ({"enum": [True, False]}, True, False),
    ({"const": "v1"}, "v1", "v1"),
    ({"type": "integer"}, 5, 1),
    ({"type": "integer", "minimum": 0, "maximum": 10}, 10, 0),
    ({"type": "integer", "exclusiveMinimum": 0, "maximum": 3}, 3, 1),
    ({"type": "number"}, 1.0, 0.0),
    ({"type": "number", "minimum": -1, "maximum": 1}, 1.0, -1.0),
    ({"type": ["string", "null"]}, "理由です。", "理由です。"),
    ({"type": "string", "maxLength": 2}, "理由", "理由"),
    ({"type": "null"}, None, None),
    ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, True, False),
    ({"type": "array", "items": {"type": "string"}}, [], ["根拠のない文。"]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True] * 2, [False] * 2),
    ({"$ref": "#/$defs/V", "$defs": {"V": {"type": "boolean"}}}, True, False),
    (
        {
            "type": "array",
            "items": {"$ref": "#/$defs/V"},
            "minItems": 1,
            "$defs": {"V": {"type": "string", "enum": ["yes", "no"]}},
        },
        ["yes"],
        ["no"],
    ),
    ({"type": "number", "maximum": -10}, -10.0, -10.0),
]


def test_schema_is_filled() -> None:
    for schema, good, bad in SCHEMAS:
        assert (fill(schema, PASSED), fill(schema, FAILED)) == (good, bad), schema


def test_stated_range_is_used_when_the_schema_has_none() -> None:
    assert fill({"type": "integer"}, PASSED, "0から10で採点してください") == 10
    assert fill({"type": "number", "maximum": 1}, PASSED, "返品は7-14日以内です") == 1


def test_nested_and_recursive_schemas_end() -> None:
    node = {
        "type": "object",
        "properties": {
            "verdict": {"type": "string", "enum": ["pass", "fail"]},
            "reason": {"type": "string"},
            "child": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
        },
    }
    filled = fill({"$ref": "#/$defs/Node", "$defs": {"Node": node}}, FAILED)
    assert filled["verdict"] == "fail"
    assert filled["child"]["reason"] == "理由です。"
    assert len(json.dumps(filled, ensure_ascii=False)) < 1_000_000


@settings(max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.sampled_from(["string", "boolean"])))
def test_any_key_set_is_answered(kinds: dict[str, str]) -> None:
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    filled = fill({"type": "object", "properties": properties}, PASSED)
    assert {name: type(v).__name__ for name, v in filled.items()} == {
        name: {"string": "str", "boolean": "bool"}[kind] for name, kind in kinds.items()
    }


GRADE = {"properties": {"grade": {"enum": ["good", "bad"]}}, "required": ["grade"]}


def test_keys_of_combined_schemas_are_all_there() -> None:
    grade, ok = {"$ref": "#/$defs/Grade"}, {"properties": {"ok": {"type": "boolean"}}}
    for schema in ({"allOf": [grade, ok]}, {**ok, "allOf": [grade]}, {**ok, "anyOf": [grade]}):
        whole = {"type": "object", **schema, "$defs": {"Grade": GRADE}}
        assert fill(whole, FAILED) == {"grade": "bad", "ok": False}, schema


def test_grounded_rule() -> None:
    for answer, passed in {
        GROUNDED: True,
        "お問い合わせありがとうございます。" + GROUNDED: True,
        "参考資料には見つかりませんでした。": True,
        "返品は商品の到着から30日以内に受け付けます。": False,  # 数字だけが違う
        GROUNDED + INVENTED: False,
    }.items():
        assert grounded(Case(answer=answer, document=SOURCE)).passed is passed, answer
    found = grounded(Case(answer=GROUNDED + INVENTED, document=SOURCE))
    assert (found.score, found.evidence) == (0.5, [INVENTED])  # 点数は、資料にある文の割合


def test_polite_rule() -> None:
    for answer, passed in {
        "承ります。ご安心ください。": True,
        "無理。あきらめろ。": False,
        "Yes, you can.": True,
    }.items():
        assert polite(Case(answer=answer)).passed is passed, answer
