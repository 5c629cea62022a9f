"""Tables on the terminal: as long as somebody reads."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.report import build_leaderboard
from harness.report.cells import Cell, Column
from harness.report.terminal import Tables
from harness.store import Store

REFERENCE = Path(__file__).parents[3] / "results" / "reference"


@pytest.mark.parametrize(("lines", "left"), [(100, None), (1250, "1,150 more lines are in leaderboard.md")])
def test_a_long_table_ends_and_says_where_the_rest_is(lines: int, left: str | None) -> None:
    names = tuple(Cell(f"method-{i}") for i in range(lines))
    alike = tuple(Cell("model") for _ in range(lines))
    columns = (Column("model", alike, "name"), Column("method", names, "name"), Column("sparsity", alike, "name"))
    shown = io.StringIO()
    Console(file=shown, width=80).print(Tables(columns))
    text = shown.getvalue()
    assert "method-99" in text
    assert "method-100" not in text
    assert (left or "") in text
    assert ("more lines" in text) == (left is not None)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_of_the_reference_run_is_cut_off(width: int) -> None:
    section = build_leaderboard(Store(REFERENCE)).sections[0]
    shown = io.StringIO()
    Console(file=shown, width=width).print(Tables(section.columns))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for column in section.columns:
        for cell in column.cells:
            for word in cell.text.replace(", ", ",").split() if column.part != "knob" else [cell.text]:
                assert any(word in line for line in lines), (column.heading, word)
    tied = [line for line in lines if "†" in line]
    assert tied
    assert all(re.match(r"[a-z-]+ +\d+%", line) for line in tied)  # on the line of its row
