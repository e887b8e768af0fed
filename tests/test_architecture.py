"""chapter8_samples/README.md の構成図が、実際の import と一致すること。"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from samples import ROOT

from chapter8_samples._sections import SECTIONS

PACKAGE = ROOT / "chapter8_samples"
FOLDERS = dict(SECTIONS)
Edge = tuple[str, str, str]


def drawn_edges() -> set[Edge]:
    """図の矢印: (使う側, ``-->`` か ``-.->``, 使われる側)。"""
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## 構成図.*?```mermaid\n(.*?)```", text, re.DOTALL)
    assert block, "no mermaid block under 構成図"
    labels = re.findall(r'(\w+)\["([\w.]+)', block[1])
    names = {node: label.removesuffix(".py") for node, label in labels}
    arrows = re.findall(r"^ *(\w+) (-->|-\.->)(?:\|[^|]*\|)? (.+)$", block[1], re.MULTILINE)
    return {
        (names[source], arrow, names[target])
        for source, arrow, targets in arrows
        for target in targets.split(" & ")
    }


def imported_edges() -> set[Edge]:
    """実際の import。関数の中だけで読み込むものは点線。"""
    found = {
        (part_of(path), arrow, target)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in FOLDERS  # 別名のフォルダー(自動生成)
        for arrow, target in imports(path)
    }
    found = {edge for edge in found if edge[0] != edge[2]}
    return {(a, arrow, b) for a, arrow, b in found if arrow == "-->" or (a, "-->", b) not in found}


def imports(path: Path) -> set[tuple[str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in top_level(tree.body)}
    return {
        ("-->" if id(node) in top else "-.->", target)
        for node in ast.walk(tree)
        for name in imported_names(node, path)
        if (target := part_named(name))
    }


def top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    nested = [inner for node in body if isinstance(node, ast.If) for inner in node.body]
    return body + (top_level(nested) if nested else [])


def imported_names(node: ast.AST, path: Path) -> list[str]:
    """``chapter8_samples`` から数えた、読み込むモジュールの名前。"""
    if isinstance(node, ast.Import):
        return [alias.name.partition("chapter8_samples.")[2] for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level == 0:
        if module.partition(".")[0] != "chapter8_samples":
            return []
        base = module.partition("chapter8_samples")[2].strip(".")
    else:
        inside = path.relative_to(PACKAGE).parent.parts
        base = ".".join([*inside[: len(inside) - node.level + 1], *filter(None, [module])])
    return [base] if base else [alias.name for alias in node.names]


def part_named(name: str) -> str | None:
    first = name.partition(".")[0]
    if first in FOLDERS:
        return FOLDERS[first]
    return first if first in {"_lab", "_sections", *FOLDERS.values()} else None


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_drawing_shows_the_imports() -> None:
    drawn, imported = drawn_edges(), imported_edges()
    assert drawn == imported, f"draw {imported - drawn}; remove {drawn - imported}"
