"""壊れ続ける相手の間で、1 件も黙って失わない(1 分ほど。30 分の試験も同じプログラム)。"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from samples import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit and /proc"),
]


def test_what_comes_in_is_stored_or_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 分: ``python tests/benchmarks/endurance.py --minutes 30``。"""
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks"))
    import endurance

    outcome = endurance.run(
        0.7, tmp_path, think_seconds=0.15, error_rate=0.08, otlp_timeout_seconds=1
    )
    counts = outcome.traffic.counts
    assert list(outcome.problems()) == []
    # 何も起きなかったから数が合った、ではないこと
    assert len(outcome.traffic.traces) > 100 and counts["ask 502"] > 0
    assert outcome.mid_request > 0 and counts["refused"] > 0
    assert counts["feedback 202"] > 0
    assert outcome.total("spool", "write_errors") > 0
    assert outcome.total("accepted") > outcome.total("delivered") > 0
    assert len(outcome.reports) == 3
