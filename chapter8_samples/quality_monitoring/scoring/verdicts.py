"""8.3.4 同じ質問への 2 つの版の合否を比べる(標準ライブラリーだけで動く)。

合格率の差は、質問ごとに組にして見る。両方が合格した質問と、両方が不合格だった質問は、どちらが悪いかを
語らない。差の区間は Tango (1998) のスコア法に、McNemar 検定と同じ連続性の補正を加えたもので、
上限が 0 を下回るのは、片側 5% の McNemar 検定が「悪い」と言うときに等しい。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Verdict = Literal["not worse", "worse", "not enough data"]
ERROR_RATE = 0.05
"""悪くない候補を「悪い」と言う割合と、``margin`` だけ悪い候補を「悪くない」と言う割合の上限。"""


@dataclass(frozen=True)
class VerdictComparison:
    """一つのスコアラーで比べた結果。率と差は 0 から 1、差は候補から基準を引いたもの。"""

    scorer: str
    verdict: Verdict
    pairs: int
    """両方の版の合否がそろった質問の数。"""
    unjudged: int
    """どちらかの版を採点できなかった質問の数。"""
    baseline_rate: float | None
    candidate_rate: float | None
    difference: float | None
    lower: float
    upper: float
    margin: float

    def __str__(self) -> str:
        if self.difference is None:
            return f"{self.scorer}: {self.verdict} (no pair was judged)"
        return (
            f"{self.scorer}: {self.verdict} ({self.baseline_rate:.0%} -> {self.candidate_rate:.0%}"
            f" on {self.pairs} questions, difference {self.lower:+.1%} to {self.upper:+.1%},"
            f" margin {self.margin:.0%})"
        )


def compare_verdicts(
    baseline: Sequence[bool | None],
    candidate: Sequence[bool | None],
    *,
    scorer: str = "quality",
    margin: float = 0.10,
    tests: int = 1,
) -> VerdictComparison:
    """同じ質問の合否(``None`` は採点できなかった)を、組にして比べる。

    - ``not worse``: 差の区間が ``-margin`` より上にある
    - ``worse``: 差の区間が 0 より下にある
    - ``not enough data``: どちらとも言えない

    片方の版だけを採点できなかった質問は、``lower`` では候補だけが不合格、``upper`` では候補だけが
    合格だったとみなす(採点できない答えを返す候補を、「悪くない」と言わない)。

    「悪くない」を 80% の確率で示せる質問の数(``margin=0.10``、2 つの版は同じ合格率)::

        基準の合格率         98%   95%   90%   80%   70%
        合否が独立            65    95   135   220   275
        9 割の質問で必ず一致  45    50    60    65    65

    Args:
        margin: 許す合格率の低下(0 と 1 の間)。
        tests: 同時に比べるスコアラーの数。「悪い」の誤りを、合わせて 5% に抑える。

    Raises:
        ValueError: 数がそろっていない、``margin`` が範囲の外。
    """
    if len(baseline) != len(candidate):
        raise ValueError(
            f"verdicts must pair up, got {len(baseline)} of the baseline and "
            f"{len(candidate)} of the candidate"
        )
    if not isinstance(margin, float) or not 0 < margin < 1:  # pyright: ignore
        raise ValueError(f"margin must lie between 0 and 1 (0.10 is ten points), got {margin!r}")
    both = list(zip(baseline, candidate, strict=True))
    pairs = [(old, new) for old, new in both if old is not None and new is not None]
    lost = sum(old and not new for old, new in pairs)
    gained = sum(new and not old for old, new in pairs)
    half = sum((old is None) != (new is None) for old, new in both)  # 片方だけを採点できた
    asked = len(pairs) + half
    lower = -_most_lost(lost + half, gained, asked, ERROR_RATE)
    upper = _most_lost(gained + half, lost, asked, ERROR_RATE / tests)
    return VerdictComparison(
        scorer=scorer,
        verdict=_verdict(lower, upper, margin),
        pairs=len(pairs),
        unjudged=len(baseline) - len(pairs),
        baseline_rate=_rate([old for old, _ in pairs]),
        candidate_rate=_rate([new for _, new in pairs]),
        difference=(gained - lost) / len(pairs) if pairs else None,
        lower=lower,
        upper=upper,
        margin=margin,
    )


def _verdict(lower: float, upper: float, margin: float) -> Verdict:
    if lower > -margin:
        return "not worse"
    return "worse" if upper < 0 else "not enough data"


def _rate(verdicts: Sequence[bool]) -> float | None:
    return sum(verdicts) / len(verdicts) if verdicts else None


def _most_lost(lost: int, gained: int, pairs: int, error_rate: float) -> float:
    """失った割合から得た割合を引いた差の、片側の上限(-1 から 1)。"""
    if pairs == 0:
        return 1.0
    limit = NormalDist().inv_cdf(1 - error_rate)
    return _root(lambda difference: _score(lost, gained, pairs, difference) + limit)


def _score(lost: int, gained: int, pairs: int, difference: float) -> float:
    """差が ``difference`` だとしたときの、観測した差の標準得点(連続性の補正をしたもの)。"""
    a = 2 * pairs
    b = (2 * pairs - lost + gained) * difference - lost - gained
    c = -gained * difference * (1 - difference)
    gain_rate = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = pairs * (2 * gain_rate + difference * (1 - difference))
    observed = lost - gained - pairs * difference + 1  # 1 は連続性の補正
    return observed / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, observed)


def _root(decreasing: Callable[[float], float]) -> float:
    """区間 [-1, 1] で、減っていく関数が 0 になるところ(二分法)。"""
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle
    return high
