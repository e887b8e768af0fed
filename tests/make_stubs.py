"""別名のフォルダー(chapter8_samples/production_tracing など)を作り直す。

番号付きフォルダーの公開名や型を変えたら実行する::

    python tests/make_stubs.py

型スタブは、サンプルの構文木から関数の中身を除いたもの。``__init__`` だけは、属性の型が
分かるように ``self.x = ...`` の行を残す。
"""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "chapter8_samples"
FORWARD = '''"""``{real}`` の別名(自動生成)。"""

from chapter8_samples import _sections

_sections.become_real(__name__)
'''


class Stub(ast.NodeTransformer):
    """関数の中身を docstring と ``...`` だけにする。"""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        kept = [line for line in node.body if node.name == "__init__" and sets_attribute(line)]
        node.body = [*docstring(node), *kept] or [ast.Expr(ast.Constant(...))]
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.stmt:
        yields = any(isinstance(inner, ast.Yield) for inner in ast.walk(node))
        node.body = docstring(node) or [ast.Expr(ast.Constant(...))]
        if not yields:
            return node
        # スタブでは yield がなくなるので、async を付けたままだと型が変わってしまう
        plain = ast.FunctionDef(**{field: getattr(node, field) for field in node._fields})
        return ast.copy_location(plain, node)


def docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    return node.body[:1] if ast.get_docstring(node) else []


def sets_attribute(line: ast.stmt) -> bool:
    if not isinstance(line, (ast.Assign, ast.AnnAssign)):
        return False
    targets = line.targets if isinstance(line, ast.Assign) else [line.target]
    names = [name for target in targets for name in ast.walk(target)]
    return any(isinstance(name, ast.Attribute) for name in names)


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """モジュールの文のうち、型に関わるもの。条件付きの import は、隣と一緒に使う形を選ぶ。"""
    kept: list[ast.stmt] = []
    for line in body:
        if isinstance(line, ast.Try):
            kept += statements(line.body)
        elif isinstance(line, ast.If):
            kept += [] if "__main__" in ast.unparse(line.test) else statements(line.body)
        elif not isinstance(line, (ast.For, ast.While, ast.With)):
            kept.append(line)
    return kept


def defined(line: ast.stmt) -> set[str]:
    """文が定義する名前。"""
    if isinstance(line, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in line.names}
    if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {line.name}
    targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
    return {name.id for target in targets if target for name in ast.walk(target) if is_name(name)}


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def reexported(alias: ast.alias) -> bool:
    """``import x as x`` の形。型チェッカーは、これだけを公開名とみなす。"""
    return alias.asname == alias.name


def used(body: list[ast.stmt]) -> set[str]:
    """文が使う名前。"""
    return {node.id for line in body for node in ast.walk(line) if isinstance(node, ast.Name)}


def needed(body: list[ast.stmt]) -> list[ast.stmt]:
    """公開名と、そこから参照される import や非公開の定義だけを残す。"""
    imports = (ast.Import, ast.ImportFrom)

    def public(line: ast.stmt) -> bool:
        if isinstance(line, imports):
            return any(map(reexported, line.names))
        return any(n[0] != "_" for n in defined(line))

    kept = [line for line in body if public(line)]
    while more := [line for line in body if line not in kept and defined(line) & used(kept)]:
        kept += more
    names = used(kept)
    for line in kept:
        if isinstance(line, imports):
            line.names = [
                a
                for a in line.names
                if reexported(a) or (a.asname or a.name).split(".")[0] in names
            ]
    return [line for line in body if line in kept]


def stub(source: str) -> str:
    """サンプルのソースから作った型スタブ。"""
    tree = ast.parse(source)
    summary = str(ast.get_docstring(tree)).split("\n")[0]
    tree = Stub().visit(ast.Module(statements(tree.body), []))
    tree.body = needed(tree.body)
    text = ast.unparse(ast.fix_missing_locations(tree))
    lines = [f'"""{summary}"""', "", *(line.rstrip() for line in text.splitlines())]
    return "\n".join(lines) + "\n"


def exported_names(source: str) -> dict[str, str]:
    """``lazy_exports`` に書かれた公開名 -> モジュール名。"""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    call = next(node for node in calls if getattr(node.func, "id", "") == "lazy_exports")
    keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    return {name: module for module, names in keywords.items() for name in str(names).split()}


def generate(target: Path) -> None:
    """``target`` の下に、別名のフォルダーを節の数だけ作る。"""
    from chapter8_samples._sections import SECTIONS

    for alias, folder in SECTIONS.items():
        out = target / alias
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for path in sorted((SOURCE / folder).glob("*.py")):
            source = path.read_text(encoding="utf-8")
            real, text = f"{folder}/{path.name}", stub(source)
            if path.stem == "__init__":
                names = sorted(exported_names(source).items())
                text = "".join(
                    f"from .{module} import {name} as {name}\n" for name, module in names
                )
                real = folder
            (out / path.name).write_text(FORWARD.format(real=real), encoding="utf-8")
            (out / f"{path.stem}.pyi").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    generate(SOURCE)
