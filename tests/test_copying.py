"""サンプルは、README の 1 つの決まりでアプリへ写して使える。

節のものを何も import しないページは、それだけを写す。ほかは、節のフォルダーに本書のファイルを入れて
写し、本書のファイルの ``chapter8_samples.`` を自分のパッケージに変える。写したものは、この
プロジェクトを import できないところで、リストの引数で呼ぶ(listing_calls.py)。
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import listing_calls
import mlflow
import pytest
import yaml
from listing_calls import EXPERIMENT, LISTINGS
from quality_monitoring.fake_workspace import FakeWorkspace
from samples import ROOT, SAMPLES, SECTIONS, run_as_reader
from test_listings import check_exported

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.servers.receivers import OtlpReceiver

PACKAGE = ROOT / "chapter8_samples"
ALLOWED = {"mlflow", "databricks", "opentelemetry", "requests", "yaml", "google", "grpc"}
ALLOWED |= {
    name.lower()
    for name in re.findall(
        r"^(pydantic)\b", (ROOT / "requirements-prod.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}
ALLOWED |= {"urllib3", "typing_extensions"}  # requests と pydantic が、必ず一緒に入れる
Outcomes = dict[str, dict[str, str | None]]


def section_of(page: Path) -> str:
    return page.parent.name[3:]


def needs_its_section(page: Path) -> bool:
    """節の部品か、隣のページを import するか(``main()`` の中の ``_lab`` は数えない)。"""
    return f"chapter8_samples.{section_of(page)}" in {
        ".".join(str(node.module).split(".")[:2])
        for node in ast.walk(ast.parse(page.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }


ALONE = {page for page in SAMPLES if not needs_its_section(page)}


def copy_page(page: Path, folder: Path, app: str) -> None:
    """本書のファイルを写し、``chapter8_samples.`` をアプリのパッケージに変える。"""
    text = page.read_text(encoding="utf-8").replace("chapter8_samples.", f"{app}.")
    (folder / page.name).write_text(text, encoding="utf-8")


def copy_section(section: str, app: Path) -> None:
    """本書のファイルに節のフォルダーを重ねて写す(``__init__.py`` は節のフォルダーのもの)。"""
    folder = app / section
    folder.mkdir()
    for page in (PACKAGE / SECTIONS[section]).glob("*.py"):
        copy_page(page, folder, app.name)
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE / section, folder, ignore=leave, dirs_exist_ok=True)


def make_app(section: str, root: Path) -> Path:
    """その節だけを写したアプリ。1 ファイルで足りるページは、アプリの直下にも置く。"""
    app = root / section / "app"
    app.mkdir(parents=True)
    (app / "__init__.py").touch()
    copy_section(section, app)
    for page in ALONE:
        if section_of(page) == section:
            copy_page(page, app, app.name)
    return app


def listings_of(section: str) -> list[str]:
    """節のリスト。プロセスを終わらせる 8.6 は最後、設定ファイルの 8.17 は別に確かめる。"""
    mine = [n for n, path in LISTINGS.items() if path.startswith(f"{section}/") and n != "8.17"]
    return sorted(mine, key=lambda number: number == "8.6")


def called_in(
    app: Path, section: str, environment: dict[str, str], python: str | Path = sys.executable
) -> tuple[Outcomes, subprocess.CompletedProcess[str]]:
    """写した関数を 1 つのプロセスで順に呼んだ結果。"""
    alone = ",".join(page.name for page in ALONE)
    settings = {"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false", "CHAPTER8_ALONE": alone}
    run = run_as_reader(
        ["-I", listing_calls.__file__, app.parent, app.name, *listings_of(section)],
        app.parent,
        python=python,
        environment=settings | environment,
        encoding="utf-8",
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    return {k: v for line in lines for k, v in json.loads(line).items()}, run


def test_every_listing_works_after_copying(
    tmp_path: Path, database_template: Path, stub_llm: StubLlm, otlp: OtlpReceiver
) -> None:
    environment = {
        "OPENAI_BASE_URL": stub_llm.base_url,
        "OPENAI_API_KEY": "sk-local-stub",
        "CHAPTER8_OTLP": otlp.grpc_endpoint,
    }

    def call(section: str) -> tuple[Outcomes, subprocess.CompletedProcess[str]]:
        app = make_app(section, tmp_path)
        database = shutil.copy(database_template, app.parent / "mlflow.db")
        uri = f"sqlite:///{Path(database).as_posix()}"
        return called_in(app, section, environment | {"MLFLOW_TRACKING_URI": uri})

    with FakeWorkspace() as workspace, ThreadPoolExecutor(2) as pool:
        environment["CHAPTER8_WORKSPACE"] = workspace.url
        runs = dict(zip(SECTIONS, pool.map(call, SECTIONS), strict=True))
    outcomes = {k: v for found, _ in runs.values() for k, v in found.items()}
    failed = {k: v.get("traceback") for k, v in outcomes.items() if "error" in v}
    assert failed == {}, "\n".join(map(str, failed.values()))
    assert {*outcomes, "8.17"} == set(LISTINGS), [run.stderr for _, run in runs.values()]
    for section, (_, run) in runs.items():
        ends = -signal.SIGTERM if section == "production_tracing" else 0
        assert run.returncode == ends, run.stderr
    uri = f"sqlite:///{(tmp_path / 'production_tracing/mlflow.db').as_posix()}"
    assert stopped_traces(uri) == 20
    exported = {n: str(outcomes[n]["result"]) for n in listings_of("opentelemetry")}
    check_exported(exported, otlp, workspace)
    section, _, name = LISTINGS["8.17"].partition("/")
    copied = shutil.copy(PACKAGE / SECTIONS[section] / name, tmp_path)  # 設定はそれだけで足りる
    config = yaml.safe_load(Path(copied).read_text(encoding="utf-8"))
    assert listing_calls.collector_problems(config) == []


def stopped_traces(uri: str) -> int:
    """8.6 で SIGTERM を受けたプロセスが残したトレース。"""
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    found: Any = mlflow.search_traces(return_type="list")
    return [trace.info.tags["mlflow.traceName"] for trace in found].count("stopped")


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
sys.path.insert(0, {folder!r})
sys.modules["chapter8_samples"] = None
import app
for found in pkgutil.walk_packages(app.__path__, "app."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""


def test_every_file_can_be_imported_after_copying(tmp_path: Path) -> None:
    """呼ばれなかったファイルも、節の外を import せず、import しただけでは何も印字しない。"""
    app = tmp_path / "app"
    app.mkdir()
    (app / "__init__.py").touch()
    for section in SECTIONS:
        copy_section(section, app)
    for page in ALONE:
        copy_page(page, app, app.name)
    code = IMPORT_EVERYTHING.format(folder=str(tmp_path))
    run = run_as_reader(["-I", "-c", code], tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: a shell")
def test_readme_says_the_same_way(tmp_path: Path) -> None:
    """README の「コピーして使うとき」のコマンドを実行すると、上で試したものと同じになる。"""
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    chapter = text.partition("## コピーして使うとき")[2].partition("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", chapter, re.DOTALL)
    assert block, "no bash block under コピーして使うとき"
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/chapter8_samples").symlink_to(PACKAGE)
    subprocess.run(["bash", "-ec", block[1]], cwd=tmp_path / "checkout", check=True)
    found = files(tmp_path / "checkout/app")
    (section,) = {name.split("/")[0] for name in found}
    want = tmp_path / "want/app"
    want.mkdir(parents=True)
    copy_section(section, want)
    assert found == files(want)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def imported_names(path: Path) -> Iterator[str]:
    """モジュールを読み込むときに import するもの(節の中のものを除く)。"""
    for node in executed(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


def executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """条件の中も含む文。型検査だけの ``if TYPE_CHECKING`` と ``__main__`` の中は除く。"""
    for line in body:
        if isinstance(line, ast.Try):
            yield from executed([*line.body, *(n for h in line.handlers for n in h.body)])
        elif isinstance(line, ast.If):
            test = ast.unparse(line.test)
            if test != "TYPE_CHECKING" and "__main__" not in test:
                yield from executed([*line.body, *line.orelse])
        else:
            yield line


def test_imports_only_what_the_chapter_names() -> None:
    """ページは節の公開名と決まったライブラリーだけ、部品はさらに節の中を相対でだけ。"""
    found: dict[str, list[str]] = defaultdict(list)
    web = {"quality_monitoring/feedback/router.py": {"fastapi"}}  # FastAPI のアプリだけが読み込む
    for section, folder in SECTIONS.items():
        pages, parts = (PACKAGE / folder).glob("[a-z]*.py"), (PACKAGE / section).rglob("*.py")
        for path, own in [*((p, f"chapter8_samples.{section}") for p in pages),
                          *((p, "") for p in parts)]:  # fmt: skip
            for name in imported_names(path):
                head = name.split(".")[0]
                inside = own and f"{name}.".startswith(f"{own}.")
                place = path.relative_to(PACKAGE).as_posix()
                allowed = ALLOWED | web.get(place, set())
                if head not in sys.stdlib_module_names | allowed and not inside:
                    found[place].append(name)
    assert found == {}
