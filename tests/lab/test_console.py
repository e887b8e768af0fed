"""端末への表示。"""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapter8_samples._lab import console
from chapter8_samples._lab.console import CheckFailed, Step, check, run_steps, table, width

CELLS = st.text(alphabet="abc あア漢字ｱ()0", max_size=12)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(console).failed == 0


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_columns_line_up_whatever_the_width(rows: list[tuple[str, str]]) -> None:
    """右寄せの最終列の右端は、どの行でも同じ桁にある。"""
    rows = [(left, right.strip() or "x") for left, right in rows]
    lines = table(["名前", "値"], rows, "<>").splitlines()
    assert {width(line) for line in lines} == {width(lines[1])}


def test_check_names_both_values() -> None:
    check("件数", 3, 3)
    with pytest.raises(CheckFailed, match=r"件数: 2 \(期待値 3\)"):
        check("件数", 2, 3)


def failing(error: Exception) -> Callable[[], str]:
    def run() -> str:
        raise error

    return run


def test_a_failed_step_is_counted_and_the_rest_still_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = [
        Step("8.1", "合わない", failing(CheckFailed("件数: 1 (期待値 2)"))),
        Step("8.2", "落ちる", failing(ValueError("bad\nvalue"))),
        Step("8.3", "通る", lambda: "3 件"),
    ]
    assert run_steps(steps) == 2
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r" NG +\d\.\ds  件数: 1 \(期待値 2\)$", lines[0])
    assert re.search(r" NG +\d\.\ds  ValueError: bad value$", lines[1])
    assert re.search(r" OK +\d\.\ds  3 件$", lines[2])


def test_no_colour_codes_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    run_steps([Step("8.1", "題", lambda: "")])
    assert "\x1b" not in capsys.readouterr().out
