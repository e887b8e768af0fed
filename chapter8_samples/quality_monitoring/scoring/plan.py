"""8.3.5 採点の計画: どのスコアラーを、どのトレースに使い、何を採点済みとみなすか。

標本の選び方は MLflow サーバーの自動採点と同じで、同じトレースは何度でも同じ結果になる。
採点済みかどうかは、評価に残る「名前と、定義の中身」で見分ける。版の番号は、削除して登録し直すと
1 に戻り、MLflow の版は上がるので、どちらも目印にしない。
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, cast

from mlflow.entities import Assessment, Trace
from mlflow.genai.scorers import Scorer

from .judges import JudgePrice, ScoringError, assumed_cost, judge_model

FINISHED_TRACES = "status = 'OK'"  # 失敗したトレースには出力がなく、採点してもエラーになるだけ
_NAME, _VERSION = "mlflow.assessment.scorerName", "mlflow.assessment.scorerVersion"
_DEFINITION = "scoring.definition"
_PART = "scoring.part"  # スコアラーが評価を複数返したときの "1/2" など
# 判定を変えないもの、MLflow の版やプロセスごとに変わるもの
_VARYING = {
    "mlflow_version",
    "serialization_version",
    "required_columns",
    "aggregations",
    "timeout",
}


def is_sample_rate(rate: object) -> bool:
    """0 より大きく 1 以下の数か(MLflow は、真偽値や 5.0 も受け入れる)。"""
    return isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= 1


@dataclass(frozen=True, kw_only=True)
class ScoringTarget:
    """どのスコアラーを、どのトレースの何割に使うか。"""

    scorer: Scorer
    sample_rate: float = 1.0
    filter_string: str | None = FINISHED_TRACES

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ScoringError(f"scorer must be an MLflow scorer, got {self.scorer!r}")
        if not is_sample_rate(self.sample_rate):
            raise ScoringError(
                f"sample_rate of {self.name!r} must be in (0, 1], got {self.sample_rate!r}"
            )
        if self.scorer.is_session_level_scorer:
            raise ScoringError(
                f"{self.name!r} scores whole sessions, not single traces: pass the traces of the "
                "sessions to mlflow.genai.evaluate() instead"
            )

    @property
    def name(self) -> str:
        """スコアラーの名前。評価の名前でもある。"""
        return self.scorer.name


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """採点の進め方。"""

    concurrency: int = 8  # 同時に採点するトレースの数
    calls_per_second: float | None = None  # スコアラーを呼ぶ頻度の上限
    budget_usd: float | None = None  # ジャッジのコストがこれを超える見込みなら、新しく始めない
    judge_price: JudgePrice | None = None  # MLflow の価格カタログにないモデルの単価
    max_consecutive_failures: int = 10  # 続けてこれだけ失敗したスコアラーは、この実行ではやめる
    page_size: int = 100
    dry_run: bool = False  # 数えるだけで、ジャッジを呼ばず、何も書かない

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_consecutive_failures", "page_size"):
            if not getattr(self, name) >= 1:
                raise ScoringError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.calls_per_second is not None and not self.calls_per_second > 0:
            raise ScoringError(f"calls_per_second must be positive, got {self.calls_per_second}")
        if self.budget_usd is not None and not self.budget_usd >= 0:
            raise ScoringError(f"budget_usd must not be negative, got {self.budget_usd}")


@dataclass
class ScorerCounts:
    """スコアラー 1 つの結果(単位はトレース)。"""

    scored: int = 0  # 新しく採点した(dry_run では、採点することになる)
    skipped: int = 0  # 採点済みだったので飛ばした
    sampled_out: int = 0  # 標本に選ばれなかった
    failed: int = 0  # 失敗した。エラーはトレースに残り、次の実行では後回しにして採点し直す
    empty: int = 0  # 評価を返さなかった(対象になるスパンがないなど)
    not_started: int = 0  # 予算か連続失敗のために、始めなかった
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0  # コストが分からないジャッジの呼び出し
    seen_calls: int = 0  # 飛ばした評価に残っていた回数とコスト(見積もりに使う)
    seen_cost_usd: Decimal = Decimal(0)


@dataclass(kw_only=True)
class ScoringReport:
    """採点 1 回の結果。"""

    experiment_id: str
    start: datetime
    end: datetime
    dry_run: bool = False
    traces: int = 0
    seconds: float = 0.0
    scorers: dict[str, ScorerCounts] = field(default_factory=dict[str, ScorerCounts])
    elsewhere: tuple[str, ...] = ()  # サーバーや Databricks が採点する、または休止中のもの
    not_run: dict[str, str] = field(default_factory=dict[str, str])
    """採点できなかったスコアラーと、その理由(英語)。"""
    stopped_by: str | None = None
    """途中でやめた理由(``budget`` / ``failures``)。"""

    @property
    def scored(self) -> int:
        """新しく採点した数(スコアラーの合計)。"""
        return sum(counts.scored for counts in self.scorers.values())

    @property
    def skipped(self) -> int:
        """採点済みで飛ばした数。"""
        return sum(counts.skipped for counts in self.scorers.values())

    @property
    def failed(self) -> int:
        """失敗した数。"""
        return sum(counts.failed for counts in self.scorers.values())

    @property
    def cost_usd(self) -> float:
        """ジャッジのコストの合計(USD)。答えを読めなかった呼び出しは、見込みの額で数える。"""
        return float(sum(counts.cost_usd for counts in self.scorers.values()))


ProgressCallback = Callable[[ScoringReport], None]


def show_progress(report: ScoringReport) -> None:
    """``on_progress`` 用。標準エラーが端末なら、途中経過を 1 行で出す。終わったら改行する。"""
    if sys.stderr.isatty():
        done = f"scored {report.scored}, skipped {report.skipped}, failed {report.failed}"
        sys.stderr.write(f"\r{report.traces} traces: {done}" + "\n" * bool(report.seconds))
        sys.stderr.flush()


def sample(trace_id: str, targets: Sequence[ScoringTarget]) -> list[ScoringTarget]:
    """このトレースに使うスコアラー。MLflow サーバーの自動採点と同じ選び方をする。

    率の低いスコアラーは、率の高いスコアラーが選んだトレースの中から選ぶ(同じトレースに評価が
    そろうので、スコアラー同士を比べられる)。
    """
    chosen: list[ScoringTarget] = []
    previous = 1.0
    for target in sorted(targets, key=lambda t: t.sample_rate, reverse=True):
        digest = hashlib.sha256(f"{trace_id}:{target.name}".encode()).hexdigest()
        if int(digest, 16) / 2**256 > target.sample_rate / previous:
            break
        chosen.append(target)
        previous = target.sample_rate
    return chosen


def definition(scorer: Scorer) -> str:
    """スコアラーの定義の中身のハッシュ。MLflow の版、登録の有無、プロセスによらず同じになる。"""
    text = json.dumps(_content(_fields(scorer)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields(scorer: Scorer) -> dict[str, Any]:
    if scorer.kind.value != "class":
        fields = scorer.model_dump()
        built_in = fields.get("builtin_scorer_pydantic_data") or {}
        # 組み込みのジャッジの指示文と説明は、利用者の書いたものではなく、MLflow の版ごとに変わる
        ours = {key: v for key, v in built_in.items() if key not in ("instructions", "description")}
        return {**fields, "builtin_scorer_pydantic_data": ours, "description": None}
    # Scorer を継承したクラスは、MLflow では登録(model_dump)できないが、手元では採点できる
    try:
        return {**vars(scorer), "source": inspect.getsource(type(scorer))}
    except OSError:  # 対話環境で定義した
        return {**vars(scorer), "source": type(scorer).__qualname__}


def _content(value: Any) -> Any:
    """空の項目を除く(新しい版の MLflow が増やした項目は、使わなければ空である)。"""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        kept = {str(key): _content(item) for key, item in items if key not in _VARYING}
        return {key: item for key, item in kept.items() if item or item in (False, 0)}
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in cast("set[Any]", value))
    if isinstance(value, list | tuple):
        return [_content(item) for item in cast("list[Any]", value)]
    # ほかのオブジェクトは、プロセスごとに変わる文字列にしかならないので、型だけを見る
    return value if isinstance(value, str | int | float | None) else str(type(value))


def given(trace: Trace) -> dict[str, Any]:
    """スコアラーに渡す、トレースの入力、出力、人が付けた正解。"""
    root = next((span for span in trace.data.spans if span.parent_id is None), None)
    expected = {a.name: a.expectation.value for a in trace.info.assessments if a.expectation}
    answer = {"inputs": root.inputs, "outputs": root.outputs} if root else {}
    return {"inputs": None, "outputs": None, "expectations": expected, "trace": trace, **answer}


def is_error(assessment: Assessment) -> bool:
    """採点に失敗したという記録か。"""
    return assessment.feedback is not None and assessment.feedback.error is not None


@dataclass(frozen=True)
class Identity:
    """評価に残す、スコアラーの身元。"""

    name: str
    definition: str
    version: int | None = None
    registered_at_ms: int = 0

    def stamp(self, part: int, parts: int) -> dict[str, str]:
        """全部で ``parts`` 件のうちの ``part`` 件目の評価に付ける、メタデータ。"""
        found = {_NAME: self.name, _DEFINITION: self.definition, _VERSION: str(self.version or "")}
        found[_PART] = f"{part}/{parts}" if parts > 1 else ""
        return {key: value for key, value in found.items() if value}

    def verdicts(self, assessments: Sequence[Assessment]) -> list[Assessment]:
        """採点済みなら、その評価(人が訂正したものも含む)。一部しか残っていなければ空。"""
        mine = [a for a in assessments if self._wrote(a) and not is_error(a)]
        parts = {(a.metadata or {}).get(_PART, "1/1") for a in mine}
        totals = [int(part.partition("/")[2]) for part in parts]
        return mine if all(f"{i + 1}/{n}" in parts for n in totals for i in range(n)) else []

    def stale(self, assessments: Sequence[Assessment]) -> list[Assessment]:
        """採点し直す前に消すもの: 前のエラー(前の定義のものも)と、途中までの評価。"""
        mine = [a for a in assessments if (a.metadata or {}).get(_NAME) == self.name]
        partial = [a for a in mine if self._wrote(a) and _PART in (a.metadata or {})]
        return [*filter(is_error, mine), *partial]

    def failed_at_ms(self, assessments: Sequence[Assessment]) -> int:
        """最後に失敗した時刻。失敗していなければ 0。"""
        errors = [a for a in assessments if self._wrote(a) and is_error(a)]
        return max((a.create_time_ms or 0 for a in errors), default=0)

    def _wrote(self, assessment: Assessment) -> bool:
        metadata = assessment.metadata or {}
        if assessment.feedback is None or metadata.get(_NAME) != self.name:
            return False
        if _DEFINITION in metadata:
            return metadata[_DEFINITION] == self.definition
        # MLflow サーバーが書いたもの。登録より古ければ、削除した同じ名前のスコアラーのもの
        same_version = self.version is not None and metadata.get(_VERSION) == str(self.version)
        return same_version and (assessment.create_time_ms or 0) >= self.registered_at_ms


def judge_bill(
    report: ScoringReport, targets: Sequence[ScoringTarget], options: ScoringOptions
) -> tuple[int, float | None, tuple[str, ...]]:
    """ジャッジの回数、コスト(USD)、単価の分からないスコアラー。``dry_run`` では、その見積もり。"""
    calls, total, unpriced = 0, Decimal(0), list[str]()
    for target in targets:
        if judge_model(target.scorer) is None:
            continue
        counts, price = (
            report.scorers[target.name],
            assumed_cost(target.scorer, options.judge_price),
        )
        calls += counts.scored + counts.failed
        if counts.seen_calls:  # 過去の評価の平均
            price = counts.seen_cost_usd / counts.seen_calls
        if price is None if options.dry_run else counts.unpriced:
            unpriced.append(target.name)
        total += (price or 0) * counts.scored if options.dry_run else counts.cost_usd
    return calls, None if unpriced else float(total), tuple(unpriced)
