"""8.1 個人情報のマスキング(トレースに個人情報を残さない)。

スパンの終わりに、例外の文面・スタックトレース・ストリーミングの断片・属性・タグ・プレビュー・開いて
いる間の評価まで、すべての場所を調べて置き換える。断片("090"、"-12")は、つないだ文の中で探す
(会話の 1 件ずつは、つながない)。

書き方 12 通り x 入れ物 6 通りの 1800 件で、見落とし 0 件。無害な番号 12 種類の 2400 件で、誤り 0 件
(日付・時刻・ISBN・型番・追跡番号・金額・ハッシュなど)。名前のない乱数は、検査数字や形が偶然に合う
ものを隠す: 12 桁の 10.1%、4-4-4 桁の 9.6%、16 桁の 3.1%、10 桁の 7.7%、名前も区切りもない 0 で
始まる ISBN-10 の約 2 割(同じ形の電話番号がある)。漏らすより隠すほうを選ぶ。
"注文番号"・"ISBN" などの語の直後の番号と、日時に読める 12 桁(個人番号の約 0.3%)は隠さない。

時間は長さに比例し、リクエストのスレッドで 100 万文字あたり約 0.2 秒、個人情報ばかりの文で約 1 秒
(``python tests/benchmarks/masking_cost.py``)。Databricks でも同じ。住所や氏名、スパンの名前と
リンク、終わった後のタグと評価、1 つの文字列の中に並べた断片(SSE の行など)、HTML のタグで切れた
番号、"password: hunter" のような数字のない値、["X-Api-Key", "..."] のような組の値は隠せない。
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .patterns import DEFAULT_PATTERNS, Pattern
from .spans import rewrite
from .text import Pass

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

__all__ = ["Pattern", "PiiMasker", "mask_pii"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)  # 同じ規則なら等しい。2 回目の setup が同じ設定だと分かる
class PiiMasker:
    """``mlflow.tracing.configure(span_processors=[...])`` に渡す、個人情報を隠す関数。"""

    patterns: tuple[Pattern, ...]
    __name__ = "mask_pii"  # MLflow が警告に使う

    def __call__(self, span: LiveSpan) -> None:
        """終わりかけのスパンと、そのトレースのタグ・メタデータ・プレビュー・評価を隠す。"""
        try:
            rewrite(span, Pass(self.patterns).value)
        except Exception as error:  # 隠せないまま送るより、中身を捨てる
            # 例外の文面にも個人情報が入りうるので、種類だけを書く
            logger.error("masking failed (%s); the span content is removed", type(error).__name__)
            rewrite(span, lambda _value, _key="": "[MASKING FAILED]")

    def text(self, value: str) -> str:
        """文字列の中の個人情報を ``[EMAIL]`` などに置き換える(MLflow は読み込まない)。"""
        return Pass(self.patterns).text(value)

    def value(self, value: Any) -> Any:
        """辞書やリストの中の文字列まで隠したコピーを返す(辞書のキーも含む)。"""
        return Pass(self.patterns).value(value)


def mask_pii(*extra: Pattern) -> PiiMasker:
    """個人情報を隠す関数を作る(``setup_production_tracing(span_processors=[mask_pii()])``)。

    >>> mask_pii().text("taro@example.jp の注文を 090-1234-5678 に確認")
    '[EMAIL] の注文を [PHONE] に確認'

    Args:
        extra: 自社の会員番号など、既定のものに加えて隠すもの。
    """
    for one in extra:
        if not isinstance(one, Pattern):  # pyright: ignore[reportUnnecessaryIsInstance]
            example = "mask_pii(Pattern('MEMBER_ID', re.compile(r'M-[0-9]{8}')))"
            raise TypeError(f"{one!r} is not a Pattern; write {example}")
    return PiiMasker((*extra, *DEFAULT_PATTERNS))
