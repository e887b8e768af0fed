"""文字列・辞書・リストの中の個人情報を見つけて置き換える(標準ライブラリーだけを使う)。"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from .patterns import Found, Pattern, is_secret, secret_label

# 幅のない文字。読む人には見えない
_UNSEEN = r"\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff"
_SLASH = r"(?:\\|%5[Cc])"
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"""
    {_SLASH}{{1,8}} u(?P<code>{_HEX}{{4}})                                  # JSON の "\\u3042"
    | {_SLASH}{{1,8}} x[c-fC-F]{_HEX} (?:{_SLASH}{{1,8}} x[89abAB]{_HEX})+  # bytes の 1 文字
    | {_SLASH}{{1,8}} x{_HEX}{{2}}
    | {_SLASH}{{1,8}} [nrt]                                                 # 改行とタブ
    | %[c-fC-F]{_HEX} (?:%[89abAB]{_HEX})+                            # URL の 1 文字
    | %(?:25)* (?!25){_HEX}{{2}}                                      # "%40"、"%2540"
    | [{_UNSEEN}]
    """,
    re.VERBOSE,
)
_MAY_ESCAPE = re.compile(rf"[\\%{_UNSEEN}]")
_FULL_WIDTH = re.compile("[！-～]+")
_HALF_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}

Path = tuple[str, ...]
Place = tuple[Any, Any]  # 文字列を持つ辞書かリストと、その中のキー


def _decoded(escape: re.Match[str]) -> str:
    """エスケープが表す 1 文字。幅のない文字は消す。"""
    if escape["code"]:
        char = chr(int(escape["code"], 16))
    elif codes := re.sub(r"(?i)%5C|%25|[^0-9a-f]", "", escape[0]):
        encoding = "utf-8" if len(codes) > 2 else "latin-1"
        char = bytes.fromhex(codes).decode(encoding, "replace")[:1]
    else:
        char = escape[0] if len(escape[0]) == 1 else " "
    return "" if re.match(f"[{_UNSEEN}]", char) else char


def _plain(text: str) -> str:
    """エスケープを 1 段解き、半角にした文。"""
    if _MAY_ESCAPE.search(text):
        text = _ESCAPE.sub(_decoded, text)
    return _FULL_WIDTH.sub(lambda found: found[0].translate(_HALF_WIDTH), text)


def _places(text: str) -> list[int]:
    """``_plain(text)`` の 1 文字ずつの、元の文での位置(末尾も含む)。"""
    places: list[int] = []
    end = 0
    for escape in _ESCAPE.finditer(text):
        places += range(end, escape.start())
        places += [escape.start()] * len(_decoded(escape))
        end = escape.end()
    return [*places, *range(end, len(text) + 1)]


def _replaced(text: str, spans: list[Found], new: Callable[[Found], str]) -> str:
    pieces: list[str] = []
    end = 0
    for one in spans:
        pieces += [text[end : one.start], new(one)]
        end = one.end
    return "".join([*pieces, text[end:]])


def _copied(value: Any, path: Path, pieces: dict[Path, list[Place]]) -> Any:
    """辞書とリストの写し。リストの中の文字列は、同じ場所のものどうしを ``pieces`` に集める。"""
    if isinstance(value, Mapping):
        copy: Any = {}
        items: Iterable[tuple[Any, Any]] = cast("Mapping[Any, Any]", value).items()
    elif isinstance(value, list | tuple | set | frozenset):
        copy = [None] * len(cast("list[Any]", value))
        items = enumerate(cast("Iterable[Any]", value))
    else:
        return value
    for key, item in items:
        place = (*path, "*" if isinstance(copy, list) else str(key))
        copy[key] = _copied(item, place, pieces)
        if isinstance(item, str) and "*" in place:
            pieces[place].append((copy, key))
    return copy


class Pass:
    """1 回の置き換え。同じ文字列は一度だけ調べる。"""

    def __init__(self, patterns: tuple[Pattern, ...], masked: Counter[str]) -> None:
        self._patterns = patterns
        self._masked = masked
        self._known: dict[str, list[Found]] = {}

    def value(self, value: Any) -> Any:
        """辞書やリストの、中の文字列を置き換えた写し。"""
        pieces: dict[Path, list[Place]] = defaultdict(list)
        copy = _copied(value, (), pieces)
        for places in pieces.values():
            self._gather(places)
        return self._changed(copy, "")

    def text(self, text: str) -> str:
        """文字列を置き換える。"""
        found = self._find(text)
        self._masked.update(one.label for one in found)
        return _replaced(text, found, lambda one: f"[{one.label}]")

    def _find(self, text: str) -> list[Found]:
        if text not in self._known:
            self._known[text] = self._search(text)
        return self._known[text]

    def _search(self, text: str) -> list[Found]:
        plain = _plain(text)
        result: list[Found] = []
        for pattern in self._patterns:
            if found := pattern.find(plain):
                result += found
                # 見つけたところは、同じ長さの、どの規則にも合わない文字にする
                plain = _replaced(plain, found, lambda one: "\0" * (one.end - one.start))
        if result and len(plain) != len(text):
            places = _places(text)
            result = [Found(places[start], places[end], label) for start, end, label in result]
        return sorted(result)

    def _gather(self, places: list[Place]) -> None:
        """ストリーミングの断片にまたがるものを、その最初の断片に集める(残りは空にする)。"""
        texts = [owner[key] for owner, key in places]
        joined = "".join(texts)
        if len(texts) < 2 or not (found := self._find(joined)):
            return
        piece_of = [index for index, text in enumerate(texts) for _ in text]
        for start, end, _ in reversed(found):
            first, last = piece_of[start], piece_of[end - 1]
            # 番号を並べただけのリスト。つないだ 10 桁と 12 桁は、偶然に合いすぎる
            by_chance = joined.isdigit() and end - start in (10, 12)
            if first < last and not by_chance:
                texts[first : last + 1] = ["".join(texts[first : last + 1])] + [""] * (last - first)
        for (owner, key), text in zip(places, texts, strict=True):
            owner[key] = text

    def _changed(self, value: Any, label: str) -> Any:
        """``label`` は、値を丸ごと隠すキーの中にあるとき、その種類。"""
        if isinstance(value, dict):
            return self._entries(cast("dict[Any, Any]", value), label)
        if isinstance(value, list):
            return [self._changed(item, label) for item in cast("list[Any]", value)]
        if isinstance(value, bool | float) or value is None:
            return value
        text = str(value)
        is_count = label == "API_KEY" and isinstance(value, int)  # {"token": 128}
        if label and is_secret(text) and not is_count:
            self._masked[label] += 1
            return f"[{label}]"
        masked = self.text(text)
        return value if masked == text and isinstance(value, int) else masked

    def _entries(self, entries: dict[Any, Any], label: str) -> dict[Any, Any]:
        """キーも置き換える。同じになったキーには番号を付け、1 件も失わない。"""
        result: dict[Any, Any] = {}
        for key, item in entries.items():
            name = masked = self.text(str(key)) if isinstance(key, str | int | tuple) else key
            while name in result:
                name = f"{masked} ({len(result) + 1})"
            result[name] = self._changed(item, label or secret_label(str(key)))
        return result
