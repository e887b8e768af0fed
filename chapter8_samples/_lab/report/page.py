"""1 ファイルの HTML レポート。印刷にも、暗い画面にも、携帯の画面にも合わせる。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup


@dataclass(frozen=True)
class Card:
    """ひと目で分かる数値。``ok=False`` は赤で「要確認」、``None`` は判定なし。"""

    title: str
    value: str
    note: str = ""
    ok: bool | None = None


@dataclass(frozen=True)
class Figure:
    """図と、その題。``shown=False`` は、畳んでおく。"""

    title: str
    svg: Markup
    shown: bool = False


@dataclass(frozen=True)
class Table:
    """表。``numbers`` は右に寄せる列の番号、``shown=False`` は、畳んでおく。"""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: Sequence[int] = ()
    shown: bool = False


@dataclass(frozen=True)
class Section:
    """章の 1 節分。"""

    number: str
    title: str
    comment: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


def link(text: str, url: str) -> Markup:
    """``url`` があればリンクにする。どちらも途中で折り返さない。"""
    if url:
        return Markup('<a href="{}">{}</a>').format(url, text)
    return Markup('<span class="id">{}</span>').format(text)


def write_report(
    path: Path,
    *,
    subtitle: str,
    cards: Sequence[Card],
    sections: Sequence[Section],
    notes: Sequence[str] = (),
) -> None:
    """レポートを書く。"""
    environment = Environment(
        loader=PackageLoader("chapter8_samples._lab.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        subtitle=subtitle, cards=cards, sections=sections, notes=notes
    )
    path.write_text(html, encoding="utf-8")
