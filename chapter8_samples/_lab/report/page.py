"""1 ファイルの HTML レポート。印刷にも、暗い画面にも、携帯の画面にも合わせる。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    tables: Sequence[Table] = field(default=())


def link(text: str, url: str) -> Markup:
    """``url`` があればリンクにする。どちらも途中で折り返さない。"""
    if url:
        return Markup('<a href="{}">{}</a>').format(url, text)
    return Markup('<span class="id">{}</span>').format(text)


def write_report(
    path: Path,
    *,
    title: str,
    subtitle: str,
    cards: Sequence[Card],
    sections: Sequence[Section],
    notes: Sequence[str] = (),
) -> Path:
    """レポートを書き、そのパスを返す。"""
    environment = Environment(
        loader=PackageLoader("chapter8_samples._lab.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        title=title, subtitle=subtitle, cards=cards, sections=sections, notes=notes
    )
    path.write_text(html, encoding="utf-8")
    return path
