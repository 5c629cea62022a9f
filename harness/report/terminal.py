"""Tables on the terminal: one where the window is wide enough, else several under one another."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from harness.report.cells import Cell, Column

_MOST_LINES = 100
"""Of a table: nobody reads thousands in a terminal, and laying them out takes long."""
_UNBOUNDED = 100_000
_WIDEST_UNBROKEN = 30
_NARROW_WORD = 6
"""Letters of a task's name on one line where the window is narrow: numbers stay whole, names break."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Columns of a leaderboard as tables that fit."""

    columns: tuple[Column, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Choose by the width there is."""
        shown = [replace(column, cells=column.cells[:_MOST_LINES]) for column in self.columns]
        yield from self._fitted(shown, console, options)
        left = len(self.columns[0].cells) - _MOST_LINES
        if left > 0:
            yield Text(f"{left:,} more lines are in leaderboard.md and leaderboard.csv", style="italic")

    def _fitted(self, columns: Sequence[Column], console: Console, options: ConsoleOptions) -> RenderResult:
        whole = _table(columns)
        needed = console.measure(whole, options=options.update(max_width=_UNBOUNDED)).maximum
        if needed <= options.max_width:
            yield whole
            return
        for part in ("scores", "likelihoods", "tasks", "size and cost", "efficiency"):
            chosen = [column for column in columns if column.part in ("name", part)]
            if any(column.part == part for column in chosen):
                yield Text(part, style="italic")
                yield _table(chosen, _NARROW_WORD if part == "tasks" else _UNBOUNDED)


def _table(columns: Sequence[Column], longest_word: int = _UNBOUNDED) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        texts = [_compact(cell) for cell in column.cells]
        is_name = column.part == "name"
        words = texts if is_name else [word for text in texts for word in text.split(" ")]
        table.add_column(
            _heading(column.heading, max(map(len, texts)), longest_word),
            justify="left" if is_name else "right",
            min_width=None if column.part == "size and cost" else min(max(map(len, words)), _WIDEST_UNBROKEN),
            overflow="fold",
        )
    blocks = list(zip(*(column.cells for column in columns if column.heading in ("model", "sparsity")), strict=True))
    for position, line in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if position and blocks[position] != blocks[position - 1]:
            table.add_section()
        table.add_row(*(Text(_compact(cell), style="bold" if cell.bold else "") for cell in line))
    return table


def _heading(text: str, width: int, longest_word: int) -> Text:
    """Broken to the width of what stands below, as far as its words allow; words longer than allowed break too."""
    words = text.replace("_", " ").split()
    longest = min(max((len(word) for word in words), default=1), longest_word)
    return Text("\n".join(textwrap.wrap(" ".join(words), max(width, longest))))


def _compact(cell: Cell) -> str:
    """The text without the spaces inside an interval, which then breaks before its bracket if it must."""
    return cell.text.replace(", ", ",")
