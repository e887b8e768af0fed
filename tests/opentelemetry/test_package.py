"""``opentelemetry`` という名前のフォルダーが、OpenTelemetry 本体を隠さない。"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import without_settings
from samples import ROOT

from chapter8_samples._lab.servers.receivers import OtlpReceiver

PACKAGE = ROOT / "chapter8_samples"


def python(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``directory`` で動かす。import できるのは、そこにあるものと、入れてあるものだけ。"""
    command = [sys.executable, *arguments]
    environment = without_settings(dict(os.environ)) | {"PYTHONPATH": ""}
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60
    )


def refusal(folder: Path) -> str:
    return (
        f"ImportError: {str(folder)!r} was found instead of the OpenTelemetry package because the "
        "folder above it is on sys.path (as working directory, PYTHONPATH or script folder): start "
        "Python from another directory, or move it into a package of your own (app/opentelemetry)"
    )


def test_refuses_to_be_the_real_one_inside_the_package() -> None:
    run = python(PACKAGE, "-c", "import opentelemetry")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == refusal(PACKAGE / "opentelemetry")


def test_refuses_to_be_the_real_one_beside_a_flat_app(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE / "opentelemetry", tmp_path / "opentelemetry")
    (tmp_path / "main.py").write_text("from opentelemetry import trace\n")
    run = python(tmp_path, "main.py")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == refusal(tmp_path / "opentelemetry")


APP = """
import sys
from app.opentelemetry import disable_otlp_export, flush_all, otlp_status, setup_otlp_export
import mlflow, opentelemetry
print(setup_otlp_export(sys.argv[1], "bot", mode="otlp_only").mode, otlp_status().mode)
with mlflow.start_span("answer"):
    pass
print(flush_all().delivered, disable_otlp_export().mode)
print([name for name in sys.modules if name.startswith("chapter8_samples")])
print("app" in str(opentelemetry.__path__))
"""


@pytest.mark.slow
def test_a_copied_section_works_beside_the_real_one(otlp: OtlpReceiver, tmp_path: Path) -> None:
    copied = tmp_path / "app/opentelemetry"
    shutil.copytree(PACKAGE / "opentelemetry", copied)
    page = (PACKAGE / "05_opentelemetry/otlp_setup.py").read_text(encoding="utf-8")
    page = page.replace("chapter8_samples.", "app.")
    (copied / "otlp_setup.py").write_text(page, encoding="utf-8")
    (tmp_path / "main.py").write_text(APP)
    run = python(tmp_path, "main.py", otlp.grpc_endpoint)
    assert run.stdout.splitlines() == ["otlp_only otlp_only", "1 off", "[]", "False"], run.stderr
    assert [span.name for span in otlp.spans] == ["answer"]


SAME = """
import runpy, sys
from chapter8_samples._lab.servers import receivers
told = []

class Receiver(receivers.OtlpReceiver):
    def stop(self):
        from chapter8_samples.opentelemetry import otlp_status
        if self.spans:  # 2 回めの stop は、送信をやめた後
            told.append(otlp_status().endpoint)
            self.spans.clear()
        super().stop()

receivers.OtlpReceiver = Receiver
runpy.run_path(sys.argv[1], run_name="__main__")
runpy.run_module("chapter8_samples.opentelemetry.otlp_setup", run_name="__main__")
print("told", *told)
"""


@pytest.mark.slow
def test_the_page_as_a_script_and_its_public_self_share_one_session(tmp_path: Path) -> None:
    """パスでも ``-m`` でも、実行中のページの送信先が、公開名の側から見える。"""
    run = python(tmp_path, "-c", SAME, str(PACKAGE / "05_opentelemetry/otlp_setup.py"))
    assert run.returncode == 0, run.stderr
    url = r"http://127\.0\.0\.1:\d+"
    assert re.fullmatch(rf"told {url} {url}", run.stdout.splitlines()[-1]), run.stdout


@pytest.mark.slow
def test_every_module_imports_the_real_opentelemetry() -> None:
    """どのモジュールを最初に読み込んでも、隣のフォルダーを本体と取り違えない。"""
    program = """
import importlib, sys
from pathlib import Path
root = Path(sys.argv[1])
for path in sorted((root / "opentelemetry").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    importlib.import_module(".".join(["chapter8_samples", *parts]).removesuffix(".__init__"))
importlib.import_module("chapter8_samples.opentelemetry.otlp_setup")
import opentelemetry.sdk
print(str(root) in str(opentelemetry.__path__) + str(opentelemetry.sdk.__path__))
"""
    run = python(PACKAGE.parent, "-c", program, str(PACKAGE))
    assert run.stdout == "False\n", run.stderr
