"""番号付きフォルダーを import 文で使うための別名。

``01_production_tracing`` は数字で始まるので import 文に書けない。そこで
``chapter8_samples.production_tracing`` という名前でも同じモジュールを渡す。
コピーではなく同じオブジェクトなので、``isinstance`` も ``pickle`` も食い違わない。

別名のフォルダー(``production_tracing/`` など)にあるのは、型スタブ ``*.pyi`` と 2 行の
``*.py`` だけである。``*.py`` は、最初の import が複数のスレッドで同時に起き、検索機構
(``_AliasFinder``)がまだ用意できていない一瞬のために置いてある。
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
SECTIONS = {
    "production_tracing": "01_production_tracing",
    "cost_tracking": "02_cost_tracking",
    "quality_monitoring": "03_quality_monitoring",
    "alerting": "04_alerting",
    "opentelemetry": "05_opentelemetry",
}


def real_name(name: str) -> str | None:
    """別名のモジュール名を、番号付きフォルダーでの名前に直す。別名でなければ ``None``。

    >>> real_name("chapter8_samples.alerting.rollback")
    'chapter8_samples.04_alerting.rollback'
    """
    package, _, rest = name.partition(".")
    section, dot, module = rest.partition(".")
    if package != PACKAGE or section not in SECTIONS:
        return None
    return f"{PACKAGE}.{SECTIONS[section]}{dot}{module}"


def become_real(name: str) -> None:
    """読み込み中の別名モジュールを、番号付きフォルダーの同じモジュールに置き換える。"""
    target = real_name(name)
    if target is None:
        raise ImportError(f"{name} is not an alias of a numbered folder", name=name)
    install()
    real = importlib.import_module(target)
    # 同時に import していた別スレッドは、置き換え前のモジュールを受け取ることがある
    sys.modules[name].__getattr__ = partial(getattr, real)  # type: ignore[method-assign]
    sys.modules[name] = real


class _SameModule(Loader):
    """別名の import に、番号付きフォルダーのモジュールをそのまま渡す。"""

    def __init__(self, real: ModuleSpec) -> None:
        self.real = real

    def exec_module(self, module: ModuleType) -> None:
        become_real(module.__name__)

    def get_code(self, fullname: str) -> CodeType | None:  # python -m 別名
        assert isinstance(self.real.loader, InspectLoader)
        return self.real.loader.get_code(self.real.name)


class _AliasFinder(MetaPathFinder):
    """``__path__`` を共有する別名で、ファイルが二重に読み込まれるのを防ぐ。"""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = real_name(fullname)
        real = find_spec(name) if name else None
        if real is None:
            return None
        spec = ModuleSpec(fullname, _SameModule(real), origin=real.origin)
        spec.submodule_search_locations = real.submodule_search_locations
        return spec


def install() -> None:
    """別名を有効にする(何度呼んでもよい)。"""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())


Exports = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def lazy_exports(package: str, **modules: str) -> Exports:
    """節の ``__init__.py`` 用: 名前が使われたときに初めてモジュールを読み込む。"""
    home = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return __getattr__, lambda: sorted(home), sorted(home)
