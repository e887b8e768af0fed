"""8.3.5 採点の計画: どのスコアラーを、どのトレースに使い、どれを飛ばすか。

標本の選び方は MLflow サーバーの自動採点と同じで、同じトレースは何度でも同じ結果になる。
採点済みかどうかは、評価に残るスコアラーの名前と版で見分ける(名前だけでは、版を上げても採点し直せない)。

ネットワークにも保存先にも触れないので、Databricks でもどこでも同じ結果になる。
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple, cast

import mlflow
from mlflow.entities import Assessment, AssessmentError
from mlflow.genai.scorers import Scorer

FINISHED_TRACES = "status = 'OK'"  # 失敗したトレースには出力がなく、採点してもエラーになるだけ
SCORER_NAME = "mlflow.assessment.scorerName"
_SCORER_VERSION = "mlflow.assessment.scorerVersion"
_DEFINITION = "scoring.definition"
_JUDGE_COST = "mlflow.assessment.judgeCost"
_INPUT_TOKENS = "mlflow.assessment.judgeInputTokens"
_OUTPUT_TOKENS = "mlflow.assessment.judgeOutputTokens"
TOKENS_PER_CALL = (600, 60)  # 実績がないときに仮定する、ジャッジ 1 回の入力と出力
DEFAULT_JUDGE = "openai:/gpt-4.1-mini"
PROVIDER_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}


class ScoringError(Exception):
    """採点を始められない、または続けられない。"""


class JudgeNotConfiguredError(ScoringError):
    """ジャッジのモデルを呼ぶための設定が足りない。"""


class BudgetError(ScoringError):
    """予算の上限を守るための単価が分からない。"""


class JudgePrice(NamedTuple):
    """ジャッジの単価(USD / 100 万トークン)。"""

    input_usd: Decimal
    output_usd: Decimal

    def cost_usd(self, input_tokens: float, output_tokens: float) -> Decimal:
        """トークン数に対するコスト(USD)。

        >>> f"{JUDGE_PRICES[DEFAULT_JUDGE].cost_usd(600, 60):f}"
        '0.000336'
        """
        tokens = Decimal(input_tokens) * self.input_usd + Decimal(output_tokens) * self.output_usd
        return tokens / 1_000_000


JUDGE_PRICES = {
    "openai:/gpt-4.1": JudgePrice(Decimal("2.00"), Decimal("8.00")),
    "openai:/gpt-4.1-mini": JudgePrice(Decimal("0.40"), Decimal("1.60")),
    "openai:/gpt-4.1-nano": JudgePrice(Decimal("0.10"), Decimal("0.40")),
    "openai:/gpt-4o": JudgePrice(Decimal("2.50"), Decimal("10.00")),
    "openai:/gpt-4o-mini": JudgePrice(Decimal("0.15"), Decimal("0.60")),
}
"""見積もりに使う、OpenAI の公開価格(2025-04 時点)。実際のコストは MLflow が評価に記録する。"""


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

    concurrency: int = 8
    """同時に採点するトレースの数。"""
    calls_per_second: float | None = None
    """スコアラーの呼び出し頻度の上限(回 / 秒)。"""
    budget_usd: float | None = None
    """ジャッジのコストがこの額(USD)を超える見込みになったら、新しい採点を始めない。"""
    judge_price: JudgePrice | None = None
    """MLflow の価格カタログにないモデルの単価。"""
    max_consecutive_failures: int = 10
    """あるスコアラーがこの回数続けて失敗したら、そのスコアラーをやめる。"""
    page_size: int = 100
    dry_run: bool = False
    """真なら数えるだけで、ジャッジを呼ばず、何も書かない。"""

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

    scored: int = 0
    """新しく採点した。``dry_run`` では採点することになる数。"""
    skipped: int = 0
    """採点済みだったので飛ばした。"""
    sampled_out: int = 0
    """標本に選ばれなかった。"""
    failed: int = 0
    """採点に失敗した。エラーはトレースに記録され、次の実行で採点し直す。

    スパンを読めないトレースも含む(記録はせず、警告をログに出す)。
    """
    empty: int = 0
    """スコアラーが評価を返さなかった(対象になるスパンがないなど)。"""
    not_started: int = 0
    """予算か連続失敗のために、採点を始めなかった。"""
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0
    """コストが分からないジャッジ呼び出しの数。"""
    seen_calls: int = 0
    seen_cost_usd: Decimal = Decimal(0)
    """飛ばした評価に残っていた、ジャッジの回数とコスト(見積もりに使う)。"""


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
    elsewhere: tuple[str, ...] = ()
    """サーバーや Databricks が採点する、または休止中なので、ここでは採点しなかったスコアラー。"""
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
        """分かっているジャッジのコストの合計(USD)。"""
        return float(sum(counts.cost_usd for counts in self.scorers.values()))


ProgressCallback = Callable[[ScoringReport], None]


def judge_model(scorer: Scorer) -> str | None:
    """LLM ジャッジが使うモデルの URI。コードのスコアラーは ``None``。"""
    if not hasattr(scorer, "model"):
        return None
    model = cast("str | None", getattr(scorer, "model", None))
    on_databricks = mlflow.get_tracking_uri().startswith("databricks")
    default = "databricks" if on_databricks else DEFAULT_JUDGE
    return model or os.environ.get("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL") or default


def missing_for(model: str) -> str | None:
    """ジャッジのモデルを呼ぶのに足りないもの(英語 1 文)。足りていれば ``None``。"""
    provider = model.partition(":")[0]
    key = PROVIDER_KEYS.get(provider)
    if key and not os.environ.get(key):
        return f"set {key} (and OPENAI_BASE_URL for a compatible server) to call {model}"
    if provider == "gateway" and not mlflow.get_tracking_uri().startswith("http"):
        return f"{model} needs an MLflow server: set MLFLOW_TRACKING_URI=http://..."
    return None


def require_judges(scorers: Sequence[Scorer]) -> None:
    """ジャッジを呼べる設定があることを確かめる。なければ ``JudgeNotConfiguredError``。"""
    for scorer in scorers:
        model = judge_model(scorer)
        reason = missing_for(model) if model else None
        if reason:
            raise JudgeNotConfiguredError(f"scorer {scorer.name!r} cannot run: {reason}")


def sample(trace_id: str, targets: Sequence[ScoringTarget]) -> list[ScoringTarget]:
    """このトレースに使うスコアラー。MLflow サーバーの自動採点と同じ選び方をする。

    同じトレースは何度でも同じ結果になる。率の低いスコアラーは、率の高いスコアラーが選んだ
    トレースの中から選ぶ(同じトレースに評価がそろうので、スコアラー同士を比べられる)。

    >>> from mlflow.genai.scorers import Safety
    >>> rates = {"safety": 1.0, "tone": 0.5, "fluency": 0.25}
    >>> targets = [ScoringTarget(scorer=Safety(name=n), sample_rate=r) for n, r in rates.items()]
    >>> picks = [{t.name for t in sample(f"tr-{i:032x}", targets)} for i in range(1000)]
    >>> {name: sum(name in pick for pick in picks) for name in rates}
    {'safety': 1000, 'tone': 490, 'fluency': 244}
    >>> all("tone" in pick for pick in picks if "fluency" in pick)
    True
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


def identity(scorer: Scorer) -> dict[str, str]:
    """評価に残す、スコアラーの身元。登録済みなら名前と版、未登録なら名前と定義のハッシュ。"""
    if scorer.scorer_version is not None:
        return {SCORER_NAME: scorer.name, _SCORER_VERSION: str(scorer.scorer_version)}
    text = json.dumps(definition(scorer), sort_keys=True, default=str)
    return {SCORER_NAME: scorer.name, _DEFINITION: hashlib.sha256(text.encode()).hexdigest()[:16]}


def definition(scorer: Scorer) -> dict[str, Any]:
    """スコアラーの定義。MLflow の版やプロセスごとの違いは除く。"""
    return _stable(_definition(scorer))


def _definition(scorer: Scorer) -> dict[str, Any]:
    if scorer.kind.value != "class":
        return scorer.model_dump()
    # Scorer を継承したクラスは、MLflow では登録(model_dump)できないが、手元では採点できる
    try:
        source = inspect.getsource(type(scorer))
    except OSError:  # 対話環境で定義した
        source = type(scorer).__qualname__
    plain = {key: v for key, v in vars(scorer).items() if isinstance(v, str | int | float)}
    return {"source": source, **plain}


def _stable(value: Any) -> Any:
    """定義のうち、MLflow の版やプロセスごとに変わる集合の並び順を除いたもの。"""
    if isinstance(value, list):
        return [_stable(item) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value).items()
    kept = {key: _stable(item) for key, item in items if key != "mlflow_version"}
    if isinstance(columns := kept.get("required_columns"), list):
        kept["required_columns"] = sorted(cast("list[str]", columns))
    return kept


def error_of(assessment: Assessment) -> AssessmentError | None:
    return assessment.feedback.error if assessment.feedback else None


def scored_by(assessments: Sequence[Assessment], scorer_id: dict[str, str]) -> list[Assessment]:
    """この版のスコアラーが残した評価。人が訂正した(無効になった)評価も採点済みとみなす。"""
    wanted = scorer_id.items()
    return [
        a
        for a in assessments
        if a.feedback is not None and error_of(a) is None and wanted <= (a.metadata or {}).items()
    ]


def show_progress(report: ScoringReport) -> None:
    """``on_progress`` 用。標準エラーが端末なら、途中経過を 1 行で出す。終わったら改行する。"""
    if sys.stderr.isatty():
        done = f"scored {report.scored}, skipped {report.skipped}, failed {report.failed}"
        end = "\n" if report.seconds else ""
        sys.stderr.write(f"\r{report.traces} traces: {done}{end}")
        sys.stderr.flush()


def judge_cost(feedback: Assessment, price: JudgePrice | None) -> Decimal | None:
    metadata = feedback.metadata or {}
    if price and _INPUT_TOKENS in metadata:
        tokens = (float(metadata.get(key, 0)) for key in (_INPUT_TOKENS, _OUTPUT_TOKENS))
        return price.cost_usd(*tokens)
    return Decimal(str(metadata[_JUDGE_COST])) if _JUDGE_COST in metadata else None


def judge_bill(
    report: ScoringReport, targets: Sequence[ScoringTarget], options: ScoringOptions
) -> tuple[int, float | None, tuple[str, ...]]:
    """ジャッジの回数、コスト(USD)、単価の分からないスコアラー。``dry_run`` では、その見積もり。"""
    judges = [target for target in targets if judge_model(target.scorer) is not None]
    counts = {target.name: report.scorers[target.name] for target in judges}
    calls = sum(count.scored for count in counts.values())
    if not options.dry_run:
        unpriced = tuple(name for name, count in counts.items() if count.unpriced)
        return calls, None if unpriced else report.cost_usd, unpriced
    prices = {t.name: _price_per_call(t, counts[t.name], options.judge_price) for t in judges}
    unpriced = tuple(name for name, price in prices.items() if price is None)
    total = sum((price or 0) * counts[name].scored for name, price in prices.items())
    return calls, None if unpriced else float(total), unpriced


def _price_per_call(
    target: ScoringTarget, counts: ScorerCounts, price: JudgePrice | None
) -> Decimal | None:
    """ジャッジ 1 回のコスト(USD): 過去の評価の平均、なければ単価と仮のトークン数から。"""
    if counts.seen_calls:
        return counts.seen_cost_usd / counts.seen_calls
    price = price or JUDGE_PRICES.get(judge_model(target.scorer) or "")
    return price.cost_usd(*TOKENS_PER_CALL) if price else None
