"""型スタブ(``chapter8_samples/節/*.pyi``)を作り直す。

番号付きフォルダーの中は、型チェッカーからは見えない。そこで、節の公開名(``__init__.pyi``)と
本書の各ファイル(1 枚ずつ)の型だけをスタブにする。公開名や型を変えたら実行する::

    python tests/make_stubs.py
"""

from __future__ import annotations

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "chapter8_samples"
FOLDERS = {path.name[3:]: path for path in sorted(SOURCE.glob("0[1-5]_*"))}


def stubs() -> dict[Path, str]:
    """スタブのファイル -> 中身。"""
    found = {}
    for section, folder in FOLDERS.items():
        modules = import_module(f"chapter8_samples.{section}")._MODULES
        found[SOURCE / section / "__init__.pyi"] = exports(modules)
        for page in sorted(folder.glob("[a-z]*.py")):
            source = page.read_text(encoding="utf-8")
            # スタブは節のフォルダーに置く。節ごと別のパッケージに写しても通じるよう、相対にする
            source = re.sub(rf"\bchapter8_samples\.{section}\b\.?", ".", source)
            found[SOURCE / section / f"{page.stem}.pyi"] = stub(source)
    return found


def exports(modules: dict[str, str]) -> str:
    """節の ``__init__.py`` の表を、型チェッカーに読める import にしたもの。"""
    lines = [
        f"from .{module} import {name} as {name}\n"
        for module, names in modules.items()
        for name in names.split()
    ]
    names = sorted(name for names in modules.values() for name in names.split())
    return "".join(sorted(lines)) + f"\n__all__ = {names}\n"


def stub(source: str) -> str:
    """ページの構文木から、公開名と、その型に要るものだけを残したもの。"""
    tree = ast.parse(source)
    summary = (ast.get_docstring(tree) or "").split("\n")[0]
    tree = Signatures().visit(tree)
    tree.body = needed(typed_statements(tree.body))
    lines = (line.rstrip() for line in ast.unparse(tree).splitlines())
    return "\n".join([f'"""{summary}"""', "", *lines]) + "\n"


def typed_statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """``if TYPE_CHECKING`` の中も含む、モジュールの文。"""
    kept: list[ast.stmt] = []
    for line in body:
        if isinstance(line, ast.If):
            kept += [] if "__main__" in ast.unparse(line.test) else line.body
        else:
            kept.append(line)
    return kept


def needed(body: list[ast.stmt]) -> list[ast.stmt]:
    """公開名と、そこから参照される import や非公開の定義。"""
    kept = [line for line in body if is_public(line)]
    while more := [line for line in body if line not in kept and defined(line) & used(kept)]:
        kept += more
    names = used(kept)
    for line in kept:
        if isinstance(line, (ast.Import, ast.ImportFrom)):
            line.names = [a for a in line.names if is_export(a) or bound(a) in names]
    return [line for line in body if line in kept]


def is_public(line: ast.stmt) -> bool:
    if isinstance(line, (ast.Import, ast.ImportFrom)):
        return any(map(is_export, line.names))
    return any(not name.startswith("_") or name == "__all__" for name in defined(line))


def is_export(alias: ast.alias) -> bool:
    """``import x as x`` の形。型チェッカーは、これだけを公開名とみなす。"""
    return alias.asname == alias.name


def bound(alias: ast.alias) -> str:
    return (alias.asname or alias.name).split(".")[0]


def defined(line: ast.stmt) -> set[str]:
    """文が定義する名前。"""
    if isinstance(line, (ast.Import, ast.ImportFrom)):
        return set(map(bound, line.names))
    if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {line.name}
    targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
    return used([target for target in targets if target])


def used(nodes: list[ast.stmt]) -> set[str]:
    """文の中に出てくる名前(文字列で書かれた型も)。"""
    inner = [node for line in nodes for node in ast.walk(line)]
    quoted = {str(node.value) for node in inner if isinstance(node, ast.Constant)}
    return quoted | {node.id for node in inner if isinstance(node, ast.Name)}


class Signatures(ast.NodeTransformer):
    """関数の中身を docstring と ``...`` だけにする。``__init__`` には属性の型を残す。"""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        kept = node.body[:1] if ast.get_docstring(node) else []
        if node.name == "__init__":
            kept += filter(None, map(attribute, node.body))
        node.body = kept or [ast.Expr(ast.Constant(...))]
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.stmt:
        yields = any(isinstance(inner, ast.Yield) for inner in ast.walk(node))
        node.body = node.body[:1] if ast.get_docstring(node) else [ast.Expr(ast.Constant(...))]
        if not yields:
            return node
        # yield がなくなると型が変わるので、async を外す
        plain = ast.FunctionDef(**{field: getattr(node, field) for field in node._fields})
        return ast.copy_location(plain, node)


def attribute(line: ast.stmt) -> ast.stmt | None:
    """``self.x = ...`` のうち、型が分かるもの: 注釈つき、引数そのもの、``Class(...)``。"""
    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Attribute):
        line.value = None
        return line
    if not isinstance(line, ast.Assign) or not isinstance(line.targets[0], ast.Attribute):
        return None
    if isinstance(line.value, ast.Name):
        return line
    made = line.value.func if isinstance(line.value, ast.Call) else None
    if isinstance(made, ast.Name) and made.id[0].isupper():
        return ast.AnnAssign(line.targets[0], made, None, simple=0)
    return None


def write() -> None:
    for old in SOURCE.glob("*/*.pyi"):
        old.unlink()
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write()
