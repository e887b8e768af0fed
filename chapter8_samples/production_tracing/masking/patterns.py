"""隠すものの形(標準ライブラリーだけを使う)。

どの形も、半角にした文(``text.folded``)に当てる。先頭の 1 文字で候補を絞ってから周りを見るのは、
長い文でも 1 文字あたり数ナノ秒で済ませるため。
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

BEFORE, AFTER = 32, 8
"""規則が見る、前後の文字数。"""


def _anything(_text: str) -> bool:
    return True


@dataclass(frozen=True)
class Pattern:
    """1 種類の個人情報。``valid`` は、形が合っても本物でないものを除く。"""

    label: str
    regex: re.Pattern[str]
    """名前が ``pii`` のグループがあれば、そこだけを隠す。"""
    valid: Callable[[str], bool] = _anything
    unless: re.Pattern[str] | None = None
    """直前の文字がこれに合うなら隠さない。"""
    hints: tuple[str, ...] = ()
    """小文字にした文がどれも含まないなら、調べない(速くするため)。"""
    numeric: bool = False
    """数字が(区切りをはさんで)10 桁以上続くところだけを調べる(速くするため)。"""

    def may_match(self, lower: str, letters: str) -> bool:
        """小文字にした文と、その ASCII の文字だけを見て、合うことがありうるか。"""
        hints = self.hints
        return not hints or any(hint in (letters if hint.isascii() else lower) for hint in hints)

    def find(self, text: str, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """隠す範囲。"""
        last = len(text) if end is None else end
        spans: list[tuple[int, int]] = []
        while found := self.regex.search(text, start, last):
            start = found.start() + 1
            group = "pii" if "pii" in self.regex.groupindex else 0
            if self._is_real(found[group], text[max(0, found.start() - BEFORE) : found.start()]):
                spans.append(found.span(group))
                start = max(start, found.end(group))
        return spans

    def _is_real(self, text: str, before: str) -> bool:
        return self.valid(text) and not (self.unless and self.unless.search(before))


# 0 で始まらない 10・11 桁、13 桁(ミリ秒の時刻、JAN)、20 桁以上の続いた数字は、どれにもならない
LONG_NUMBER = re.compile(
    r"[0-9](?<![0-9].)(?!(?<!0)(?:[0-9]{9}|[0-9]{10})(?![0-9])|[0-9]{12}(?![0-9])|[0-9]{19})"
    r"(?:[-\s()./_]{0,3}[0-9]){9,}"
)
"""``Pattern.numeric`` の規則が調べるところ。"""


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


def _card(text: str) -> bool:
    """発行会社の番号で始まり、Luhn に合うか(時刻や注文番号を隠さないため)。"""
    return re.match(_ISSUERS, _digits(text)) is not None and luhn(text)


def _bare_my_number(text: str) -> bool:
    """検査数字に合い、日時に読めないか。"""
    return my_number(text) and not re.fullmatch(_TIMESTAMP, text)


def _grouped_my_number(text: str) -> bool:
    """検査数字に合い、2026-0901-1234 のような日時でも、年を 3 つ並べたものでもないか。"""
    digits = _digits(text)
    dated = re.fullmatch(rf"{_YEAR}(?:{_MONTH}{_DAY}{_TIME}|{_YEAR}{_YEAR})", digits)
    return my_number(digits) and not dated


def _landline(text: str) -> bool:
    """区切りのない 10 桁。03・06 の次が 0 の局番はないので、ISBN-10 にも合えば本の番号とみなす。"""
    weighted = sum(int(char) * (10 - place) for place, char in enumerate(text))
    return not (text.startswith(("030", "060")) and weighted % 11 == 0)


def _undated(text: str) -> bool:
    """2 つに区切った番号("0901-123456")が日付や日時ではないか。"""
    return not re.fullmatch(
        rf"{_MONTH}{_DAY}{_TIME}[0-5]\d|\d\d{_YEAR}{_MONTH}{_DAY}", _digits(text)
    )


def _token(text: str) -> bool:
    """ふつうの語("bearer internationalization")ではないか。"""
    word = r"(?:[A-Z]?[a-z]{1,23}|[A-Z]{1,23})"
    return not re.fullmatch(rf"{word}(?:[-._~/]{word})*", text)


def _mail(text: str) -> bool:
    """ファイル名("image@2x.png")ではないか。"""
    return not re.search(rf"@\d+x\.|\.(?:{_FILES})$", text)


_FILES = r"png|jpe?g|gif|webp|svg|ico|bmp|avif|pdf|js|mjs|css|json|html?|txt|csv|log|ya?ml|gz|tgz"
_YEAR, _MONTH, _DAY = r"(?:19\d|20[0-3])\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_TIME = r"(?:[01]\d|2[0-3])[0-5]\d"
# yyyymmddHHMM、yymmddHHMMSS、ddmmyyyyHHMM、mmddyyyyHHMM
_TIMESTAMP = (
    rf"{_YEAR}{_MONTH}{_DAY}{_TIME}|[0-3]\d{_MONTH}{_DAY}{_TIME}[0-5]\d"
    rf"|(?:{_DAY}{_MONTH}|{_MONTH}{_DAY}){_YEAR}{_TIME}"
)
# Visa、Mastercard、Amex、JCB、Diners、Discover、UnionPay
_ISSUERS = r"4|5[1-5]|2[2-7]|3[47]|35|3[0689]|6011|65|62"

# 直前が "SKU-"、"A"、"2026-09-" など(もっと長い番号の一部)。"call090-..." と "TEL-03-..." は違う
_CODE = (
    r"(?<![0-9A-Za-z])(?!(?:(?i:tel|fax|phone|mobile|cell|call|card|visa|no)-?"
    r"|(?=[a-z]*[g-z])[a-z]{3,})$)[0-9A-Za-z]+-?$|[0-9]\.$"
)
# "型番 "、"注文番号は"、"order_id=" など。続く番号は、個人情報の形に偶然合っても隠さない
_SUFFIX = r"[ _-]?(?:番号|コード|no\.?|number|id|code|#)"
_AFTER = r"[\s:=#\"'\\は「(]{0,8}$"
_PRODUCT = (
    rf"(?i:isbn(?:-?1[03])?|jan|sku|[型品]番|(?:商品|製品|部品|part|item|product){_SUFFIX}){_AFTER}"
)
_LABEL = (
    rf"{_PRODUCT}|(?i:追跡|伝票|送り状|tracking|(?:注文|受注|発注|伝票|追跡|送り状|合わ?せ|荷物|配送|会員"
    r"|顧客|管理|受付|予約|請求書?|整理|シリアル|チケット|案件"
    rf"|order|tracking|invoice|ticket|member|serial){_SUFFIX}){_AFTER}"
)
# 4-4-4 は、宅配便の追跡番号の書き方でもある
_PARCEL = (
    r"(?i:追跡|伝票|送り状|荷物|配送|配達|宅配|発送|お届け|tracking|shipment|parcel)[^。\n]{0,12}$"
)
_PARCELS = f"{_CODE}|{_LABEL}|{_PARCEL}"

_GAP = r"[-\s()]{1,3}"
_GAPS = (_GAP, r"\s?\.\s?", r"\s?/\s?", "_")
_ANY_GAP = r"[-\s./_]{1,3}"
# "094-2871277-5630506" のような注文番号の前半ではない
_END = r"(?![0-9])(?!-[0-9]{5})"
_BARE_END = r"(?![0-9A-Za-z])(?!\.[0-9])"
_MOBILE = "3-4-4 4-3-4 3-3-5 3-8 7-4"  # 0x0(060 は 2026 年から)
_FIXED = "2-4-4 3-3-4 4-2-4 5-1-4 4-3-3"
_TWO_PARTS = "2-8 3-7 4-6 6-4"
_ONE = r"[-\s()./]{0,3}"
_ABROAD = (
    rf"[+0](?:(?<=\+)|0(?<![0-9]..))81(?:{_ONE}0)?"
    rf"(?:{_ONE}[5-9]{_ONE}0(?:{_ONE}[0-9]){{8}}|{_ONE}[1-9](?:{_ONE}[0-9]){{8}})(?![0-9])"
)
_LABELLED_MY_NUMBER = (
    r"(?:マイナンバー|個人番号|[Mm]y ?[Nn]umber)[^0-9\n]{0,12}"
    rf"(?P<pii>[0-9]{{4}}{_ANY_GAP}[0-9]{{4}}{_ANY_GAP}[0-9]{{4}}|[0-9]{{12}})(?![0-9])"
)
_MY_NUMBER_HINTS = ("マイナンバー", "個人番号", "my number", "mynumber")

_LOCAL = r"[A-Za-z0-9._%+-]"
# 先頭の条件がないと、長い文字列(base64 の画像など)で時間が長さの 2 乗になる
_EMAIL = rf"{_LOCAL}(?<!{_LOCAL}.){_LOCAL}*@(?:[\w-]+\.)+[A-Za-z]{{2,}}"
_USERINFO = r"""://(?P<pii>[^\s/:@"'<>,]*:[^\s/@"'<>,]+)@"""
_PEM = (
    r"-----BEGIN[ +][A-Z0-9 +]*PRIVATE[ +]KEY[A-Z +]*-----"
    r"(?:[^-]|-(?!----))*(?:-----END[A-Z0-9 +]*-----)?"
)
_API_KEYS = {  # 続く形と、始まりの文字
    r"(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{16,}": "sk-",  # OpenAI、Anthropic
    r"[0-9a-f]{32}": "dapi",  # Databricks
    r"[0-9A-Z]{16}": "AKIA ASIA",  # AWS
    r"[A-Za-z0-9]{30,}": "ghp_ gho_ ghu_ ghs_ ghr_ hf_",  # GitHub、Hugging Face
    r"[A-Za-z0-9_-]{20,}": "github_pat_ glpat- AIza ya29. xai- pplx- nvapi-",  # Google、xAI など
    r"[A-Za-z0-9]{16,}": "sk_live_ sk_test_ rk_live_ rk_test_ gsk_ r8_",  # Stripe、Groq など
    r"[abeprs]-[A-Za-z0-9-]{10,}": "xox",  # Slack
    r"[A-Za-z0-9-]{10,}": "xapp-",
    r"[A-Za-z0-9/]{20,}": "hooks.slack.com/services/",
    r"[a-z]{2}_\w{20,}": "lsv2_",  # LangSmith
    r"[A-Za-z0-9_-]{8,999}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}": "eyJ",  # JWT
}
_BEARER = r"[Bb](?i:earer)[\s+]+(?P<pii>[A-Za-z0-9._~+/-]{16,}=*)"
_BASIC = (
    r"[Aa](?i:uthorization)\W{1,5}(?i:basic|bearer|token)[\s+]+(?P<pii>[A-Za-z0-9._~+/-]{4,}=*)"
)
_COOKIE = r"[Cc](?i:ookie):\s*(?P<pii>[!-~]{1,99}=[^\n\"']+)"

PASSWORD_NAME = re.compile(r"(?i)(?:passwo?r?d|passphrase|passcode|pwd|パスワード|暗証番号)s?\d?$")
"""辞書のキー。値は、形によらず隠す。"""
KEY_NAME = re.compile(
    r"(?i)(?:secret(?:[-_ ]?access)?(?:[-_ ]?key)?|(?:api|access|account|private|secret)[-_ ]?key"
    r"|authorization|credential|cookie)s?\d?$|token$|(?:秘密鍵|トークン|API ?キー)$"
)
_PASSWORD_NAMES = r"(?<=p)(?:asswo?r?d|assphrase|asscode|wd)|(?<=パ)スワード|(?<=暗)証番号"
_PASSWORD_HINTS = ("passw", "passp", "passc", "pwd", "パスワード", "暗証番号")
_PASSWORD_IN_JAPANESE = (
    r"(?:パスワード|暗証番号)[はが:=\s「『]{1,4}(?=[!-~]{0,99}[0-9])(?P<pii>[!-~]{4,})"
)
_KEY_NAMES = (
    r"(?<=s)ecret(?:[-_ ]?access)?(?:[-_ ]?key)?s?|(?<=t)oken"
    r"|(?:(?<=a)(?:pi|ccess|ccount)|(?<=p)rivate)[-_ ]?keys?"
    r"|(?<=a)uthorization|(?<=c)(?:redential|ookie)s?"
)
_KEY_HINTS = ("secret", "token", "key", "authorization", "credential", "cookie")
_NOTHING = r"(?i:none|null|nil|true|false|undefined)\b"
# 記号と日本語の手前まで。関数の呼び出し("token = get_token()")や添え字ではないもの
_BARE = r"""[^\s"'&,;<>(){}\[\]$\x7f-\U0010ffff]+(?=[\s"'&,;<>)}\]\x7f-\U0010ffff]|$)"""


def unmasked(text: str) -> bool:
    """隠した後の "[API_KEY]" や、"<token>" のような置き場所ではないか。"""
    return not re.fullmatch(r"\[[A-Z_]+\]|<[^<>]*>|\$\{?[A-Z_]+\}?", text)


def _number(
    label: str,
    first: str,
    groups: str,
    *separators: str,
    end: str = _END,
    valid: Callable[[str], bool] = _anything,
    unless: str = f"{_CODE}|{_LABEL}",
) -> Pattern:
    """``first`` で始まり、``"3-4-4 4-3-4"`` のような桁数に、どれか 1 種類の区切りで分けた番号。"""
    sizes = [[int(size) for size in form.split("-")] for form in groups.split()]
    forms = (
        separator.join(rf"[0-9]{{{size - (place == 0)}}}" for place, size in enumerate(form))
        for separator in separators or ("",)
        for form in sizes
    )
    # 数字の途中からは始めない。先頭の 1 文字を先に見るのが、いちばん速い
    regex = re.compile(rf"{first}(?<![0-9].)(?:{'|'.join(forms)}){end}")
    return Pattern(label, regex, valid, re.compile(unless), numeric=True)


def _named(first: str, names: str) -> re.Pattern[str]:
    """``"password": "..."``、``api_key=...``、``token: ...`` のように、名前の後に書かれた値。"""
    return re.compile(
        rf"""
        [{first}](?i:{names})\\*["']?\s*[:=]\s*
        (?P<quote>\\*["'])?
        (?P<pii>(?(quote)
            (?:(?!(?<!\\)(?P=quote))[^\n])+           # 引用符で囲んだ値
            | (?:[\[{{][^\[\]{{}}]+[\]}}]?            # リスト、辞書
            | (?<==)(?!{_NOTHING}){_BARE}              # "=" の直後(URL、環境変数)
            | (?=[!-~]{{6}})(?=[!-~]{{0,99}}[0-9])(?=[!-~]{{0,99}}[A-Za-z]){_BARE})
        ))""",
        re.VERBOSE,
    )


def _api_key(start: str, rest: str) -> Pattern:
    regex = rf"{start[0]}(?<![0-9A-Za-z].){re.escape(start[1:])}{rest}"
    return Pattern("API_KEY", re.compile(regex), hints=(start.lower(),))


DEFAULT_PATTERNS: tuple[Pattern, ...] = (
    Pattern("PRIVATE_KEY", re.compile(_PEM), hints=("-----begin",)),
    # "https://user:password@host" の user:password(メールアドレスより先に見る)
    Pattern("PASSWORD", re.compile(_USERINFO), hints=("://",)),
    Pattern("PASSWORD", _named("Ppパ暗", _PASSWORD_NAMES), unmasked, hints=_PASSWORD_HINTS),
    Pattern("PASSWORD", re.compile(_PASSWORD_IN_JAPANESE), hints=("パスワード", "暗証番号")),
    Pattern("API_KEY", _named("ACPSTacpst", _KEY_NAMES), unmasked, hints=_KEY_HINTS),
    Pattern("API_KEY", re.compile(_COOKIE), hints=("cookie:",)),
    Pattern("API_KEY", re.compile(_BASIC), hints=("authorization",)),
    Pattern("API_KEY", re.compile(_BEARER), _token, hints=("bearer",)),
    *(_api_key(start, rest) for rest, names in _API_KEYS.items() for start in names.split()),
    Pattern("EMAIL", re.compile(_EMAIL), _mail, hints=("@",)),
    _number("CARD", "[2-6]", "4-4-4-4-3", _ANY_GAP, valid=_card),  # UnionPay など
    _number("CARD", "[2-6]", "4-4-4-4 4-6-5 4-6-4 8-8", _ANY_GAP, valid=_card),
    _number("CARD", "[2-6]", "14 15 16 17 18 19", end=_BARE_END, valid=_card),
    Pattern("MY_NUMBER", re.compile(_LABELLED_MY_NUMBER), hints=_MY_NUMBER_HINTS),
    _number("MY_NUMBER", "[0-9]", "4-4-4", _ANY_GAP, valid=_grouped_my_number, unless=_PARCELS),
    _number("MY_NUMBER", "[0-9]", "12", end=_BARE_END, valid=_bare_my_number, unless=_PARCELS),
    Pattern("PHONE", re.compile(_ABROAD), numeric=True),
    _number("PHONE", "0(?=[5-9]0)", _MOBILE, *_GAPS, unless=_CODE),
    _number("PHONE", "0(?=[5-9]0)", "11", end=_BARE_END, unless=_CODE),
    _number("PHONE", "0(?=[1-9])", _FIXED, *_GAPS, unless=f"{_CODE}|{_PRODUCT}"),
    _number("PHONE", "0(?=[1-9])", _TWO_PARTS, _GAP, valid=_undated),
    _number("PHONE", "0(?=[1-9])", "10", end=_BARE_END, valid=_landline),
)
"""既定で隠すもの: 秘密鍵、パスワード、API キー、メールアドレス、カード番号、個人番号、国内の
電話番号。"""
