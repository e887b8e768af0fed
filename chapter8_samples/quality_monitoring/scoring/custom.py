"""8.3.4 コードのスコアラーを、登録する前に確かめる。

``@scorer`` の関数は、ソースコードの文字列として登録され、採点する場所で組み立て直される。外の変数や
import は付いていかず、1 行で書いた関数は何も返さなくなる(3.18 で直った)。登録は成功し、採点のときに
初めて壊れる。

Databricks では登録され、Databricks の上で実行される。OSS 版では登録せず(既定のサーバーは拒否する)、
``run_scoring_cycle()`` が手元で採点する。MLflow 3.18 からは、サーバーの運用者が選べば
(``MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS=true`` と
``MLFLOW_JOB_CUSTOM_SCORER_EXECUTOR_BACKEND=docker``)、サーバーもコンテナーの中で採点できる(試験的)。
"""

from __future__ import annotations

import builtins
import re
import symtable
import textwrap
from collections.abc import Mapping
from typing import Any, cast

from mlflow.entities import Feedback, Trace
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer

from .environment import switched_on
from .judges import ScorerSetupError
from .judging import given
from .plan import FINISHED_TRACES, ScorerPlan
from .registry import ScorerStatus, setup_scorers

_ENABLE_CODE = "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS"
# 組み立て直すときに MLflow が用意する名前
_GIVEN_NAMES = {
    *dir(builtins),
    "__module__",
    "__qualname__",
    "Assessment",
    "AssessmentError",
    "AssessmentSource",
    "AssessmentSourceType",
    "CategoricalRating",
    "Feedback",
    "Trace",
    "mlflow",
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
    """コードのスコアラー(``@scorer`` の関数)を、確かめてから登録し、開始する。

    ``sample`` は、試しに採点するトレースか ``{"inputs": ..., "outputs": ...}``。渡すことを勧める。

    Raises:
        CustomScorerError: 登録すると動かなくなる書き方をしている。
        ScorerSetupError: 割合が範囲外、サーバーが拒否した、など。
    """
    validate_custom_scorer(scorer, sample)
    plan = ScorerPlan(scorer=scorer, sample_rate=sample_rate, filter_string=filter_string)
    return setup_scorers(experiment_name, [plan])[0]


def validate_custom_scorer(
    scorer: Scorer, sample: Trace | Mapping[str, Any] | None = None
) -> object:
    """組み立て直しても同じ結果になることを確かめ、``sample`` への評価の値を返す。

    ``sample`` を省くと、実行せずに書き方だけを調べる。

    Raises:
        CustomScorerError: 1 行で書いた本体、外の変数や import、``sample`` での失敗など。
    """
    name = getattr(scorer, "name", repr(scorer))
    if not isinstance(scorer, Scorer) or scorer.kind.value != "decorator":  # pyright: ignore
        raise CustomScorerError(f"{name!r} is not a function decorated with @scorer")
    try:
        dump = cast("dict[str, Any]", scorer.model_dump())  # pyright: ignore
    except (OSError, SyntaxError, MlflowException) as error:
        raise CustomScorerError(
            f"{name}: its source code cannot be read ({error}): define it in a file"
        ) from error
    _check_source(name, dump)
    if sample is None:
        return None
    expected = _value_on(scorer, sample, "fails on the sample")
    if expected is None:
        raise CustomScorerError(f"{name}: returns None on the sample, so nothing is stored")
    with switched_on(_ENABLE_CODE):  # 自分で書いたコードなので、安全装置を外してよい
        try:
            rebuilt = Scorer.model_validate(dump)
        except MlflowException as error:
            raise CustomScorerError(f"{name}: cannot be rebuilt: {error.message}") from error
    value = _value_on(rebuilt, sample, "fails when rebuilt from source")
    if value != expected:
        raise CustomScorerError(
            f"{name}: gives {value!r} when rebuilt from source, {expected!r} here"
        )
    return expected


def _check_source(name: str, dump: Mapping[str, Any]) -> None:
    source, signature = str(dump["call_source"] or ""), str(dump["call_signature"])
    if not source:
        raise CustomScorerError(f"{name}: has no body that can be stored (is it async?)")
    if re.match(rf"\s*def\s+{dump['original_func_name']}\b", source):
        raise CustomScorerError(
            f"{name}: body on the def line is lost before MLflow 3.18: write it on its own lines"
        )
    body = textwrap.indent(source, "    ")
    text = f"from __future__ import annotations\ndef scorer{signature}:\n{body}"
    try:
        outer = sorted(_outer_names(symtable.symtable(text, name, "exec")) - _GIVEN_NAMES)
    except SyntaxError as error:  # 既定値が <object ...> である、本体が引数の行の続きにある、など
        raise CustomScorerError(
            f"{name}: cannot be rebuilt ({error.msg}): write the body below the def line, and "
            f"plain default values in the signature {signature}"
        ) from error
    if outer:
        raise CustomScorerError(
            f"{name}: names defined outside are lost: {', '.join(outer)}; "
            "define or import them inside"
        )


def _outer_names(scope: symtable.SymbolTable) -> set[str]:
    """この範囲と、その内側の関数やクラスが、外から読む名前。"""
    symbols = scope.get_symbols()
    found = {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}
    for inner in scope.get_children():
        found |= _outer_names(inner)
    return found


def _value_on(scorer: Scorer, sample: Trace | Mapping[str, Any], what: str) -> object:
    empty = dict.fromkeys(("inputs", "outputs", "expectations", "trace"))
    arguments = given(sample) if isinstance(sample, Trace) else {**empty, **sample}
    try:
        return _value(cast("object", scorer.run(**arguments)))  # pyright: ignore
    except Exception as error:  # 利用者のコードなので、何が起きるか分からない
        raise CustomScorerError(f"{scorer.name}: {what}: {error!r}") from error


def _value(result: object) -> object:
    if isinstance(result, list):
        return [_value(item) for item in cast("list[object]", result)]
    return result.value if isinstance(result, Feedback) else result
