"""隠すものの形(標準ライブラリーだけを使う)。"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul

Found = tuple[int, int, str]  # 始まり、終わり、種類


@dataclass(frozen=True)
class Pattern:
    """1 種類の個人情報。``valid`` は、形が合っても本物でないものを除く。"""

    label: str
    regex: re.Pattern[str]
    """名前が ``pii`` のグループがあれば、そこだけを隠す。"""
    valid: Callable[[str], bool] = bool
    hint: str = ""
    """文がこれを含まないなら、調べない(速くするため)。"""

    def find(self, text: str) -> list[Found]:
        """隠す範囲。"""
        group = "pii" if "pii" in self.regex.groupindex else 0
        spans: list[Found] = []
        start = 0 if self.hint in text else len(text) + 1
        while found := self.regex.search(text, start):
            start = found.start() + 1
            if self.valid(found[group]):
                spans.append((*found.span(group), self.label))
                start = max(start, found.end(group))
        return spans


# ---- 番号: カード、個人番号、国内の電話番号 ----

# 区切り: 空白、かっこ、点、斜線、下線、"+"(URL の空白)と、ハイフンや横線や長音記号
_GAP = r"[\s()./_+・\u00b7\-~\u02d7‐-―\u2043−─━〜ー\ufe58\ufe63ｰ]"
_DOTS = r"./_・\u00b7"
_YEAR = r"(?:19\d|20[0-3])\d"
_MONTH = r"(?:0[1-9]|1[0-2])"
_DAY = r"(?:0[1-9]|[12]\d|3[01])"
_TIME = r"(?:[01]\d|2[0-3])[0-5]\d"
_DATE = re.compile(
    rf"{_YEAR}\W?{_MONTH}{_DAY}\W?{_TIME}"  # 202609011234、2026-0901-1234
    rf"|[0-3]\d{_MONTH}{_DAY}{_TIME}[0-5]\d"  # 260901123456
    rf"|(?:{_DAY}{_MONTH}|{_MONTH}{_DAY}){_YEAR}{_TIME}"
    rf"|{_MONTH}{_DAY}\D+{_TIME}[0-5]\d|\d\d\D+{_YEAR}{_MONTH}{_DAY}"  # 0901-123456
    rf"|\d+\D*[{_DOTS}]\D*\d+"  # 小数
)
# 直前が "SKU-"、"A"、"2026-"、"v1." など(もっと長い番号の一部)。"call" や "TEL-" の直後は違う
_IN_CODE = re.compile(r"(?:[0-9A-Za-z]-?|[0-9]\.)$")
_AFTER_WORD = re.compile(
    r"(?<![0-9A-Za-z])(?:[a-z]*[g-z][a-z]*|(?i:tel|fax|phone|mobile|call|card)-?)$"
)
# 直前が "注文番号は"、"order_id=" など。続く番号は、個人情報の形に偶然合っても隠さない
_NAMED = re.compile(
    r"""(?: (?:注文|受注|発注|伝票|追跡|送り状|会員|顧客|管理|受付|予約|請求書?|商品)(?:番号|コード)
      | [型品]番 | 追跡 | 伝票 | tracking | isbn(?:-?1[03])? | jan | sku
      | (?:order|tracking|invoice|ticket|member|serial|item|part|product)
        [ _-]?(?:no\.?|number|id|code|\#)
    )[\s:=\#"'\\は「(]{0,8}$""",
    re.VERBOSE | re.IGNORECASE,
)


class Number(Pattern):
    """番号。日時、もっと長い番号の一部、名前のある別の番号を除く。"""

    def find(self, text: str) -> list[Found]:
        """隠す範囲。"""
        return [one for one in super().find(text) if _is_number(text, one[0], one[1])]


def _is_number(text: str, start: int, end: int) -> bool:
    before = text[max(0, start - 32) : start]
    number = text[start:end]
    in_code = _IN_CODE.search(before) and not _AFTER_WORD.search(before)
    # "03/2026 1015" のように、区切りが混ざったもの。ハイフン、空白、かっこは同じとみなす
    gaps = {re.sub(rf"[^{_DOTS}]", "", gap) for gap in re.findall(r"\D+", number)}
    is_other = in_code or _NAMED.search(before) or _DATE.fullmatch(number) or len(gaps) > 1
    return not is_other


def _shaped(start: str, shapes: str, after: str = "") -> re.Pattern[str]:
    """``start`` で始まり、区切りごとの桁数が ``shapes`` のどれかの番号(``after`` は続く条件)。"""
    numbers: list[str] = []
    for shape in shapes.split():
        first, *rest = map(int, shape.split("-"))
        sizes = [f"[0-9]{{{size}}}" for size in (first - 1, *rest)]
        numbers.append(f"{_GAP}{{1,3}}".join(sizes))
    # 続き書きなら、すぐ後に英字も小数点もないもの
    end = r"(?![0-9])(?:(?<![0-9]{9})|(?![A-Za-z]|\.[0-9]))"
    return re.compile(rf"{start}(?<![0-9][0-9])(?:{'|'.join(numbers)}){end}{after}")


def luhn(text: str) -> bool:
    """カード番号の検査数字(Luhn)。"""
    digits = [int(char) for char in text if char.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return sum(digits[-1::-2], sum(doubled)) % 10 == 0


def my_number(text: str) -> bool:
    """個人番号(マイナンバー、12 桁)の検査数字。総務省令第 85 号第 5 条の式による。"""
    digits = [int(char) for char in text if char.isdecimal()]
    rest = sum(map(mul, digits, (6, 5, 4, 3, 2, 7, 6, 5, 4, 3, 2))) % 11
    # 0 だけの番号は、伏せ字や空の ID
    return any(digits) and digits[-1] == (0 if rest <= 1 else 11 - rest)


def _is_no_book(text: str) -> bool:
    """ない局番(030、060)で始まり、ISBN-10 の検査数字に合うものではないか。"""
    if not text.isdigit() or not text.startswith(("030", "060")):
        return True
    return sum(int(char) * (10 - place) for place, char in enumerate(text)) % 11 != 0


_ISSUER = "(?:4|5(?=[1-5])|2(?=[2-7])|3(?=[04-9])|6(?=011|[25]))"  # カードの発行会社
_NUMBERS = (
    Number("CARD", _shaped("6(?=2)", "4-4-4-4-3 19"), luhn),
    Number("CARD", _shaped(_ISSUER, "4-4-4-4 4-6-5 4-6-4 8-8 14 15 16 17 18 19"), luhn),
    Number("MY_NUMBER", _shaped("[0-9]", "4-4-4 12", "(?!-[0-9])"), my_number),  # 4-4-4-4 は違う
    Number("PHONE", _shaped("0(?=[5-9]0)", "3-4-4 4-3-4 3-3-5 3-8 7-4 11")),  # 060 は 2026 年から
    Number(
        "PHONE",
        _shaped("0(?=[1-9])", "2-4-4 3-3-4 4-2-4 5-1-4 4-3-3 10 2-8 3-7 4-6 6-4"),
        _is_no_book,
    ),
)

# ---- 名前や書き方で分かるもの ----


def _any_case(*names: str) -> str:
    """先頭の文字を大文字と小文字で並べる((?i:...) で始めるより、探すのがずっと速い)。"""
    return "|".join(f"{one[0]}(?i:{one[1:]})|{one[0].upper()}(?i:{one[1:]})" for one in names)


# 値を隠す名前。辞書のキーでは、この語で終わるもの("x-api-key"、"DB_PASSWORD")
_PASSWORD = _any_case(
    *("pass(?:words?|wd|phrase|code)", "password[-_]?confirmation", "pwd"),
    *("パスワード", "暗証番号"),
)
_KEY = _any_case(
    *("secrets?", "secret[-_ ]?key", "a(?:pi|ccess|ccount)[-_ ]?keys?", "private[-_ ]?keys?"),
    *("signing[-_ ]?keys?", "encryption[-_ ]?keys?"),
    *("token", "authorization", "credentials?", "cookie"),
)


def secret_label(key: str) -> str:
    """値を丸ごと隠すキーなら、そのラベル。"""
    if re.search(f"(?:{_PASSWORD})$", key):
        return "PASSWORD"
    return "API_KEY" if re.search(f"(?:{_KEY})$", key) else ""


def is_secret(text: str) -> bool:
    """空の値、隠した後の "[API_KEY]"、"<token>" のような置き場所ではないか。"""
    return not re.fullmatch(r"\[[A-Z_]+\]|<[^<>]*>|", text)


# 記号と日本語の手前まで。関数の呼び出し("token=get_token()")や添え字ではないもの
_BARE = r"""[^\s"'&,;<>(){}\[\]$\x7f-\U0010ffff]{1,500}(?=[\s"'&,;<>)}\]\x7f-\U0010ffff]|$)"""


def _named(names: str) -> re.Pattern[str]:
    """``"password": "..."``、``api_key=...``、``token: ...`` のように、名前の後に書かれた値。"""
    return re.compile(
        rf"""(?:{names}) \\*["']?[\s+]*[:=][\s+]* (?P<quote>\\*["'])?
        (?P<pii>(?(quote)
            (?:(?!(?P=quote))[^\n])+                      # 引用符で囲んだ値
            | (?:[\[{{][^\[\]{{}}]+[\]}}]                     # リスト、辞書
            | (?<==)(?!(?i:none|null|true|false)\b){_BARE}  # "=" の直後(URL、環境変数)
            | (?=[!-~]{{0,99}}[0-9])(?=[!-~]{{0,99}}[A-Za-z]){_BARE}
        )))""",
        re.VERBOSE,
    )


_PEM = r"-----BEGIN[\w\s+]*PRIVATE[\s+]KEY-----(?:[^-]|-(?!----))*(?:-----END[\w\s+]*-----)?"
_USERINFO = r"""://(?P<pii>[^\s/:@"'<>,]*:[^\s/@"'<>,]+)@"""  # user:password@
_TOKEN = r"[A-Za-z0-9._~+/-]"
_AUTHORIZATION = (
    _any_case(r"authorization\W{1,5}(?:basic|token)[\s+]+", r"bearer[\s+]+").join(("(?:", ")"))
    # "bearer internationalization" のような、ふつうの語ではないもの
    + rf"(?P<pii>(?={_TOKEN}{{0,99}}[0-9=]|[A-Za-z]{{24}}){_TOKEN}{{6,}}=*)"
)
# Databricks、AWS、GitHub、GitLab、Hugging Face、Google、xAI、Perplexity、NVIDIA、Stripe、Groq、
# Replicate、Slack、LangSmith。"sk-" は OpenAI と Anthropic で、"sk-learn-..." ではないもの
_PREFIXES = (
    "dapi AKIA ASIA ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ glpat- hf_ AIza ya29 xai- pplx- nvapi- "
    "sk_live_ sk_test_ rk_live_ rk_test_ gsk_ r8_ xox xapp- hooks.slack.com lsv2_ sk-"
)
_API_KEY = "|".join(f"{one}(?<![0-9A-Za-z]{one})" for one in map(re.escape, _PREFIXES.split()))
_JWT = r"eyJ(?<![0-9A-Za-z]eyJ)[A-Za-z0-9_-]{8,999}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
# 先頭の条件がないと、長い文字列(base64 の画像など)で時間が長さの 2 乗になる。"image@2x.png" は違う
_IMAGE = r"\d[\d.]*x[\w.-]*\.(?:png|jpe?g|gif|webp|avif|svg)"
_EMAIL = rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@(?!{_IMAGE})(?:[\w-]+\.)+[A-Za-z]{{2,}}"
_NAMED_MY_NUMBER = (
    r"(?:マイナンバー|個人番号|My ?Number|my ?number)[^0-9\n]{0,12}"
    rf"(?P<pii>[0-9]{{4}}(?:{_GAP}{{0,3}}[0-9]{{4}}){{2}})(?![0-9])"
)
_ABROAD = rf"(?:\+81|0081(?<![0-9]0081)(?<![0-9]\.0081))(?:{_GAP}{{0,3}}[0-9]){{9,11}}(?![0-9])"

DEFAULT_PATTERNS: tuple[Pattern, ...] = (
    Pattern("PRIVATE_KEY", re.compile(_PEM)),
    Pattern("PASSWORD", re.compile(_USERINFO)),  # メールアドレスより先に見る
    Pattern("PASSWORD", _named(_PASSWORD), is_secret),
    Pattern(
        "PASSWORD", re.compile(rf"(?:{_PASSWORD})[\s:=は]{{1,4}}(?P<pii>[0-9]{{4,}})(?![\w-])")
    ),
    Pattern("API_KEY", _named(_KEY), is_secret),
    Pattern("API_KEY", re.compile(_AUTHORIZATION)),
    Pattern(
        "API_KEY",
        re.compile(
            rf"(?:{_API_KEY})(?:(?<!sk-)|(?=[A-Za-z_-]{{0,40}}[0-9]))[A-Za-z0-9_./-]{{16,}}"
        ),
    ),
    Pattern("API_KEY", re.compile(_JWT)),
    Pattern("EMAIL", re.compile(_EMAIL), hint="@"),
    Pattern("MY_NUMBER", re.compile(_NAMED_MY_NUMBER)),
    Pattern("PHONE", re.compile(_ABROAD)),
    *_NUMBERS,
)
"""既定で隠すもの: 秘密鍵、パスワード、API キー、メールアドレス、カード番号、個人番号、国内の
電話番号。"""
