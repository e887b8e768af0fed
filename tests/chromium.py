"""画面の試験に使う本物の Chromium。Playwright で動かし、ブラウザーはダウンロードしない。"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


def missing() -> str | None:
    """試験できない理由。そろっていれば ``None``。"""
    if find_spec("playwright") is None:
        return "not installed: playwright"
    return None if shutil.which("chromium") else "not installed: chromium"


@contextmanager
def chromium() -> Iterator[Browser]:
    """ブラウザーを起動する。なければ理由を示して飛ばす(CI では失敗する)。"""
    if reason := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
