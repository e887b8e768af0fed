"""読者のまっさらな環境: 新しい仮想環境と、何も引き継がない環境変数。

ライブラリーだけは、テストを動かしている環境のものを見せる(pip install に数分かけないため)。
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from samples import ROOT


def new_environment(directory: Path) -> Path:
    """pip のない仮想環境を作り、その python を返す。編集可能インストールの .pth は効かない。"""
    venv.create(directory, with_pip=False, symlinks=sys.platform != "win32")
    libraries = sysconfig.get_path("purelib")
    (site_packages(directory) / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    return binaries(directory) / "python"


def binaries(environment: Path) -> Path:
    return environment / ("Scripts" if sys.platform == "win32" else "bin")


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("Lib/site-packages" if sys.platform == "win32" else "lib/*/site-*")
    return found


def checkout(directory: Path) -> Path:
    """Git が管理するファイルだけの写し(手元に残った作業ファイルに頼らないように)。"""
    if not (ROOT / ".git").exists():  # 配布物を展開したもの
        leave = shutil.ignore_patterns(".*", "__pycache__", "mlruns", "*.db")
        return Path(shutil.copytree(ROOT, directory, ignore=leave))
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, encoding="utf-8")
    for name in filter(None, listed.stdout.split("\0")):
        copy = directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    return directory


@dataclass(frozen=True)
class Reader:
    """手順どおりに打ち込む読者。環境変数は PATH と LANG と(空の)HOME だけ。"""

    directory: Path
    home: Path
    environment: Path
    outside: Path
    """手元の外へ出ようとした接続の記録。"""

    @classmethod
    def arrive(cls, root: Path) -> Reader:
        reader = cls(checkout(root / "checkout"), root / "home", root / "venv", root / "outside")
        reader.home.mkdir()
        new_environment(reader.environment)
        editable = site_packages(reader.environment) / "project.pth"  # ``-e .`` の代わり
        editable.write_text(f"{reader.directory}\n", encoding="utf-8")
        guard = (ROOT / "tests/reader_hooks/sitecustomize.py").read_text(encoding="utf-8")
        told = f'import os\nos.environ["CHAPTER8_OUTSIDE_LOG"] = {str(reader.outside)!r}\n'
        hook = site_packages(reader.environment) / "sitecustomize.py"
        hook.write_text(told + guard, encoding="utf-8")
        return reader

    def start(self, command: str) -> subprocess.Popen[str]:
        """シェルで 1 行を実行し始める。"""
        path = f"{binaries(self.environment)}:/usr/local/bin:/usr/bin:/bin"
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.directory,
            env={"PATH": path, "LANG": "C.UTF-8", "HOME": str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )

    def processes(self) -> list[str]:
        """まだ動いている、この読者のプロセス(Linux だけ。ほかでは調べられない)。"""
        mark, found = f"HOME={self.home}\0".encode(), list[str]()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:  # 読む間に終わった
                continue
        return [line for line in found if line]  # 空は、回収を待つだけのもの
