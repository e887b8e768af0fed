"""端末への表示: 全角混じりでも桁のそろう表と、1 行ずつ進む手順。"""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


def width(text: str) -> int:
    """端末での表示幅。全角は 2 桁、結合文字は 0 桁。

    >>> width("コスト(USD)"), width("ok")
    (11, 2)
    """
    columns = 0
    for character in text:
        if not unicodedata.combining(character):
            columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return columns


def pad(text: str, size: int, align: str = "<") -> str:
    """表示幅 ``size`` になるまで空白を足す。``align`` は ``<`` か ``>``。"""
    space = " " * max(0, size - width(text))
    return space + text if align == ">" else text + space


def shortened(text: str, size: int) -> str:
    """表示幅 ``size`` に収まるように、長い文字列の後ろを省く。

    >>> shortened("みどり商店のお客様", 11), shortened("ok", 11)
    ('みどり商店…', 'ok')
    """
    if width(text) <= size:
        return text
    while width(text) > size - 1:
        text = text[:-1]
    return text + "…"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """全角混じりでも桁がそろう表。``align`` は列ごとの ``<`` か ``>``。

    >>> print(table(["モデル", "コスト"], [["gpt-4o", "$0.01"]], "<>"))
    モデル  コスト
    ------  ------
    gpt-4o   $0.01
    """
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    sizes = [max(map(width, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * size for size in sizes])
    aligns = align or "<" * len(sizes)
    return "\n".join("  ".join(map(pad, line, sizes, aligns)).rstrip() for line in lines)


def color(text: str, code: str) -> str:
    """端末に直接出すときだけ色を付ける(``NO_COLOR`` があれば付けない)。"""
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


class CheckFailed(AssertionError):
    """手順が自分の結果を確かめて、合わなかった。"""


def check(what: str, actual: object, expected: object) -> None:
    """結果が期待どおりでなければ、両方の値を示して失敗する。"""
    if actual != expected:
        raise CheckFailed(f"{what}: {actual!r} (期待値 {expected!r})")


@dataclass(frozen=True)
class Step:
    """シナリオの 1 手順。``run`` は結果を 1 行で返し、合わなければ ``CheckFailed`` を投げる。"""

    section: str
    title: str
    run: Callable[[], str]


def run_steps(steps: Sequence[Step]) -> int:
    """手順を順に実行し、失敗した数を返す。失敗しても最後まで続ける。"""
    section = max(width(step.section) for step in steps)
    title = max(width(step.title) for step in steps)
    failed = 0
    for number, step in enumerate(steps, 1):
        head = f"[{number:2}/{len(steps)}] {pad(step.section, section)} {pad(step.title, title)} "
        print(head, end="", flush=True)
        started = time.perf_counter()
        try:
            note = step.run()
            mark = color("OK", "32")
        except Exception as error:
            note = describe(error)
            mark = color("NG", "31")
            failed += 1
        print(f"{mark} {time.perf_counter() - started:5.1f}s  {note}", flush=True)
    return failed


def describe(error: Exception) -> str:
    """1 行に収めたエラーの説明。"""
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckFailed) else f"{type(error).__name__}: {text}"
