"""8.3.4 LLM ジャッジのモデル、足りない設定、コスト。"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple, cast

import mlflow
from mlflow.entities import Feedback
from mlflow.genai.scorers import Scorer

from .._internals import forget_model_costs

DEFAULT_JUDGE = "openai:/gpt-4.1-mini"
PROVIDER_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}
_COST = "mlflow.assessment.judgeCost"
_TOKENS = ("mlflow.assessment.judgeInputTokens", "mlflow.assessment.judgeOutputTokens")
TOKENS_PER_CALL = (600, 60)  # 実績がないときに仮定する、ジャッジ 1 回の入力と出力


class ScoringError(Exception):
    """採点を始められない、または続けられない。"""


class ScorerSetupError(ScoringError):
    """スコアラーを登録・開始できない。"""


class JudgeNotConfiguredError(ScoringError):
    """ジャッジのモデルを呼ぶための設定が足りない。"""


class BudgetError(ScoringError):
    """予算の上限を守るための単価が分からない。"""


class JudgePrice(NamedTuple):
    """ジャッジの単価(USD / 100 万トークン)。"""

    input_usd: Decimal
    output_usd: Decimal

    def cost_usd(self, input_tokens: float, output_tokens: float) -> Decimal:
        """トークン数に対するコスト(USD)。"""
        tokens = Decimal(input_tokens) * self.input_usd + Decimal(output_tokens) * self.output_usd
        return tokens / 1_000_000


JUDGE_PRICES = {  # 見積もりに使う、OpenAI の公開価格(2025-04 時点)
    "openai:/gpt-4.1": JudgePrice(Decimal("2.00"), Decimal("8.00")),
    "openai:/gpt-4.1-mini": JudgePrice(Decimal("0.40"), Decimal("1.60")),
    "openai:/gpt-4.1-nano": JudgePrice(Decimal("0.10"), Decimal("0.40")),
    "openai:/gpt-4o": JudgePrice(Decimal("2.50"), Decimal("10.00")),
    "openai:/gpt-4o-mini": JudgePrice(Decimal("0.15"), Decimal("0.60")),
}


def judge_model(scorer: Scorer) -> str | None:
    """LLM ジャッジが使うモデルの URI。コードのスコアラーは ``None``。"""
    if not hasattr(scorer, "model"):
        return None
    model = cast("str | None", getattr(scorer, "model", None))
    on_databricks = mlflow.get_tracking_uri().startswith("databricks")
    default = "databricks" if on_databricks else DEFAULT_JUDGE
    return model or os.environ.get("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL") or default


def malformed(model: str | None) -> str | None:
    """モデルの書き方の誤り(英語 1 文)。正しければ ``None``。"""
    if model is None or model == "databricks" or re.fullmatch(r"[\w.-]+:/\S+", model):
        return None
    return f"judge model {model!r} has no provider: write it like {DEFAULT_JUDGE!r}"


def require_judges(scorers: Sequence[Scorer]) -> None:
    """ジャッジを呼べる設定があることを確かめる。なければ ``JudgeNotConfiguredError``。"""
    for scorer in scorers:
        model = judge_model(scorer)
        if model and (reason := malformed(model) or missing_for(model)):
            raise JudgeNotConfiguredError(f"scorer {scorer.name!r} cannot run: {reason}")


def missing_for(model: str) -> str | None:
    """モデルを呼ぶのに足りないもの(英語 1 文)。足りていれば ``None``。"""
    provider = model.partition(":")[0]
    key = PROVIDER_KEYS.get(provider)
    if key and not os.environ.get(key):
        return f"set {key} (and OPENAI_BASE_URL for a compatible server) to call {model}"
    if provider == "gateway" and not mlflow.get_tracking_uri().startswith("http"):
        return f"{model} needs an MLflow server: set MLFLOW_TRACKING_URI=http://..."
    return None


def call_cost(
    scorer: Scorer, feedbacks: Sequence[Feedback], price: JudgePrice | None
) -> Decimal | None:
    """スコアラーを 1 回呼んだコスト(USD)。``price`` があれば、トークン数から計算する。

    答えを読めなかった呼び出しにも、プロバイダーは課金するので、見込みの額で数える。
    """
    if judge_model(scorer) is None or not feedbacks:
        return Decimal(0)
    costs: list[Decimal] = []
    for metadata in (feedback.metadata or {} for feedback in feedbacks):
        if price and _TOKENS[0] in metadata:
            costs.append(price.cost_usd(*(float(metadata.get(key, 0)) for key in _TOKENS)))
        elif _COST in metadata:
            costs.append(Decimal(str(metadata[_COST])))
    if costs:
        return sum(costs, Decimal(0))
    if any(feedback.error for feedback in feedbacks):
        return assumed_cost(scorer, price)
    forget_model_costs()  # 新しいモデルは、後からカタログに載る
    return None


def assumed_cost(scorer: Scorer, price: JudgePrice | None) -> Decimal | None:
    """実績がないときの、ジャッジ 1 回のコスト(USD)。単価が分からなければ ``None``。"""
    price = price or JUDGE_PRICES.get(judge_model(scorer) or "")
    return price.cost_usd(*TOKENS_PER_CALL) if price else None


class Budget:
    """並列に呼んでも予算を超えないように、呼ぶ前に見込みのコスト(これまでの最大)を確保する。"""

    def __init__(self, limit_usd: float | None) -> None:
        self._limit = Decimal(str(limit_usd)) if limit_usd is not None else None
        self._committed = Decimal(0)
        self._largest: dict[str, Decimal] = {}
        self._probing: set[str] = set()
        self._changed = threading.Condition()

    def reserve(self, name: str) -> Decimal | None:
        """確保した額(USD)。足りなければ ``None``。コストの分からない最初の 1 回は 1 件ずつ。"""
        if self._limit is None:
            return Decimal(0)
        with self._changed:
            self._changed.wait_for(lambda: name not in self._probing)
            expected = self._largest.get(name, Decimal(0))
            if self._committed >= self._limit or self._committed + expected > self._limit:
                return None
            if name not in self._largest:
                self._probing.add(name)
            self._committed += expected
            return expected

    def settle(self, name: str, expected: Decimal, cost: Decimal) -> None:
        """確保した額を、実際のコストに直す。"""
        with self._changed:
            self._committed += cost - expected
            self._largest[name] = max(self._largest.get(name, Decimal(0)), cost)
            self._probing.discard(name)
            self._changed.notify_all()
