"""隠すものの形(標準ライブラリーだけを使う)。"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Span = tuple[int, int]


class Found(NamedTuple):
    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Pattern:
    """1 種類の個人情報。``valid`` は、形が合っても本物でないものを除く。"""

    label: str
    regex: re.Pattern[str]
    """名前が ``pii`` のグループがあれば、そこだけを隠す。"""
    valid: Callable[[str], bool] = bool
    hint: re.Pattern[str] | None = None
    """文がこれを含まないなら、調べない(速くするため)。"""

    def find(self, text: str) -> list[Found]:
        """隠す範囲。"""
        if self.hint and not self.hint.search(text):
            return []
        group = "pii" if "pii" in self.regex.groupindex else 0
        spans: list[Found] = []
        start = 0
        while found := self.regex.search(text, start):
            start = found.start() + 1
            if self.valid(found[group]):
                spans.append(Found(*found.span(group), self.label))
                start = max(start, found.end(group))
        return spans


_DOTS = r"./_・\u00b7"
# 区切り: 空白、かっこ、点、斜線、下線、"+"(URL の空白)と、ハイフンや横線や長音記号
_GAP = r"[\s()./_+・\u00b7\-~\u02d7‐-―\u2043−─━〜ー\ufe58\ufe63ｰ]"
_RUN = re.compile(rf"[0-9](?<![0-9][0-9])(?:{_GAP}{{0,3}}[0-9]){{9,}}")
_GROUP = re.compile("[0-9]+")
_GOES_ON = re.compile(r"[A-Za-z]|\.[0-9]")  # 続き書きの番号の終わりではない
_LONGEST = 5  # 区切りの数 + 1


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def luhn(text: str) -> bool:
    """カード番号の検査数字(Luhn)。

    >>> luhn("4111 1111 1111 1111"), luhn("4111 1111 1111 1112")
    (True, False)
    """
    digits = [int(char) for char in _digits(text)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return sum(digits[-1::-2], sum(doubled)) % 10 == 0


def my_number(text: str) -> bool:
    """個人番号(マイナンバー、12 桁)の検査数字。総務省令第 85 号第 5 条の式による。

    >>> my_number("1234 5678 9018"), my_number("123456789012")
    (True, False)
    """
    digits = [int(char) for char in _digits(text)]
    weights = (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2)
    rest = sum(d * w for d, w in zip(digits[:11], weights, strict=True)) % 11
    if not any(digits):  # 0 だけの番号は、伏せ字や空の ID
        return False
    return digits[11] == (0 if rest <= 1 else 11 - rest)


# Visa、Mastercard、Amex、JCB、Diners、Discover、UnionPay
_ISSUER = re.compile(r"4|5[1-5]|2[2-7]|3[47]|35|3[0689]|6011|65|62")
_YEAR, _MONTH, _DAY = r"(?:19\d|20[0-3])\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_TIME = r"(?:[01]\d|2[0-3])[0-5]\d"
_DATE_TIME = re.compile(
    rf"""
    {_YEAR}\W?{_MONTH}{_DAY}\W?{_TIME}        # 202609011234、2026-0901-1234
    | [0-3]\d{_MONTH}{_DAY}{_TIME}[0-5]\d    # 260901123456
    | (?:{_DAY}{_MONTH}|{_MONTH}{_DAY}){_YEAR}{_TIME}
    """,
    re.VERBOSE,
)


def _card(text: str) -> bool:
    """発行会社の番号で始まるか(時刻や注文番号を隠さないため)。"""
    return _ISSUER.match(_digits(text)) is not None and luhn(text)


def _my_number(text: str) -> bool:
    return my_number(text) and not _DATE_TIME.fullmatch(text)


def _phone(text: str) -> bool:
    digits = _digits(text)
    if len(digits) == 11:
        return digits.startswith(("050", "060", "070", "080", "090"))  # 060 は 2026 年から
    if text.startswith(("030", "060")) and text.isdigit():  # ない局番。ISBN-10 に合えば本の番号
        return sum(int(char) * (10 - place) for place, char in enumerate(digits)) % 11 != 0
    return digits[0] == "0" != digits[1]


def _two_part_phone(text: str) -> bool:
    """ "03-12345678" など。"0901-123456" のような日時や、小数ではないもの。"""
    digits = _digits(text)
    dated = rf"{_MONTH}{_DAY}{_TIME}[0-5]\d|\d\d{_YEAR}{_MONTH}{_DAY}"
    if re.fullmatch(dated, digits) or re.search(rf"[{_DOTS}]", text):
        return False
    return digits[0] == "0" != digits[1]


# 種類、桁数の並び、確かめる関数。上にあるものほど優先する
_KINDS = (
    ("CARD", "4-4-4-4-3 4-4-4-4 4-6-5 4-6-4 8-8 14 15 16 17 18 19", _card),
    ("MY_NUMBER", "4-4-4 12", _my_number),
    ("PHONE", "3-4-4 4-3-4 3-3-5 3-8 7-4 11 2-4-4 3-3-4 4-2-4 5-1-4 4-3-3 10", _phone),
    ("PHONE", "2-8 3-7 4-6 6-4", _two_part_phone),
)
_SHAPES = {shape: rank for rank, kind in enumerate(_KINDS) for shape in kind[1].split()}

# 直前が "SKU-"、"A"、"2026-"、"v1." など(もっと長い番号の一部)。"call" や "TEL-" の直後は違う
_IN_CODE = re.compile(r"[0-9A-Za-z]-?$|[0-9]\.$")
_AFTER_WORD = re.compile(
    r"(?<![0-9A-Za-z])(?:[a-z]*[g-z][a-z]*|(?i:tel|fax|phone|mobile|call|card)-?)$"
)
# 直前が "注文番号は"、"order_id=" など。続く番号は、個人情報の形に偶然合っても隠さない
_LABEL = re.compile(
    r"""
    (?: (?:注文|受注|発注|伝票|追跡|送り状|会員|顧客|管理|受付|予約|請求書?|商品)(?:番号|コード)
      | [型品]番 | 追跡 | 伝票 | tracking
      | (?:order|tracking|invoice|ticket|member|serial|item|part|product)
        [ _-]?(?:no\.?|number|id|code|\#)
      | isbn(?:-?1[03])? | jan | sku
    )
    [\s:=\#"'\\は「(]{0,8}$
    """,
    re.VERBOSE | re.IGNORECASE,
)


class Numbers(Pattern):
    """カード番号、個人番号、国内の電話番号。

    "2026 090-1234-5678" のような数字の並び(``regex``)の中で、続いた区切りの桁数("3-4-4")が表に
    あれば、検査数字や前後の語で確かめる。
    """

    def find(self, text: str) -> list[Found]:
        """隠す範囲。"""
        result: list[Found] = []
        for run in self.regex.finditer(text):
            groups = [found.span() for found in _GROUP.finditer(text, *run.span())]
            taken: set[int] = set()
            for rank, first, last in sorted(_candidates(groups)):
                label, _, valid = _KINDS[rank]
                members = range(first, last)
                if taken.isdisjoint(members) and _is_real(text, groups[first:last], valid):
                    taken.update(members)
                    result.append(Found(groups[first][0], groups[last - 1][1], label))
        return sorted(result)


def _candidates(groups: list[Span]) -> Iterator[tuple[int, int, int]]:
    """桁数が表にある並びの、種類の順位と、最初と最後の次の組。"""
    sizes = [str(end - start) for start, end in groups]
    for first in range(len(groups)):
        for last in range(first + 1, min(first + _LONGEST, len(groups)) + 1):
            if (rank := _SHAPES.get("-".join(sizes[first:last]))) is not None:
                yield rank, first, last


def _is_real(text: str, groups: list[Span], valid: Callable[[str], bool]) -> bool:
    start, end = groups[0][0], groups[-1][1]
    goes_on = len(groups) == 1 and _GOES_ON.match(text, end)
    if goes_on or not valid(text[start:end]):
        return False
    before = text[max(0, start - 32) : start]
    in_code = _IN_CODE.search(before) and not _AFTER_WORD.search(before)
    return not in_code and not _LABEL.search(before) and _is_uniform(text, groups)


def _is_uniform(text: str, groups: list[Span]) -> bool:
    """ "03/2026 1015" のように、区切りが混ざっていないか。ハイフン、空白、かっこは同じとみなす。"""
    gaps = [text[before[1] : after[0]] for before, after in pairwise(groups)]
    return len({re.sub(rf"[^{_DOTS}]", "", gap) for gap in gaps}) <= 1


def _any_case(*names: str) -> str:
    """先頭の文字を大文字と小文字で並べる((?i:...) で始めるより、探すのがずっと速い)。"""
    firsts = [(first, name[1:]) for name in names for first in {name[0], name[0].upper()}]
    return "|".join(f"{first}(?i:{rest})" for first, rest in sorted(firsts))


# 値を隠す名前。辞書のキーでは、この語で終わるもの("x-api-key"、"DB_PASSWORD")
_PASSWORD = _any_case(
    "password", "passwd", "passphrase", "passcode", "pwd", "パスワード", "暗証番号"
)
_KEY = _any_case(
    "secrets?",
    "secret[-_ ]?key",
    "a(?:pi|ccess|ccount)[-_ ]?keys?",
    "private[-_ ]?keys?",
    "token",
    "authorization",
    "credentials?",
)


def secret_label(key: str) -> str:
    """値を丸ごと隠すキーなら、そのラベル。"""
    if re.search(f"(?:{_PASSWORD})$", key):
        return "PASSWORD"
    return "API_KEY" if re.search(f"(?:{_KEY})$", key) else ""


def is_secret(text: str) -> bool:
    """空の値、隠した後の "[API_KEY]"、"<token>" のような置き場所ではないか。"""
    return not re.fullmatch(r"\[[A-Z_]+\]|<[^<>]*>|\$\{?[A-Z_]+\}?|", text)


def _is_token(text: str) -> bool:
    """ふつうの語("bearer internationalization")ではないか。"""
    word = r"(?:[A-Z]?[a-z]{1,23}|[A-Z]{1,23})"
    return not re.fullmatch(rf"{word}(?:[-._~/]{word})*", text)


def _is_mail(text: str) -> bool:
    """ファイル名("image@2x.png")ではないか。"""
    files = "png|jpe?g|gif|webp|svg|ico|pdf|js|css|json|html?|txt|csv|log|ya?ml"
    return not re.search(rf"@\d+x\.|\.(?:{files})$", text)


def _is_abroad(text: str) -> bool:
    digits = _digits(text).removeprefix("00").removeprefix("81").removeprefix("0")
    return re.fullmatch(r"[5-9]0\d{8}|[1-9]\d{8}", digits) is not None


# 記号と日本語の手前まで。関数の呼び出し("token=get_token()")や添え字ではないもの
_BARE = r"""[^\s"'&,;<>(){}\[\]$\x7f-\U0010ffff]{1,500}(?=[\s"'&,;<>)}\]\x7f-\U0010ffff]|$)"""


def _named(names: str) -> re.Pattern[str]:
    """``"password": "..."``、``api_key=...``、``token: ...`` のように、名前の後に書かれた値。"""
    return re.compile(
        rf"""
        (?:{names}) \\*["']?\s*[:=]\s*
        (?P<quote>\\*["'])?
        (?P<pii>(?(quote)
            (?:(?!(?P=quote))[^\n])+                      # 引用符で囲んだ値
            | (?:[\[{{][^\[\]{{}}]+[\]}}]                     # リスト、辞書
            | (?<==)(?!(?i:none|null|true|false)\b){_BARE}  # "=" の直後(URL、環境変数)
            | (?=[!-~]{{0,99}}[0-9])(?=[!-~]{{0,99}}[A-Za-z]){_BARE}
        )))""",
        re.VERBOSE,
    )


_PEM = r"-----BEGIN[A-Z0-9 ]*PRIVATE KEY-----(?:[^-]|-(?!----))*(?:-----END[A-Z0-9 ]*-----)?"
_USERINFO = r"""://(?P<pii>[^\s/:@"'<>,]*:[^\s/@"'<>,]+)@"""
_AUTHORIZATION = (
    r"[Aa](?i:uthorization)\W{1,5}(?i:basic|bearer|token)[\s+]+(?P<pii>[A-Za-z0-9._~+/-]{4,}=*)"
)
_BEARER = r"[Bb](?i:earer)[\s+]+(?P<pii>[A-Za-z0-9._~+/-]{16,}=*)"
_API_KEY_HINT = (
    "sk-|dapi|AKIA|ASIA|gh|glpat-|hf_|sk_|rk_|xox|xapp-|hooks|AIza|ya29|xai-|pplx-|nvapi-|gsk_|r8_"
    "|lsv2_|eyJ"
)
_API_KEY = r"""
    (?<![0-9A-Za-z])
    (?: sk-(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{16,}      # OpenAI、Anthropic
      | dapi[0-9a-f]{32}                                     # Databricks
      | A[KS]IA[0-9A-Z]{16}                                  # AWS
      | (?:gh[pousr]_|hf_)[A-Za-z0-9]{30,}                   # GitHub、Hugging Face
      | (?:github_pat_|glpat-|AIza|ya29\.)[A-Za-z0-9_-]{20,} # GitHub、GitLab、Google
      | (?:xai|pplx|nvapi)-[A-Za-z0-9_-]{20,}                # xAI、Perplexity、NVIDIA
      | (?:[rs]k_live|[rs]k_test|gsk|r8)_[A-Za-z0-9]{16,}    # Stripe、Groq、Replicate
      | (?:xox[abeprs]|xapp)-[A-Za-z0-9-]{10,}               # Slack
      | hooks\.slack\.com/services/[A-Za-z0-9/]{20,}
      | lsv2_[a-z]{2}_\w{20,}                                # LangSmith
      | eyJ[A-Za-z0-9_-]{8,999}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}  # JWT
    )"""
# 先頭の条件がないと、長い文字列(base64 の画像など)で時間が長さの 2 乗になる
_EMAIL = r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@(?:[\w-]+\.)+[A-Za-z]{2,}"
_LABELLED_MY_NUMBER = (
    r"(?:マイナンバー|個人番号|My ?Number|my ?number)[^0-9\n]{0,12}"
    rf"(?P<pii>[0-9]{{4}}(?:{_GAP}{{0,3}}[0-9]{{4}}){{2}})(?![0-9])"
)
_ABROAD = rf"(?:\+|(?<![0-9])00)81(?:{_GAP}{{0,3}}[0-9]){{9,11}}(?![0-9])"

DEFAULT_PATTERNS: tuple[Pattern, ...] = (
    Pattern("PRIVATE_KEY", re.compile(_PEM)),
    # "https://user:password@host" の user:password(メールアドレスより先に見る)
    Pattern("PASSWORD", re.compile(_USERINFO)),
    Pattern("PASSWORD", _named(_PASSWORD), is_secret),
    Pattern("API_KEY", re.compile(_AUTHORIZATION)),
    Pattern("API_KEY", _named(_KEY), is_secret),
    Pattern("API_KEY", re.compile(_BEARER), _is_token),
    Pattern("API_KEY", re.compile(_API_KEY, re.VERBOSE), hint=re.compile(_API_KEY_HINT)),
    Pattern("EMAIL", re.compile(_EMAIL), _is_mail, hint=re.compile("@")),
    Pattern("MY_NUMBER", re.compile(_LABELLED_MY_NUMBER)),
    Pattern("PHONE", re.compile(_ABROAD), _is_abroad, hint=re.compile("81")),
    Numbers("NUMBER", _RUN),
)
"""既定で隠すもの: 秘密鍵、パスワード、API キー、メールアドレス、カード番号、個人番号、国内の
電話番号。"""
