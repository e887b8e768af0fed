"""配布物を作り、仮想環境に入れる。"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from reader_environment import site_packages
from samples import ROOT


def wheel(directory: Path) -> Path:
    return _build("--wheel", directory, "*.whl")


def sdist(directory: Path) -> Path:
    return _build("--sdist", directory, "*.tar.gz")


def install(built: Path, environment: Path) -> None:
    """wheel のインストールは、site-packages への展開に等しい。"""
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site_packages(environment))


def _build(kind: str, directory: Path, pattern: str) -> Path:
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(directory)]
    run = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(directory.glob(pattern))
