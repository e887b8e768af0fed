"""8.1 個人情報のマスキング(トレースに個人情報を残さない)。"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from mlflow.entities import LiveSpan
logger = logging.getLogger(__name__)

@dataclass(frozen=True)
class Pattern:
    """1 種類の個人情報。``valid`` は、形が合っても本物でないものを除く。"""
    label: str
    regex: re.Pattern[str]
    valid: Callable[[str], bool] = lambda _digits: True

def luhn(text: str) -> bool:
    """カード番号の検査数字(Luhn)。

    >>> luhn("4111 1111 1111 1111"), luhn("4111 1111 1111 1112")
    (True, False)
    """

def my_number(text: str) -> bool:
    """個人番号(マイナンバー、12 桁)の検査数字。総務省令第 85 号第 5 条の式による。

    >>> my_number("1234 5678 9018"), my_number("123456789012")
    (True, False)
    """

def _card(text: str) -> bool:
    """発行会社の番号で始まり、Luhn に合うか(時刻や注文番号を隠さないため)。"""

def _phone(text: str) -> bool:
    """数字の区切りが電話番号として多すぎないか("01 15 22 31 40" や日時を隠さないため)。"""
_START = '(?:(?<![0-9A-Za-z])|(?<=\\\\[nrt])|(?<=\\\\u[0-9a-fA-F]{4}))'
_PHONE_START = f'(?:{_START}|(?<=(?i:tel|fax)))(?!(?<=\\d{{4}}[- ])\\d\\d[- ]\\d\\d\\D)'
_SEP = '[-() ]{0,3}'
_LOCAL_PART = '(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+'
_API_KEYS = ('sk-(?:proj-|ant-)?[A-Za-z0-9_-]{16,}', 'dapi[0-9a-f]{32}', 'A[KS]IA[0-9A-Z]{16}', '(?i:secret_?access_?key)\\W{1,5}[A-Za-z0-9/+]{40}', '(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{30,}', 'glpat-[A-Za-z0-9_-]{20,}', 'hf_[A-Za-z0-9]{30,}', '[rs]k_(?:live|test)_[A-Za-z0-9]{16,}', '(?:xox[abeprs]|xapp)-[A-Za-z0-9-]{10,}', 'hooks\\.slack\\.com/services/[A-Za-z0-9/]{20,}', 'AIza[A-Za-z0-9_-]{30,}|ya29\\.[A-Za-z0-9_-]{20,}', '(?:xai|pplx|nvapi)-[A-Za-z0-9_-]{20,}', '(?:gsk|r8)_[A-Za-z0-9]{20,}', 'lsv2_[a-z]{2}_[A-Za-z0-9_]{20,}', '(?i:(?:x-)?api[-_]?key|accountkey)\\W{0,4}[:=]\\W{0,4}[A-Za-z0-9/+_-]{20,}={0,2}', 'eyJ[A-Za-z0-9_-]{8,}\\.[A-Za-z0-9_-]{8,}\\.[A-Za-z0-9_-]{8,}', '(?i:bearer)\\s+[A-Za-z0-9._~+/-]{16,}=*', '(?i:authorization)\\W{1,5}(?i:basic)\\s+[A-Za-z0-9+/]{8,}=*')
_CARDS = ('\\d{4}[ -]{0,3}\\d{4}[ -]{0,3}\\d{4}[ -]{0,3}\\d{4}', '3\\d{3}[ -]{0,3}\\d{6}[ -]{0,3}\\d{4,5}', '\\d{14,19}')
_PHONES = (f'0[5-9]0(?:{_SEP}\\d){{8}}', f'0[1-9](?:{_SEP}\\d){{8}}', '(?:0[5-9]0\\.\\d{4}|0[1-9]\\.\\d{4}|0[1-9]\\d\\.\\d{3})\\.\\d{4}', f'(?:\\+|00)81{_SEP}0?{_SEP}(?:[5-9]0(?:{_SEP}\\d){{8}}|[1-9](?:{_SEP}\\d){{8}})', '\\+81\\.(?:[5-9]0\\.\\d{4}|[1-9]\\.\\d{4}|[1-9]\\d\\.\\d{3})\\.\\d{4}')

def _whole(*choices: str, start: str=_START) -> re.Pattern[str]:
    """前後に英数字が続かない(もっと長い番号の一部や小数、UUID ではない)もの。"""
DEFAULT_PATTERNS: tuple[Pattern, ...] = (Pattern('PASSWORD', re.compile('(?<=://)[^\\s/:@"\'<>,]*:[^\\s/@"\'<>,]+(?=@)')), Pattern('API_KEY', re.compile(f"{_START}(?:{'|'.join(_API_KEYS)})")), Pattern('EMAIL', re.compile(f'{_LOCAL_PART}(?:@|%40)(?:[\\w-]+\\.)+[A-Za-z]{{2,}}')), Pattern('CARD', _whole('\\d{4}(?:[ -]\\d{4}){3}[ -]\\d{3}'), _card), Pattern('CARD', _whole(*_CARDS), _card), Pattern('MY_NUMBER', _whole('\\d{4}[ -]{0,3}\\d{4}[ -]{0,3}\\d{4}'), my_number), Pattern('PHONE', _whole(*(f'{form}(?!-\\d{{5}})' for form in _PHONES), start=_PHONE_START), _phone))

class PiiMasker:
    """``mlflow.tracing.configure(span_processors=[...])`` に渡す、個人情報を隠す関数。"""
    __name__ = 'mask_pii'

    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        """``patterns`` は、隠す順に並べたもの。"""
        self._patterns = patterns
        self.masked: Counter[str] = Counter()
        self.failures = 0

    def __eq__(self, other: object) -> bool:
        """同じ規則なら等しい(``setup_production_tracing`` の 2 回目が同じ設定だと分かる)。"""

    def __hash__(self) -> int:
        """``__eq__`` と合わせる。"""

    def __call__(self, span: LiveSpan) -> None:
        """終わりかけのスパンと、そのトレースのタグ・メタデータ・プレビューを隠す。"""

    def text(self, value: str) -> str:
        """文字列の中の個人情報を ``[EMAIL]`` などに置き換える(JSON の文字列は中身を見る)。"""

    def value(self, value: Any) -> Any:
        """辞書やリストの中の文字列まで隠した写しを返す(辞書のキーも含む)。"""

    def _item(self, key: object, item: Any) -> Any:
        """辞書の値。``{"api_key": "..."}`` のように、名前と並べて初めて鍵と分かるものも隠す。"""

    def _replace(self, pattern: Pattern, value: str) -> str:
        ...

def mask_pii(*extra: Pattern, patterns: tuple[Pattern, ...]=DEFAULT_PATTERNS) -> PiiMasker:
    """個人情報を隠す関数を作る。

    ``setup_production_tracing(..., span_processors=[mask_pii()])`` のように使う。

    Args:
        extra: 自社の会員番号など、既定に加えるもの。
        patterns: 既定の代わりに使うもの。

    Raises:
        TypeError: ``Pattern`` でないもの。
    """

def harmless_texts(count: int, seed: int=8) -> list[tuple[str, str]]:
    """個人情報を含まない文を作り、(種類, 文) のリストを返す。誤って隠す割合を測るのに使う。"""

def main() -> None:
    """個人情報を含むリクエストを記録し、保存されたデータの全体を調べる。"""
