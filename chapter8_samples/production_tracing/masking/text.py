"""文字列・辞書・リストの中の個人情報を見つけて置き換える(標準ライブラリーだけを使う)。"""

from __future__ import annotations

import html
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from .patterns import (
    AFTER,
    DEFAULT_PATTERNS,
    KEY_NAME,
    LONG_NUMBER,
    PASSWORD_NAME,
    Pattern,
    unmasked,
)

# 半角にして同じ規則で見つける文字: 全角、漢数字、数字の後のハイフン・罫線・長音記号・中黒
_HYPHENS = (
    *(0x007E, 0x02D7, *range(0x2010, 0x2016), 0x2043, 0x2212, 0x2500, 0x2501),
    *(0x301C, 0x30FC, 0xFE58, 0xFE63, 0xFF70),
)
_DOTS = (0x00B7, 0x2022, 0x2027, 0x2219, 0x30FB, 0xFF65)
_KANJI = "〇一二三四五六七八九"
_HALF_WIDTH = {
    **{0xFF01 + i: 0x21 + i for i in range(94)},
    **dict.fromkeys(_HYPHENS, "-"),
    **dict.fromkeys(_DOTS, "."),
    ord("+"): " ",  # URL の空白
    **{ord(char): str(value) for value, char in enumerate(_KANJI)},
}
_MARKS = re.escape("".join(map(chr, (*_HYPHENS, *_DOTS))))
_WIDE = re.compile(
    rf"[！-～{_KANJI}{_MARKS}+](?:(?<=[！-～])[！-～]*|(?<=[{_KANJI}])[{_KANJI}]+"
    rf"|(?<=[\d\s()（）{_KANJI}][{_MARKS}])|(?<=[\d)]\+)(?=[\d(]))"
)
# 文字を別の書き方にしたもの: JSON や repr の "\\u3042" と "\\n"、URL の "%40"、HTML の "&#64;"。
# 幅のない文字は、読む人には見えない
_UNSEEN = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u20e3\ufe00-\ufe0f\ufeff"
_HEX = "[0-9a-fA-F]"
_ESCAPED = re.compile(
    rf"[\\%&{_UNSEEN}](?:(?<=\\)\\{{0,8}}(?:"
    rf"u{_HEX}{{4}}(?:(?<!u[dD]...)(?:\\+u(?![dD][89a-fA-F]){_HEX}{{4}})+)?"
    rf"|x[c-fC-F]{_HEX}(?:\\+x[89abAB]{_HEX})+|x{_HEX}{{2}}|[nrtfv])"
    rf"|(?<=%)(?:[c-fC-F]{_HEX}(?:%[89abAB]{_HEX})+|{_HEX}{{2}})"
    rf"|(?<=&)(?:#\d{{1,7}}|#[xX]{_HEX}{{1,6}}|amp|nbsp|commat|period|hyphen);"
    rf"|(?<=[{_UNSEEN}])[{_UNSEEN}]*)"
)
_DEPTH = 3  # "%2540" や、JSON の中の JSON
# 既定の規則では何も見つからない文字列を、すぐに終える
_MAYBE = re.compile(r"[0-9０-９〇一二三四五六七八九@＠:：=＝\\%&]|[A-Za-z0-9_-]{16}|BEGIN")
# ストリーミングの断片を並べたもの: JSON や repr の同じ名前の値と、"data: " の行
_FRAME = re.compile(
    r"""(?:([A-Za-z_](?<![0-9A-Za-z_].)\w{0,30})\\*["']?\s?[:=]\s?|(?<![0-9A-Za-z_])b)"""
    r"""(\\*["'])(?P<value>(?:(?!\2)[^\n])*)\2|^data: ?(?P<line>[^\n"'{\[]+)""",
    re.MULTILINE,
)
_PIECE = 40  # 断片の平均の長さ。もっと長い値の並びは、記録の一覧
_FRAMED = ('":', "':", "='", '="', "b'", 'b"', "data:")


class Found(NamedTuple):
    """隠す範囲。"""

    start: int
    end: int
    label: str


def _decoded(escape: str) -> str:
    body = escape.lstrip("\\")
    if escape[0] in "%&":
        return html.unescape(unquote(escape, errors="replace"))
    if body == escape:
        return ""  # 幅のない文字
    if body[0] == "u":
        codes = body.replace("\\", "").replace("u", "")
        return bytes.fromhex(codes).decode("utf-16-be", "surrogatepass")
    if body[0] == "x":
        codes = body.replace("\\", "").replace("x", "")
        return bytes.fromhex(codes).decode("utf-8" if len(codes) > 2 else "latin-1", "replace")
    return " "


def unescaped(text: str) -> tuple[str, list[int]]:
    """エスケープを 1 段解いた文と、その 1 文字ずつの、元の文での位置(末尾も含む)。"""
    pieces: list[str] = []
    places: list[int] = []
    end = 0
    for found in _ESCAPED.finditer(text):
        chars = _decoded(found[0])
        pieces += [text[end : found.start()], chars]
        places += range(end, found.start())
        width = len(found[0]) // max(1, len(chars))
        places += range(found.start(), found.start() + width * len(chars), width or 1)
        end = found.end()
    return "".join([*pieces, text[end:]]), [*places, *range(end, len(text) + 1)]


def folded(text: str) -> tuple[str, Sequence[int]]:
    """半角にし、エスケープを解いた文と、その 1 文字ずつの、元の文での位置。"""
    places: Sequence[int] = range(len(text) + 1)
    for _ in range(_DEPTH):
        if not _ESCAPED.search(text):
            break
        text, inner = unescaped(text)
        places = [places[place] for place in inner]
    return _WIDE.sub(lambda found: found[0].translate(_HALF_WIDTH), text), places


def merged(found: Iterable[Found]) -> list[Found]:
    """始まりの順に並べ、重なった範囲を 1 つにしたもの。"""
    result: list[Found] = []
    for one in sorted(found, key=lambda one: (one.start, -one.end)):
        if result and one.start < result[-1].end:
            last = result.pop()
            one = Found(last.start, max(last.end, one.end), last.label or one.label)
        result.append(one)
    return result


def _cut(found: Iterable[Found], parts: list[tuple[int, int]]) -> Iterator[tuple[int, Found]]:
    """つないだ文の中の範囲を、つなぐ前の ``parts``(始まりと終わり)ごとに分ける。

    ``(何番目か, その中の範囲)``。ラベルは最初の部分だけに置き、残りは消す。
    """
    offsets = list(accumulate((end - start for start, end in parts), initial=0))
    for start, end, label in found:
        index = bisect_right(offsets, start) - 1
        while index < len(parts) and offsets[index] < end:
            first, last = max(start, offsets[index]), min(end, offsets[index + 1])
            if first < last:
                yield index, Found(first - offsets[index], last - offsets[index], label)
                label = ""
            index += 1


def _frames(text: str) -> list[list[tuple[int, int]]]:
    """同じ名前の値が繰り返す文での、名前ごとの値の位置。"""
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for found in _FRAME.finditer(text) if any(mark in text for mark in _FRAMED) else ():
        part = "line" if found["line"] else "value"
        places[found[1] or part].append(found.span(part))
    return [parts for parts in places.values() if len(parts) > 1]


Path = tuple[str, ...]


@dataclass
class Leaf:
    """辞書やリストの中の 1 つの文字列(か数)。"""

    value: Any
    text: str
    path: Path
    found: list[Found] = field(default_factory=list[Found])


@dataclass
class Json:
    """リストの中の、JSON の文字列。"""

    text: str
    plain: Any
    tree: Any


Groups = dict[Path, list[Leaf]]


def _tree(value: Any, path: Path, label: str, groups: Groups) -> Any:
    """文字列を ``Leaf`` に替えた写し。リストの中で同じ場所にあるものは、同じ組に入れる。"""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        return {
            key: _tree(item, (*path, str(key)), label or _secret(key, item, items), groups)
            for key, item in items.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = cast("Iterable[Any]", value)
        return [_tree(item, (*path, _place(item)), label, groups) for item in items]
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, str) and _in_list(path) and (plain := _parsed(value)) is not None:
        return Json(value, plain, _tree(plain, path, label, groups))
    return _leaf(value, path, label, groups)


def _leaf(value: Any, path: Path, label: str, groups: Groups) -> Leaf:
    leaf = Leaf(value, value if isinstance(value, str) else str(value), path)
    counted = label == "API_KEY" and isinstance(value, int)  # {"token": 128}
    if label and not counted and leaf.text and unmasked(leaf.text):
        leaf.found = [Found(0, len(leaf.text), label)]
    if not (_in_list(path) and isinstance(value, str)):  # 数のリストは、断片ではない
        groups[()].append(leaf)
        return leaf
    # 並行する回答の番号("index")ごとと、番号によらずに並べたものの、両方で探す
    for place in {path, tuple("*" if name[:1] == "*" else name for name in path)}:
        groups[place].append(leaf)
    return leaf


def _in_list(path: Path) -> bool:
    return any(name[:1] == "*" for name in path)


def _place(item: Any) -> str:
    index = cast("Any", item).get("index") if isinstance(item, Mapping) else None
    return "*" if index is None else f"*{index}"


def _parsed(text: str) -> Any:
    if text[:1] not in ("{", "[", '"'):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _secret(key: object, item: Any, owner: Mapping[Any, Any]) -> str:
    """値を丸ごと隠すキーなら、そのラベル。"""
    name = str(key)
    if isinstance(item, Mapping) and cast("Any", item).get("type") in _SCHEMA_TYPES:
        return ""  # ツールの引数の定義
    if PASSWORD_NAME.search(name):
        return "PASSWORD"
    return "API_KEY" if KEY_NAME.search(name) and "logprob" not in owner else ""


_SCHEMA_TYPES = ("string", "integer", "number", "boolean", "array", "object")
_NUMBER = re.compile(r"[\d\W]{10,40}")


class Rules:
    """隠す順に並べた規則。"""

    def __init__(self, patterns: tuple[Pattern, ...]) -> None:
        hints = {hint for pattern in patterns for hint in pattern.hints}
        self._hints = re.compile("|".join(map(re.escape, hints)) or "(?!)")
        self._plain = [pattern for pattern in patterns if not pattern.hints]
        self._patterns = patterns
        self.maybe = _MAYBE if patterns == DEFAULT_PATTERNS else re.compile("")

    def for_text(self, plain: str) -> Sequence[Pattern]:
        """``plain`` に合うことがありうる規則。"""
        lower = plain.lower()
        if not self._hints.search(lower):
            return self._plain
        letters = lower.encode("ascii", "ignore").decode()  # 日本語の文では、ずっと短い
        return [pattern for pattern in self._patterns if pattern.may_match(lower, letters)]


class Pass:
    """1 回の置き換え。同じ文字列は一度だけ調べる。"""

    def __init__(self, rules: Rules, masked: Counter[str]) -> None:
        self._rules = rules
        self._masked = masked
        self._known: dict[str, list[Found]] = {}

    def text(self, text: str) -> str:
        """文字列を置き換える。"""
        return self._replaced(text, self.find(text))

    def value(self, value: Any) -> Any:
        """辞書やリストの、中の文字列を置き換えた写し。"""
        groups: Groups = defaultdict(list)
        tree = _tree(value, (), "", groups)
        for path, leaves in groups.items():
            for leaf in leaves:
                leaf.found = leaf.found or self._find_in(leaf)
            if len(leaves) > 1 and path:
                self._find_across(leaves)
        return self._finished(tree)

    def find(self, text: str) -> list[Found]:
        """隠す範囲。"""
        if text not in self._known:
            self._known[text] = self._search(text) if self._rules.maybe.search(text) else []
        return self._known[text]

    def _find_in(self, leaf: Leaf) -> list[Found]:
        """番号だけの値は、キー("order_id" など)と並べて調べる。"""
        if not _NUMBER.fullmatch(leaf.text):
            return self.find(leaf.text)
        key = next((name for name in reversed(leaf.path) if name[:1] != "*"), "")
        head = len(key) + 2
        found = self.find(f"{key}: {leaf.text}")
        return [Found(a - head, b - head, label) for a, b, label in found if a >= head]

    def _find_across(self, leaves: list[Leaf]) -> None:
        """リストの隣どうしに分かれたもの(ストリーミングの断片)を、つないで調べる。"""
        ends = list(accumulate(len(leaf.text) for leaf in leaves))
        parts = [(end - len(leaf.text), end) for end, leaf in zip(ends, leaves, strict=True)]
        joined = "".join(leaf.text for leaf in leaves)
        own = [
            Found(start + a, start + b, label)
            for (start, _), leaf in zip(parts, leaves, strict=True)
            for a, b, label in leaf.found
        ]
        across = self._search(joined)
        if joined.isdigit():  # 番号を並べただけのリスト。10 桁と 12 桁は、偶然に合いすぎる
            across = [one for one in across if one.end - one.start not in (10, 12)]
        for leaf in leaves:
            leaf.found = []
        for index, one in _cut(merged([*own, *across]), parts):
            leaves[index].found.append(one)

    def _search(self, text: str) -> list[Found]:
        return merged([*self._match(text), *self._match_frames(text)])

    def _match_frames(self, text: str) -> Iterator[Found]:
        for parts in _frames(text):
            joined = "".join(text[start:end] for start, end in parts)
            if joined.isdigit() or len(joined) > _PIECE * len(parts):
                continue
            for one in self._match(joined):
                cuts = list(_cut([one], parts))
                for index, (start, end, label) in cuts if len(cuts) > 1 else ():
                    yield Found(parts[index][0] + start, parts[index][0] + end, label)

    def _match(self, text: str) -> list[Found]:
        plain, places = folded(text)
        result: list[Found] = []
        everywhere = [(0, len(plain))]
        numbers = [
            (max(0, found.start() - 1), found.end() + AFTER)
            for found in LONG_NUMBER.finditer(plain)
        ]
        for pattern in self._rules.for_text(plain):
            ranges = numbers if pattern.numeric else everywhere
            if spans := [span for one in ranges for span in pattern.find(plain, *one)]:
                result += (Found(places[a], places[b], pattern.label) for a, b in spans)
                plain = _blanked(plain, spans)
        return merged(result)

    def _replaced(self, text: str, found: list[Found]) -> str:
        whole = found and found[0].end - found[0].start == len(text)
        if found and not whole and (plain := _parsed(text)) is not None:  # JSON のまま返す
            text = json.dumps(self.value(plain), ensure_ascii=text.isascii())
            found = merged(self._match_frames(text))
        pieces: list[str] = []
        end = 0
        for one in found:
            pieces += [text[end : one.start], one.label and f"[{one.label}]"]
            end = one.end
            self._masked.update([one.label] if one.label else [])
        return "".join([*pieces, text[end:]])

    def _finished(self, node: Any) -> Any:
        if isinstance(node, dict):
            return self._entries(cast("dict[Any, Any]", node))
        if isinstance(node, list):
            return [self._finished(item) for item in cast("list[Any]", node)]
        if isinstance(node, Json):
            result = self._finished(node.tree)
            if result == node.plain:
                return node.text
            return json.dumps(result, ensure_ascii=node.text.isascii())
        if not isinstance(node, Leaf):
            return node
        if node.found:
            return self._replaced(node.text, node.found)
        return node.value if isinstance(node.value, str | int) else node.text

    def _entries(self, node: dict[Any, Any]) -> dict[Any, Any]:
        """キーも置き換える。同じになったキーには番号を付け、1 件も失わない。"""
        result: dict[Any, Any] = {}
        for key, item in node.items():
            name = changed = self.text(str(key)) if isinstance(key, str | int | tuple) else key
            while name in result:
                name = f"{changed} ({len(result) + 1})"
            result[name] = self._finished(item)
        return result


def _blanked(text: str, spans: list[tuple[int, int]]) -> str:
    """見つけたところを、同じ長さの、どの規則にも合わない文字にする。"""
    pieces: list[str] = []
    end = 0
    for start, last in spans:
        pieces += [text[end:start], "\0" * (last - start)]
        end = last
    return "".join([*pieces, text[end:]])
