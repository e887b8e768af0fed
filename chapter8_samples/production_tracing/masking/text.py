"""文字列・辞書・リストの中の個人情報を見つけて置き換える(標準ライブラリーだけを使う)。"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, lru_cache
from html import unescape
from itertools import accumulate, pairwise
from typing import Any

from .patterns import Found, Pattern, is_secret, secret_label

# 幅のない文字。読む人には見えない
_UNSEEN = r"\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff"
_SLASH = r"(?:\\|%5[Cc]){1,8}"
_HEX = "[0-9a-fA-F]"
_BYTE = rf"(?:{_SLASH}x|%(?:25)*(?!25))"  # bytes の "\\xe3" と、URL の "%E3"("%25E3")
_ESCAPE = re.compile(
    rf"{_SLASH}(?:u{_HEX}{{4}}|[nrt])|[{_UNSEEN}]|&(?:#\w{{2,6}}|[a-z]{{2,6}});"
    rf"|{_BYTE}[c-fC-F]{_HEX}(?:{_BYTE}[89abAB]{_HEX})+|{_BYTE}{_HEX}{{2}}"  # UTF-8 の 1 文字ずつ
)
_MAY_ESCAPE = re.compile(rf"[\\%&{_UNSEEN}]")
# 会話の 1 件は断片ではない("assistant" だけは、ストリームの断片にも付く)
_WHOLE_ROLES = ("user", "human", "system", "developer", "tool")
_TLD = re.compile(r"(?i)@.*\.(?:[a-z]{2}|com|net|org|info|biz|dev|app|edu|gov|shop|example|test)$")
_HALF_WIDTH = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}

Path = tuple[str, ...]


@lru_cache(4096)
def _decoded(escape: str) -> str:
    """エスケープ(HTML のものも)が表す 1 文字。幅のない文字は消す。"""
    if escape[0] == "&":
        return re.sub(f"[{_UNSEEN}]", "", unescape(escape))
    code = re.sub(r"(?i)^(?:\\|%5c)+(?=[unrtx])", "", escape)  # "%5C" だけなら、バックスラッシュ
    if code[0] == "u":
        code = chr(int(code[1:], 16))
    elif code in "nrt":
        code = " "
    elif len(code) > 1:
        values = bytes.fromhex(re.sub(r"(?i)%5c(?=x|%5c|\\)|%(?:25)+|[^0-9a-f]", "", code))
        code = values.decode("latin-1" if len(values) == 1 else "utf-8", "replace")[:1]
    return re.sub(f"[{_UNSEEN}]", "", code)


def _plain(text: str) -> str:
    """エスケープを 1 段解き、半角にした文。"""
    if _MAY_ESCAPE.search(text):
        text = _ESCAPE.sub(lambda escape: _decoded(escape[0]), text)
    for char in _HALF_WIDTH.keys() & set(text):
        text = text.replace(char, _HALF_WIDTH[char])
    return text


def _places(text: str) -> list[int]:
    """``_plain(text)`` の 1 文字ずつの、元の文での位置(末尾も含む)。"""
    places: list[int] = []
    end = 0
    for escape in _ESCAPE.finditer(text):
        places += range(end, escape.start())
        places += [escape.start()] * len(_decoded(escape[0]))
        end = escape.end()
    return [*places, *range(end, len(text) + 1)]


def _replaced(text: str, found: list[Found], new: Callable[[int, int, str], str]) -> str:
    pieces: list[str] = []
    done = 0
    for start, end, label in found:
        pieces += [text[done:start], new(start, end, label)]
        done = end
    return "".join([*pieces, text[done:]])


def _items(value: Any) -> list[tuple[str, Any]]:
    """辞書かリストの中身。ほかのものでは空。"""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    return [("*", item) for item in value] if isinstance(value, list | tuple | set) else []


def _below(value: Any, path: Path, key: str) -> Path:
    """``value[key]`` の場所。会話の 1 件の中では、リストの中ではないものとして扱う。"""
    is_whole = isinstance(value, Mapping) and value.get("role") in _WHOLE_ROLES
    return (*(part for part in path if part != "*" or not is_whole), key)


def _email_end(text: str, start: int, end: int, borders: list[int]) -> int:
    """メールアドレスに、次の文字列("a@b.jp" の次の "OK")が続いて見えるときは、その手前。"""
    ends = [one for one in borders if start < one < end and _TLD.search(text[start:one])]
    return ends[-1] if ends and not _TLD.search(text[start:end]) else end


class Pass:
    """1 回の置き換え。同じ文字列は一度だけ調べる。"""

    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        self._patterns = patterns
        self._find = cache(self._search)
        self._pieces: dict[Path, Iterator[str]] = {}

    def value(self, value: Any, key: str = "") -> Any:
        """辞書やリストの、中の文字列を置き換えたコピー。``key`` は、値の名前。"""
        pieces: dict[Path, list[str]] = defaultdict(list)
        self._collect(value, (key,), pieces)
        self._pieces = {path: iter(self._gathered(texts)) for path, texts in pieces.items()}
        return self._masked(value, (key,))

    def text(self, text: str) -> str:
        """文字列を置き換える。"""
        return _replaced(text, self._find(text), lambda _start, _end, label: f"[{label}]")

    def _search(self, text: str) -> list[Found]:
        plain = _plain(text)
        result: list[Found] = []
        for pattern in self._patterns:
            found = pattern.find(plain)
            result += found
            # 見つけたところは、同じ長さの、どの規則にも合わない文字にする
            plain = _replaced(plain, found, lambda start, end, _label: "\0" * (end - start))
        if result and len(plain) != len(text):
            places = _places(text)
            result = [(places[start], places[end], label) for start, end, label in result]
        return sorted(result)

    def _collect(self, value: Any, path: Path, pieces: dict[Path, list[str]]) -> None:
        """リストの中の文字列を、同じ場所のものどうしで ``pieces`` に集める。"""
        if isinstance(value, str) and "*" in path:
            pieces[path].append(value)
        for key, item in _items(value):
            self._collect(item, _below(value, path, key), pieces)

    def _gathered(self, texts: list[str]) -> list[str]:
        """断片を、つないだ文の中で隠す。またがるものは、最初の断片のラベルになる。"""
        joined = "".join(texts)
        borders = list(accumulate(map(len, texts), initial=0))
        chars = list(joined)
        for start, end, label in self._find(joined):
            if label == "EMAIL":
                end = _email_end(joined, start, end, borders)
            # 番号を並べただけのリスト。つないだ 10 桁と 12 桁は、偶然に合いすぎる
            if not (joined.isdigit() and end - start in (10, 12)):
                chars[start:end] = [f"[{label}]", *[""] * (end - start - 1)]
        return ["".join(chars[start:end]) for start, end in pairwise(borders)]

    def _masked(self, value: Any, path: Path) -> Any:
        if isinstance(value, Mapping):
            return self._entries(value, path)
        if isinstance(value, list | tuple | set):
            return [self._masked(item, _below(value, path, key)) for key, item in _items(value)]
        if isinstance(value, bool | float) or value is None:
            return value
        is_piece = isinstance(value, str) and path in self._pieces
        text = next(self._pieces[path]) if is_piece else str(value)
        label = next(filter(None, map(secret_label, path)), "")
        is_count = label == "API_KEY" and isinstance(value, int)  # {"token": 128}
        if label and is_secret(text) and not is_count:
            return f"[{label}]"
        masked = self.text(text)
        return value if isinstance(value, int) and masked == text else masked

    def _entries(self, entries: Any, path: Path) -> dict[str, Any]:
        """キーも置き換える。同じになったキーには番号を付け、1 件も失わない。"""
        result: dict[str, Any] = {}
        for key, item in _items(entries):
            name = masked = self.text(key)
            while name in result:
                name = f"{masked} ({len(result) + 1})"
            result[name] = self._masked(item, _below(entries, path, key))
        return result
