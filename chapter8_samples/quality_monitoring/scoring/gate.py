"""8.3.4 昇格の前に、候補の版がいまの版より悪くないことを確かめる。

両方の版に同じ質問(ユーザーの訂正から作ったデータセットなど)を答えさせ、同じスコアラーで採点し、合否を
質問ごとに組にして比べる。少ない質問で「差が見えない」ことを、「悪くない」とは言わない。

8.4 のロールバックの管理クラスに渡すと、悪くないと示せない版は昇格できない::

    def gate(candidate_uri):
        return compare_releases(questions, app(current_uri), app(candidate_uri), scorers)

    PromptRollbackManager("support-answer", gate=gate)

合格率の絶対値の下限だけが要るなら、MLflow 3.18 の ``evaluate(quality_criteria=...)`` で足りる
(2 つの版は比べない)。``quality_criteria`` を渡すと、候補の評価にそのまま渡す。

Databricks では、評価データセットとスコアラーをそのまま渡せる(``mlflow`` 本体が要る)。
"""

from __future__ import annotations

import inspect
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlflow
import mlflow.genai
from mlflow.entities import Trace
from mlflow.genai.scorers import Scorer

from .environment import switched_on
from .judges import require_judges
from .registry import experiment_id_for
from .verdicts import VerdictComparison, compare_verdicts

logger = logging.getLogger(__name__)

_NO_REHEARSAL = "MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION"
Answer = Callable[..., Any]
"""質問(``inputs`` の項目)をキーワード引数で受け取り、答えを返す関数。"""


@dataclass(frozen=True)
class ReleaseRun:
    """一つの版の評価。"""

    run_id: str
    verdicts: dict[str, list[bool | None]]
    """スコアラーの名前 -> 質問ごとの合否。答えられなければ不合格、採点できなければ ``None``。"""
    questions: int
    failed: int
    """答えられなかった(例外になった)質問の数。"""
    latency_p50_ms: float
    cost_usd: float | None
    """全部の質問の費用。分からないトレースが 1 件でもあれば ``None``。"""


@dataclass(frozen=True)
class ReleaseComparison:
    """2 つの版を比べた結果。真なら昇格してよい。"""

    scorers: tuple[VerdictComparison, ...]
    baseline: ReleaseRun
    candidate: ReleaseRun
    allow_unproven: bool = False

    @property
    def verdict(self) -> str:
        """いちばん悪い判定(``worse``、``not enough data``、``not worse`` の順)。"""
        found = {scorer.verdict for scorer in self.scorers}
        return next(v for v in ("worse", "not enough data", "not worse") if v in found)

    def __bool__(self) -> bool:
        return self.allow_unproven or self.verdict == "not worse"

    def __str__(self) -> str:
        lines = [str(scorer) for scorer in self.scorers]
        old, new = self.baseline, self.candidate
        lines.append(f"latency p50 {old.latency_p50_ms:.0f} -> {new.latency_p50_ms:.0f} ms")
        lines.append(f"cost {_usd(old.cost_usd)} -> {_usd(new.cost_usd)}")
        lines.append(f"failed answers {old.failed} -> {new.failed}")
        return "; ".join(lines)


def compare_releases(
    dataset: Any,
    baseline: Answer,
    candidate: Answer,
    scorers: Sequence[Any],
    *,
    margin: float = 0.10,
    allow_unproven: bool = False,
    experiment_name: str | None = None,
    quality_criteria: str | None = None,
) -> ReleaseComparison:
    """両方の版で ``dataset`` の質問に答え、合否を組にして比べる。

    必要な質問の数は ``compare_verdicts`` の表にある。同じ版でも答えが揺れるなら、表より多く要る。
    SQLite に記録するなら、環境変数 ``MLFLOW_GENAI_EVAL_MAX_WORKERS`` を 4 以下にする
    (既定の 10 では、接続が足りず、1 件ごとに 30 秒待つことがある)。

    Args:
        dataset: 質問の文字列(``question`` 引数で渡す)か ``{"inputs": ..., "expectations": ...}`` の
            リスト(``corrections_to_dataset`` の戻り値)、または MLflow の評価データセット。
        scorers: yes/no か真偽値を返す、MLflow のスコアラー。ほかの値は ``pass_if`` で合否にする。
        margin: 許す合格率の低下。
        allow_unproven: 「悪い」「データ不足」でも、警告を残して昇格を許す。
        experiment_name: 評価を記録するエクスペリメント。省略すると、いまのもの
            (本番のトレースと混ぜないために、分けるのがよい)。
        quality_criteria: MLflow 3.18 以降の ``evaluate`` に渡す、候補が満たすべき下限。

    Raises:
        ValueError: 質問かスコアラーがない、基準の版がどの質問にも答えられない、合否にできない値を
            スコアラーが返した、など。
        JudgeNotConfiguredError: ジャッジの API キーなどがない。
    """
    questions = _questions(dataset)
    _check(baseline, candidate, scorers, margin)  # 評価に費用を使う前に
    criteria = _criteria(quality_criteria)
    run: dict[str, Any] = {}
    if experiment_name is not None:
        run["experiment_id"] = experiment_id_for(experiment_name)
    old = _evaluate({**run, "run_name": "baseline"}, questions, baseline, scorers, {})
    if old.failed == old.questions:
        raise ValueError(f"the baseline answered none of the questions: see run {old.run_id}")
    new = _evaluate({**run, "run_name": "candidate"}, questions, candidate, scorers, criteria)
    compared = [
        compare_verdicts(
            verdicts, new.verdicts[name], scorer=name, margin=margin, tests=len(old.verdicts)
        )
        for name, verdicts in old.verdicts.items()
    ]
    result = ReleaseComparison(tuple(compared), old, new, allow_unproven)
    if allow_unproven and result.verdict != "not worse":
        logger.warning("an unproven release is allowed: %s", result)
    return result


def _check(baseline: object, candidate: object, scorers: Sequence[object], margin: float) -> None:
    for name, answer in (("baseline", baseline), ("candidate", candidate)):
        if not callable(answer):
            raise ValueError(f"{name} must be a function that answers a question, got {answer!r}")
    names = [scorer.name for scorer in scorers if isinstance(scorer, Scorer)]
    if not names or len(set(names)) < len(list(scorers)):
        raise ValueError(
            f"scorers must be a list of at least one scorer, with unique names, got {scorers!r}"
        )
    require_judges([scorer for scorer in scorers if isinstance(scorer, Scorer)])
    compare_verdicts([], [], margin=margin)


def _questions(dataset: Any) -> Any:
    if not isinstance(dataset, (list, tuple)):
        return dataset
    rows: dict[str, dict[str, Any]] = {}
    for given in cast("Sequence[Any]", dataset):
        row = {"inputs": {"question": given}} if isinstance(given, str) else given
        if not isinstance(row, dict) or not isinstance(row.get("inputs"), dict):
            raise ValueError(f'a question is a string or {{"inputs": {{...}}}}, got {given!r}')
        rows[repr(row["inputs"])] = dict(row)
    if not rows:
        raise ValueError("the dataset has no question; collect corrections first, or pass a list")
    if len(rows) < len(dataset):  # 同じ質問を何度答えても、証拠は増えない
        logger.warning("%d repeated questions are asked once", len(dataset) - len(rows))
    return list(rows.values())


def _criteria(quality_criteria: str | None) -> dict[str, Any]:
    if quality_criteria is None:
        return {}
    if "quality_criteria" not in inspect.signature(mlflow.genai.evaluate).parameters:
        raise ValueError(
            f"quality_criteria needs mlflow>=3.18, this is {mlflow.__version__}; "
            "leave it out, or upgrade"
        )
    return {"quality_criteria": quality_criteria}


def _evaluate(
    run: dict[str, Any],
    questions: Any,
    answer: Answer,
    scorers: Sequence[Any],
    criteria: dict[str, Any],
) -> ReleaseRun:
    traced = mlflow.trace(answer, sampling_ratio_override=1.0)
    # evaluate() は 1 件目を余分に試し、答えられない版では、評価せずに例外で終わる
    with mlflow.start_run(nested=True, **run), switched_on(_NO_REHEARSAL):
        result = mlflow.genai.evaluate(
            data=questions, predict_fn=traced, scorers=list(scorers), **criteria
        )
    rows = result.result_df
    assert rows is not None
    failed = [state == "ERROR" for state in rows["state"]]
    traces = [t if isinstance(t, Trace) else Trace.from_json(t) for t in rows["trace"]]
    return ReleaseRun(
        run_id=result.run_id,
        verdicts={scorer.name: _verdicts(rows, scorer, failed) for scorer in scorers},
        questions=len(failed),
        failed=sum(failed),
        latency_p50_ms=statistics.median(trace.info.execution_duration or 0 for trace in traces),
        cost_usd=_cost(traces),
    )


def _verdicts(rows: Any, scorer: Any, failed: list[bool]) -> list[bool | None]:
    nothing = [None] * len(rows)
    judged = [_passed(value, scorer) for value in rows.get(f"{scorer.name}/value", nothing)]
    if set(judged) == {None} and not all(failed):
        errors = rows.get(f"{scorer.name}/error_message", nothing)
        told = [error for error in errors if isinstance(error, str)]
        why = told[0] if told else f"it returns nothing named {scorer.name!r}"
        logger.warning("scorer %r judged no answer: %s", scorer.name, why)
    return [False if lost else verdict for lost, verdict in zip(failed, judged, strict=True)]


def _passed(value: Any, scorer: Any) -> bool | None:
    if value is None or value != value:  # NaN: 採点できなかった
        return None
    if scorer.pass_if:
        return bool(scorer.pass_if(value))
    if isinstance(value, str) and value.strip().lower() in ("yes", "no"):
        return value.strip().lower() == "yes"
    if str(value) in ("True", "False"):
        return str(value) == "True"
    raise ValueError(
        f"scorer {scorer.name!r} returned {value!r}, which is neither pass nor fail; "
        "return yes/no or a bool, or declare @scorer(pass_if=...)"
    )


def _cost(traces: list[Trace]) -> float | None:
    total = 0.0
    for trace in traces:
        cost = (trace.info.cost or {}).get("total_cost")
        if cost is None:
            return None
        total += cost
    return total


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"${cost:.6f}"
