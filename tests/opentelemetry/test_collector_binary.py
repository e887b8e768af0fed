"""Collector の用意: Go があれば作って取っておく。CI では、ないときも失敗を飛ばさない。"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import find_collector

# 1 回目(go install)は builder を、builder は Collector を作る、Go の代役
FAKE_GO = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
cat > "$GOBIN/builder" <<'END'
#!/bin/sh
mkdir -p _build && echo built > _build/otelcol-ch8
END
chmod +x "$GOBIN/builder"
"""


pytestmark = pytest.mark.slow


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """偽の ``go`` を置ける、ただ 1 つの PATH。本物の otelcol-contrib は、入っていても見えない。"""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command in ("cat", "chmod", "dirname", "mkdir", "nice"):
        (folder / command).symlink_to(shutil.which(command) or "")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CI", "true")
    return folder


def put_go(tools: Path, script: str) -> None:
    (tools / "go").write_text(script)
    (tools / "go").chmod(0o755)


def test_builds_once_and_keeps_the_result_in_the_cache(tools: Path, tmp_path: Path) -> None:
    put_go(tools, FAKE_GO)
    first = find_collector(tmp_path / "cache")
    assert first.read_text() == "built\n"
    assert first.is_relative_to(tmp_path / "cache")
    assert find_collector(tmp_path / "cache") == first
    assert len((tools / "calls").read_text().splitlines()) == 1


def test_a_failed_build_fails_in_ci_and_is_skipped_elsewhere(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_go(tools, "#!/bin/sh\necho no network >&2\nexit 1\n")
    with pytest.raises(pytest.fail.Exception, match="no network"):
        find_collector(tmp_path / "cache")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no network"):
        find_collector(tmp_path / "cache")


def test_an_installed_collector_is_used_as_it_is(tools: Path, tmp_path: Path) -> None:
    installed = tools / "otelcol-contrib"
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    assert find_collector(tmp_path / "cache") == installed
