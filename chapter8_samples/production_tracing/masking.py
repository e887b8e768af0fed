"""8.1 個人情報のマスキング(トレースに個人情報を残さない)。

入力と出力だけを隠しても、例外の文面・スタックトレース・ストリーミングの断片・属性・タグ・プレビューから
漏れる。ここではスパンの終わりにすべての場所を調べ、送られる前に置き換える。

形と検査数字だけで見分けるので、偶然に合う番号は誤って隠す(12 桁の番号と、0 で始まりうる
10 桁の番号の約 1 割、16 桁の約 3%)。漏らすより隠すほうを選ぶ。日付・金額・型番は隠さない。

Databricks でも同じ関数を ``span_processors`` に渡す。住所や氏名のように形の決まらないもの、スパンの
名前、終わった後に付けたタグは隠せない。自社の番号は ``Pattern`` を足して隠す。
"""

# 終わりかけのスパンのイベントと状態を変える公開 API がない
# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return sum(digits[-1::-2], sum(doubled)) % 10 == 0


def my_number(text: str) -> bool:
    """個人番号(マイナンバー、12 桁)の検査数字。総務省令第 85 号第 5 条の式による。

    >>> my_number("1234 5678 9018"), my_number("123456789012")
    (True, False)
    """
    digits = [int(char) for char in text if char.isdigit()]
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(d * w for d, w in zip(digits[:11], weights, strict=True)) % 11
    if not any(digits):  # 0 だけの番号は、伏せ字や空の ID
        return False
    return digits[11] == (0 if rest <= 1 else 11 - rest)


def _card(text: str) -> bool:
    """発行会社の番号で始まり、Luhn に合うか(時刻や注文番号を隠さないため)。"""
    digits = re.sub(r"\D", "", text)
    return re.match(_ISSUERS, digits) is not None and luhn(digits)


def _phone(text: str) -> bool:
    """数字の区切りが電話番号として多すぎないか("01 15 22 31 40" や日時を隠さないため)。"""
    return text.startswith(("+", "00")) or len(re.findall(r"\d+", text)) <= 4


# Visa、Mastercard、Amex、JCB、Diners、Discover、UnionPay
_ISSUERS = r"4|5[1-5]|2[2-7]|3[47]|35|3[0689]|6011|65|62"
# JSON の中の "\\n" や "\\u3000" の直後も、語の始まりとみなす
_START = r"(?:(?<![0-9A-Za-z])|(?<=\\[nrt])|(?<=\\u[0-9a-fA-F]{4}))"
# "2026-09-01-123456" のような日時の月からではないこと
_PHONE_START = rf"(?:{_START}|(?<=(?i:tel|fax)))(?!(?<=\d{{4}}[- ])\d\d[- ]\d\d\D)"
_SEP = r"[-() ]{0,3}"
# 先頭の条件がないと、長い文字列(base64 の画像など)で時間が長さの 2 乗になる
_LOCAL_PART = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+"
_API_KEYS = (
    r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{16,}",  # OpenAI、Anthropic
    r"dapi[0-9a-f]{32}",  # Databricks
    r"A[KS]IA[0-9A-Z]{16}",  # AWS
    r"(?i:secret_?access_?key)\W{1,5}[A-Za-z0-9/+]{40}",
    r"(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{30,}",  # GitHub
    r"glpat-[A-Za-z0-9_-]{20,}",  # GitLab
    r"hf_[A-Za-z0-9]{30,}",  # Hugging Face
    r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",  # Stripe
    r"(?:xox[abeprs]|xapp)-[A-Za-z0-9-]{10,}",  # Slack
    r"hooks\.slack\.com/services/[A-Za-z0-9/]{20,}",
    r"AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}",  # Google
    r"(?:xai|pplx|nvapi)-[A-Za-z0-9_-]{20,}",  # xAI、Perplexity、NVIDIA
    r"(?:gsk|r8)_[A-Za-z0-9]{20,}",  # Groq、Replicate
    r"lsv2_[a-z]{2}_[A-Za-z0-9_]{20,}",  # LangSmith
    r"(?i:(?:x-)?api[-_]?key|accountkey)\W{0,4}[:=]\W{0,4}[A-Za-z0-9/+_-]{20,}={0,2}",  # Azure など
    r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JWT
    r"(?i:bearer)\s+[A-Za-z0-9._~+/-]{16,}=*",  # Authorization ヘッダー
    r"(?i:authorization)\W{1,5}(?i:basic)\s+[A-Za-z0-9+/]{8,}=*",
)
_KEY_NAME = re.compile(r"(?i)key|authorization")
_CARDS = (
    r"\d{4}[ -]{0,3}\d{4}[ -]{0,3}\d{4}[ -]{0,3}\d{4}",
    r"3\d{3}[ -]{0,3}\d{6}[ -]{0,3}\d{4,5}",  # Amex、Diners
    r"\d{14,19}",  # 13 桁は JAN コードと重なり、いまは発行されていない
)
_PHONES = (
    rf"0[5-9]0(?:{_SEP}\d){{8}}",  # 携帯(060 は 2026 年から)・IP
    rf"0[1-9](?:{_SEP}\d){{8}}",  # 固定・フリーダイヤル
    r"(?:0[5-9]0\.\d{4}|0[1-9]\.\d{4}|0[1-9]\d\.\d{3})\.\d{4}",
    rf"(?:\+|00)81{_SEP}0?{_SEP}(?:[5-9]0(?:{_SEP}\d){{8}}|[1-9](?:{_SEP}\d){{8}})",
    r"\+81\.(?:[5-9]0\.\d{4}|[1-9]\.\d{4}|[1-9]\d\.\d{3})\.\d{4}",
)


def _uuid() -> str:
    """UUID の 5 つの区切りのどこかにいること(リクエスト ID などを壊さないため)。"""
    parts = [rf"[0-9A-Fa-f]{{{size}}}" for size in (8, 4, 4, 4, 12)]
    places = range(len(parts))
    return "|".join(
        rf"(?<={''.join(f'{p}-' for p in parts[:i])}){'-'.join(parts[i:])}" for i in places
    )


def _whole(*choices: str, start: str = _START) -> re.Pattern[str]:
    """前後に英数字が続かない(もっと長い番号の一部や小数、UUID ではない)もの。"""
    form = rf"{start}(?<!\d\.)(?!{_uuid()})(?:{'|'.join(choices)})(?![0-9A-Za-z])"
    return re.compile(form)


DEFAULT_PATTERNS: tuple[Pattern, ...] = (
    # "https://user:password@host" の user:password(メールアドレスより先に見る)
    Pattern("PASSWORD", re.compile(r"""(?<=://)[^\s/:@"'<>,]*:[^\s/@"'<>,]+(?=@)""")),
    Pattern("API_KEY", re.compile(rf"{_START}(?:{'|'.join(_API_KEYS)})")),
    Pattern("EMAIL", re.compile(rf"{_LOCAL_PART}(?:@|%40)(?:[\w-]+\.)+[A-Za-z]{{2,}}")),
    Pattern("CARD", _whole(r"\d{4}(?:[ -]\d{4}){3}[ -]\d{3}"), _card),  # 19 桁(UnionPay など)
    Pattern("CARD", _whole(*_CARDS), _card),
    Pattern("MY_NUMBER", _whole(r"\d{4}[ -]{0,3}\d{4}[ -]{0,3}\d{4}"), my_number),
    # "094-2871277-5630506" のような注文番号の前半ではないこと
    Pattern(
        "PHONE", _whole(*(rf"{form}(?!-\d{{5}})" for form in _PHONES), start=_PHONE_START), _phone
    ),
)
"""既定で隠すもの: URL の中のパスワード、API キー、メールアドレス、カード番号、個人番号、
国内の電話番号。"""

# 全角の数字・記号・空白と、各種のハイフン・罫線・長音記号で書かれたものも、同じ規則で見つける
_HYPHENS = (
    *(0x00AD, 0x02D7, *range(0x2010, 0x2016), 0x2043, 0x2212),
    *(0x2500, 0x2501, 0x30FC, 0xFE58, 0xFE63, 0xFF70),
)
_SPACES = (0x00A0, 0x2009, 0x202F, 0x3000)
_HALF_WIDTH = str.maketrans(
    {
        **{0xFF01 + i: 0x21 + i for i in range(94)},
        **dict.fromkeys(_HYPHENS, "-"),
        **dict.fromkeys(_SPACES, " "),
    }
)


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
        """終わりかけのスパンと、そのトレースのタグ・メタデータ・プレビューを隠す。"""
        try:
            _rewrite(span, self.value)
        except Exception as error:  # 隠せないまま送るより、中身を捨てる
            self.failures += 1
            # 例外の文面にも個人情報が入りうるので、種類だけを書く
            logger.error("masking failed (%s); the span content is removed", type(error).__name__)
            _rewrite(span, lambda _value: "[MASKING FAILED]")

    def text(self, value: str) -> str:
        """文字列の中の個人情報を ``[EMAIL]`` などに置き換える(JSON の文字列は中身を見る)。"""
        if "\\u" in value and value[:1] in '"[{':  # MLflow はストリーミングの断片を JSON で持つ
            with contextlib.suppress(json.JSONDecodeError):
                plain = json.loads(value)
                masked = self.value(plain)
                return value if masked == plain else json.dumps(masked)
        for pattern in self._patterns:
            value = self._replace(pattern, value)
        return value

    def value(self, value: Any) -> Any:
        """辞書やリストの中の文字列まで隠した写しを返す(辞書のキーも含む)。"""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self._item(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item) for item in value]
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int):
            masked = self.text(str(value))
            return value if masked == str(value) else masked
        return value if isinstance(value, float) else self.text(str(value))

    def _item(self, key: object, item: Any) -> Any:
        """辞書の値。``{"api_key": "..."}`` のように、名前と並べて初めて鍵と分かるものも隠す。"""
        item = self.value(item)
        if not (isinstance(key, str) and isinstance(item, str) and _KEY_NAME.search(key)):
            return item
        masked = self.text(f"{key}={item}")
        return masked.removeprefix(f"{key}=")

    def _replace(self, pattern: Pattern, value: str) -> str:
        half = value.translate(_HALF_WIDTH)  # 1 文字ずつの置き換えなので位置は変わらない
        pieces: list[str] = []
        end = start = 0
        while found := pattern.regex.search(half, start):
            start = found.start() + 1
            if pattern.valid(found.group()):
                pieces += [value[end : found.start()], f"[{pattern.label}]"]
                end = start = found.end()
                self.masked[pattern.label] += 1
        return "".join([*pieces, value[end:]])


_SYSTEM_ATTRIBUTES = (
    "mlflow.traceRequestId",
    "mlflow.experimentId",
    "mlflow.spanStartTimeNs",
    "mlflow.spanType",
    "mlflow.spanLogLevel",
    "mlflow.chat.tokenUsage",
    "mlflow.spanInputs",  # 入力と出力は、先に隠している
    "mlflow.spanOutputs",
)
_SYSTEM_KEYS = (
    "mlflow.trace_schema",
    "mlflow.trace.tokenUsage",
    "mlflow.trace.cost",
    "mlflow.artifactLocation",
)


def _rewrite(span: LiveSpan, change: Callable[[Any], Any]) -> None:
    """スパンと、そのトレースの、書き換えられるすべての場所に ``change`` を当てる。"""
    if span.inputs is not None:
        span.set_inputs(change(span.inputs))
    if span.outputs is not None:
        span.set_outputs(change(span.outputs))
    for key, value in span.attributes.items():
        if key not in _SYSTEM_ATTRIBUTES and (changed := change(value)) != value:
            span.set_attribute(key, changed)
    inner: Any = span._span
    for event in inner._events:
        event._attributes = {key: change(value) for key, value in (event.attributes or {}).items()}
    if inner.status.description:
        inner._status._description = change(inner.status.description)
    # 文字列だけを隠すときは、MLflow なしで使えるようにここで読み込む
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
        if trace is not None:
            _rewrite_info(trace.info, change)


def _rewrite_info(info: Any, change: Callable[[Any], Any]) -> None:
    for values in (info.tags, info.trace_metadata):
        for key, value in values.items():
            if not key.startswith(_SYSTEM_KEYS):
                values[key] = change(value)
    info.request_preview = info.request_preview and change(info.request_preview)
    info.response_preview = info.response_preview and change(info.response_preview)
    info.client_request_id = info.client_request_id and change(info.client_request_id)


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
