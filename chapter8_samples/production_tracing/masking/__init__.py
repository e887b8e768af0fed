"""8.1 個人情報のマスキング(トレースに個人情報を残さない)。"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from .patterns import DEFAULT_PATTERNS, Pattern, luhn, my_number
from .spans import rewrite
from .text import Pass

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

__all__ = ["DEFAULT_PATTERNS", "Pattern", "PiiMasker", "luhn", "mask_pii", "my_number"]

logger = logging.getLogger(__name__)


class PiiMasker:
    """``mlflow.tracing.configure(span_processors=[...])`` に渡す、個人情報を隠す関数。"""

    __name__ = "mask_pii"  # MLflow が警告に使う

    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        """``patterns`` は、隠す順に並べたもの。"""
        for pattern in patterns:
            if not isinstance(pattern, Pattern):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"{pattern!r} is not a Pattern; write "
                    "mask_pii(Pattern('MEMBER_ID', re.compile(r'M-[0-9]{8}')))"
                )
        self._patterns = patterns
        self.masked: Counter[str] = Counter()
        """種類ごとの、隠した件数。"""
        self.failures = 0
        """隠す処理が失敗した件数。そのスパンの中身は、すべて消している。"""

    def __eq__(self, other: object) -> bool:
        """同じ規則なら等しい(``setup_production_tracing`` の 2 回目が同じ設定だと分かる)。"""
        return isinstance(other, PiiMasker) and self._patterns == other._patterns

    def __hash__(self) -> int:
        """``__eq__`` と合わせる。"""
        return hash(self._patterns)

    def __call__(self, span: LiveSpan) -> None:
        """終わりかけのスパンと、そのトレースのタグ・メタデータ・プレビュー・評価を隠す。"""
        try:
            rewrite(span, self._pass().value)
        except Exception as error:  # 隠せないまま送るより、中身を捨てる
            self.failures += 1
            # 例外の文面にも個人情報が入りうるので、種類だけを書く
            logger.error("masking failed (%s); the span content is removed", type(error).__name__)
            rewrite(span, lambda _value: "[MASKING FAILED]")

    def text(self, value: str) -> str:
        """文字列の中の個人情報を ``[EMAIL]`` などに置き換える。"""
        return self._pass().text(value)

    def value(self, value: Any) -> Any:
        """辞書やリストの中の文字列まで隠した写しを返す(辞書のキーも含む)。"""
        return self._pass().value(value)

    def _pass(self) -> Pass:
        return Pass(self._patterns, self.masked)


def mask_pii(*extra: Pattern, patterns: tuple[Pattern, ...] = DEFAULT_PATTERNS) -> PiiMasker:
    """個人情報を隠す関数を作る。

    ``setup_production_tracing(..., span_processors=[mask_pii()])`` のように使う。文字列だけを
    隠すこともできる(MLflow は読み込まない)。

    >>> mask_pii().text("taro@example.jp の注文を 090-1234-5678 に確認")
    '[EMAIL] の注文を [PHONE] に確認'

    Args:
        extra: 自社の会員番号など、既定に加えるもの。
        patterns: 既定の代わりに使うもの。

    Raises:
        TypeError: ``Pattern`` でないもの。
    """
    return PiiMasker((*extra, *patterns))
