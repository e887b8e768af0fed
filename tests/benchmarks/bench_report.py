"""測定の共通部品: 見出しの数字、測った機械、Markdown の表。"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Headline:
    """測定の結論 1 行。各ファイルの ``headline(quick)`` が返し、``__main__`` が表にする。"""

    subject: str
    result: str
    ratio: str
    """比べた相手との比。機械が変わっても、あまり変わらない。"""


def machine() -> str:
    """測った日付、機械、版。"""
    packages = ("mlflow", "opentelemetry-sdk", "langfuse", "arize-phoenix-otel")
    versions = [f"{name} {version}" for name in packages if (version := version_of(name))]
    today = datetime.now(timezone.utc).date()
    system = f"{platform.system()} {platform.machine()}、{processor()} {os.cpu_count()} コア"
    return "、".join([f"{today}", system, f"Python {platform.python_version()}", *versions])


def processor() -> str:
    """CPU の名前。"""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown の表。"""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """見出しと、測った環境と、表。"""
    print(f"### {title}\n\n{machine()}\n\n{markdown(columns, rows)}\n", flush=True)


def version_of(package: str) -> str:
    """パッケージの版。入っていなければ空。"""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def best_seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """何回か測ったうちの最短。ほかの処理に邪魔された回を除く。"""
    times: list[float] = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
