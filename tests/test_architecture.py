"""import の向き: ページ -> 部品 -> その下の部品。``_lab`` は両方を使い、どちらからも使われない。

関数の中の import、``TYPE_CHECKING`` の中の import、文字列での import も数える。
``main()`` の中だけは、手元で動かすためのものなので除く。
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from samples import BOOK, ROOT, SECTIONS

PACKAGE = ROOT / "chapter8_samples"
NUMBERED = {folder: section for section, folder in SECTIONS.items()}


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    """絶対名(``chapter8_samples.alerting.rules.model.AlertRule``)。"""
    relative: bool
    in_main: bool


class Module:
    """1 つの .py と、その import。"""

    def __init__(self, path: Path, package: Path = PACKAGE) -> None:
        self.parts = path.relative_to(package).with_suffix("").parts
        self.folder = self.parts[0]
        self.section = NUMBERED.get(self.folder, self.folder if self.folder in SECTIONS else "")
        self.is_package = self.parts[-1] == "__init__"
        self.is_page = self.folder in NUMBERED and not self.is_package
        self.is_root = self.is_package and len(self.parts) == 2 and bool(self.section)
        self.is_command = self.parts[-1] == "__main__"
        self.is_part = self.folder in SECTIONS and not self.is_root and not self.is_command
        dotted = ["chapter8_samples", self.section or self.folder, *self.parts[1:]]
        self.name = ".".join(dotted[:-1] if self.is_package else dotted)
        self.imports = list(self._imports(ast.parse(path.read_text(encoding="utf-8"))))

    def _imports(self, tree: ast.Module) -> Iterator[Import]:
        main = [node for node in tree.body if is_demo(node)]
        inside = {id(inner) for node in main for inner in ast.walk(node)}
        for node in ast.walk(tree):
            for target, relative in self._targets(node):
                yield Import(getattr(node, "lineno", 0), target, relative, id(node) in inside)

    def _targets(self, node: ast.AST) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                here = self.name.split(".")
                up = node.level - self.is_package
                base = [*here[: len(here) - up], *base]
            yield from ((".".join([*base, alias.name]), node.level > 0) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield f"(string) {ast.unparse(node.args[0])}", False


def is_demo(node: ast.stmt) -> bool:
    """``main()`` と ``if __name__ == "__main__":``。"""
    if isinstance(node, ast.If):
        return "__main__" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef) and node.name == "main"


def called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def modules(package: Path = PACKAGE) -> dict[str, Module]:
    paths = [path for path in package.rglob("*.py") if "__pycache__" not in path.parts]
    found = [Module(path, package) for path in sorted(paths)]
    return {module.name: module for module in found if module.folder not in NUMBERED} | {
        module.name: module for module in found if module.is_page
    }


def public_home(section: str) -> dict[str, str]:
    """節の公開名 -> それを持つモジュール(公開名の import は、このモジュールの import とみなす)。"""
    package = import_module(f"chapter8_samples.{section}")
    return {f"{package.__name__}.{n}": f"{package.__name__}.{m}" for n, m in package._HOME.items()}


def home_of(target: str, known: dict[str, Module], homes: dict[str, str]) -> str:
    """import した名前を持つモジュール。プロジェクトの外なら空。"""
    if target in homes:
        return homes[target]
    while target and target not in known:
        target = target.rpartition(".")[0]
    return target


def violations(known: dict[str, Module], homes: dict[str, str]) -> Iterator[str]:
    for module in known.values():
        for used in module.imports:
            if reason := refused(module, used, known.get(home_of(used.target, known, homes))):
                yield f"{module.name}:{used.line}: {reason}: {used.target}"
    yield from cycles(known, homes)


def refused(module: Module, used: Import, target: Module | None) -> str:
    """この import を許さない理由。許すなら空。"""
    if used.target.startswith("(string)"):
        return "" if module.is_root else "imports by string"
    if target is None or not module.section or module.is_root:
        return ""
    if module.is_page and used.relative:
        return "a page imports relatively"
    if module.is_part and not used.relative:
        return "a part imports its project absolutely"
    if used.in_main and module.is_page:
        return ""
    if target.folder == "_lab":
        return "" if module.is_command else "imports _lab outside main()"
    if target.section != module.section:
        return "imports another section"
    if module.is_part and target.is_page:
        return "a part imports a page"
    if module.is_part and target.is_root:
        return "a part imports its section's __init__"
    return ""


def cycles(known: dict[str, Module], homes: dict[str, str]) -> Iterator[str]:
    """循環している import。``from .rules import model`` は ``rules.model`` だけを使う。"""
    edges = {
        name: {
            home
            for used in module.imports
            if not used.in_main and (home := home_of(used.target, known, homes)) != name
        }
        for name, module in known.items()
        if not module.is_root
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> Iterator[str]:
        if name in trail:
            yield "cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                yield from visit(target, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        yield from visit(name, [])


def test_imports_run_one_way() -> None:
    homes = {name: home for section in SECTIONS for name, home in public_home(section).items()}
    assert list(violations(modules(), homes)) == []


def test_numbered_folders_hold_the_books_files_and_nothing_else() -> None:
    for folder, book in BOOK.items():
        present = {path.name for path in (PACKAGE / folder).iterdir()} - {"__pycache__"}
        assert present == book | {"__init__.py"}, folder


def test_no_public_name_is_also_a_module() -> None:
    """``from .x import x`` をした後で、名前がモジュールと関数の間で揺れないように。"""
    known = modules()
    for package in (module for module in known.values() if module.is_package and module.section):
        inside = {n.rpartition(".")[2] for n in known if n.rpartition(".")[0] == package.name}
        names = set(getattr(import_module(package.name), "__all__", ())) | {
            used.target.rpartition(".")[2] for used in package.imports if used.target not in known
        }
        assert names & inside == set(), package.name


@pytest.mark.parametrize(
    ("file", "code", "reason"),
    [
        ("alerting/part.py", "from ..alerting.page import x", "a part imports a page"),
        ("alerting/part.py", "def f():\n    from . import page", "a part imports a page"),
        ("alerting/part.py", "from . import from_page", "a part imports a page"),
        ("alerting/part.py", "from chapter8_samples.alerting import other", "absolutely"),
        ("alerting/part.py", "from .._lab import x", "imports _lab outside main()"),
        ("alerting/part.py", "from ..cost_tracking import x", "imports another section"),
        ("alerting/part.py", "import_module('.other', __package__)", "imports by string"),
        ("alerting/part.py", "if TYPE_CHECKING:\n    from .other import x", "cycle"),
        ("04_alerting/page.py", "from .other import x", "a page imports relatively"),
        ("04_alerting/page.py", "from chapter8_samples._lab import x", "_lab outside main()"),
    ],
)
def test_a_planted_import_is_found(file: str, code: str, reason: str, tmp_path: Path) -> None:
    """この検査が、どの形の import も見落とさないこと。"""
    given = {
        "_lab/__init__.py": "",
        "alerting/__init__.py": "",
        "alerting/other.py": "from .part import x",
        "alerting/part.py": "",
        "cost_tracking/__init__.py": "",
        "04_alerting/page.py": "def main():\n    from chapter8_samples._lab import x",
    }
    homes = {"chapter8_samples.alerting.from_page": "chapter8_samples.alerting.page"}
    for name, text in (given | {file: code}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert any(reason in found for found in violations(modules(tmp_path), homes))
    for name, text in given.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(violations(modules(tmp_path), homes)) == []
