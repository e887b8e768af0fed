"""8.3.4 コードのスコアラーを、登録する前に確かめる。

``@scorer`` の関数は、ソースコードの文字列として登録され、採点する場所で組み立て直される。外の変数や
import は付いていかず、1 行で書いた関数は何も返さなくなる。登録は成功し、採点のときに初めて壊れる。

Databricks では登録され、Databricks の上で実行される。OSS 版では登録せず(サーバーで
コードを実行しない)、``run_scoring_cycle()`` が手元で採点する。どちらでも同じ検査を通してから使う。
"""

from __future__ import annotations

import ast
import builtins
import dis
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any, cast

from mlflow.entities import Feedback, Trace
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer

from .plan import FINISHED_TRACES
from .registry import ScorerPlan, ScorerSetupError, ScorerStatus, setup_scorers

_ENABLE_CODE = "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS"
_GIVEN_NAMES = {  # 組み立て直すときに MLflow が用意する名前
    *dir(builtins),
    "__annotations__",  # 本体の中で定義したクラスの注釈
    "mlflow",
    "Assessment",
    "AssessmentError",
    "AssessmentSource",
    "AssessmentSourceType",
    "CategoricalRating",
    "Feedback",
    "Trace",
}


class CustomScorerError(ScorerSetupError):
    """このコードのスコアラーは、登録すると動かない。"""


def setup_custom_code_scorer(
    experiment_name: str,
    scorer: Scorer,
    sample_rate: float = 0.1,
    *,
    filter_string: str | None = FINISHED_TRACES,
    sample: Trace | Mapping[str, Any] | None = None,
) -> ScorerStatus:
    """コードのスコアラーを、確かめてから登録し、開始する。

    Args:
        experiment_name: エクスペリメントの名前。なければ作る。
        scorer: ``@scorer`` を付けた関数。
        sample_rate: 採点するトレースの割合(0 より大きく 1 以下)。
        filter_string: 採点の対象にするトレース。
        sample: 試しに採点するトレースか ``{"inputs": ..., "outputs": ...}``。渡すことを勧める。

    Raises:
        CustomScorerError: 登録すると動かなくなる書き方をしている。
        ScorerSetupError: 割合が範囲外、サーバーが断った、など。
    """
    validate_custom_scorer(scorer, sample)
    plan = ScorerPlan(scorer=scorer, sample_rate=sample_rate, filter_string=filter_string)
    return setup_scorers(experiment_name, [plan])[0]


def validate_custom_scorer(
    scorer: Scorer, sample: Trace | Mapping[str, Any] | None = None
) -> object:
    """組み立て直しても同じ結果になることを確かめ、``sample`` への評価の値を返す。

    Args:
        scorer: ``@scorer`` を付けた関数。
        sample: 試しに採点するトレースか、``inputs``、``outputs``、``expectations``、``trace`` の
            辞書。省くと、実行せずに書き方だけを調べる。

    Raises:
        CustomScorerError: 1 行で書いた本体、外の変数や import、``sample`` での失敗など。
    """
    if not isinstance(scorer, Scorer) or scorer.kind.value != "decorator":  # pyright: ignore
        raise CustomScorerError(
            f"{getattr(scorer, 'name', scorer)!r} is not a function decorated with @scorer"
        )
    dump = _serialized(scorer)
    _check_source(scorer.name, dump)
    if sample is None:
        return None
    given = _arguments(sample)
    expected = _value(_run(scorer, given, "fails on the sample"))
    if expected is None:
        raise CustomScorerError(f"{scorer.name}: returns None on the sample, so nothing is stored")
    rebuilt = _value(_run(_rebuilt(scorer.name, dump), given, "fails when rebuilt from source"))
    if rebuilt != expected:
        raise CustomScorerError(
            f"{scorer.name}: gives {rebuilt!r} when rebuilt from source, {expected!r} here"
        )
    return expected


def _serialized(scorer: Scorer) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", scorer.model_dump())  # pyright: ignore
    except (OSError, SyntaxError, MlflowException) as error:
        raise CustomScorerError(
            f"{scorer.name}: its source code cannot be read ({error}): define it in a file"
        ) from error


def _check_source(name: str, dump: Mapping[str, Any]) -> None:
    source, function = str(dump["call_source"] or ""), str(dump["original_func_name"])
    if not source:
        raise CustomScorerError(f"{name}: has no body that can be stored (is it async?)")
    try:
        first = ast.parse("async def f():\n" + _indented(source)).body[0]
        body = cast("ast.AsyncFunctionDef", first).body
    except SyntaxError:  # 引数だけを改行し、本体を ): の後ろに続けた場合
        body = []
    if not body or (isinstance(body[0], ast.FunctionDef) and body[0].name == function):
        raise CustomScorerError(
            f"{name}: body on the def line is lost (MLflow bug): write it on lines of its own"
        )
    if outer := sorted(_outer_names(name, dump, source) - _GIVEN_NAMES):
        raise CustomScorerError(
            f"{name}: names defined outside are lost: {', '.join(outer)}; "
            "define or import them inside"
        )


def _indented(source: str) -> str:
    return "\n".join(f"    {line}" for line in source.split("\n"))


def _outer_names(name: str, dump: Mapping[str, Any], source: str) -> set[str]:
    signature = f"def scorer{dump['call_signature']}:\n"
    text = f"from __future__ import annotations\n{signature}{_indented(source)}"
    try:
        code = compile(text, name, "exec")
    except SyntaxError as error:  # 既定値が <object ...> のような、式に戻せない値
        raise CustomScorerError(
            f"{name}: its signature {dump['call_signature']} cannot be stored: {error.msg}"
        ) from error
    return set(_globals_of(code))


def _globals_of(code: CodeType) -> Iterator[str]:
    steps = list(dis.get_instructions(code))
    # 本体の中のクラスでは、そこで定義した名前も LOAD_NAME で読まれる
    defined = {str(step.argval) for step in steps if step.opname == "STORE_NAME"}
    for step in steps:
        if step.opname == "LOAD_GLOBAL" or (
            step.opname == "LOAD_NAME" and step.argval not in defined
        ):
            yield str(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)


def _arguments(sample: Trace | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(sample, Trace):
        return {"inputs": None, "outputs": None, "expectations": None, "trace": None, **sample}
    root = next((span for span in sample.data.spans if span.parent_id is None), None)
    found = [a for a in sample.info.assessments if a.expectation is not None]
    return {
        "inputs": root.inputs if root else None,
        "outputs": root.outputs if root else None,
        "expectations": {a.name: a.expectation.value for a in found if a.expectation},
        "trace": sample,
    }


def _run(scorer: Scorer, given: dict[str, Any], what: str) -> object:
    try:
        return cast("object", scorer.run(**given))  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:  # 利用者のコードなので、何が起きるか分からない
        raise CustomScorerError(f"{scorer.name}: {what}: {error!r}") from error


def _value(result: object) -> object:
    if isinstance(result, Feedback):
        return result.value
    if isinstance(result, list):
        return [_value(item) for item in cast("list[object]", result)]
    return result


def _rebuilt(name: str, dump: dict[str, Any]) -> Scorer:
    with _code_allowed():
        try:
            return Scorer.model_validate(dump)
        except MlflowException as error:
            raise CustomScorerError(f"{name}: cannot be rebuilt: {error.message}") from error


@contextmanager
def _code_allowed() -> Iterator[None]:
    """自分で書いたコードを組み立て直す間だけ、MLflow の安全装置を外す。"""
    before = os.environ.get(_ENABLE_CODE)
    os.environ[_ENABLE_CODE] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ENABLE_CODE]
        else:
            os.environ[_ENABLE_CODE] = before
