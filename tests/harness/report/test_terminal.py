"""Tables on the terminal: as long as somebody reads."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from harness.report.cells import Cell, Column
from harness.report.terminal import Tables


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
