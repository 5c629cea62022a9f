"""Tables on the terminal: one where the window is wide enough, else several under one another."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from harness.report.cells import Cell, Column

_MOST_LINES = 100
"""Of a table: nobody reads thousands in a terminal, and laying them out takes long."""
_UNBOUNDED = 100_000
_WIDEST_UNBROKEN = 30
_NARROW_WORD = 6
"""Letters of a task's name on one line where the window is narrow: numbers stay whole, names break."""
_BETWEEN_ENDS = re.compile(r"(?<=\d), (?=[-+\d])")
_GAP = 2
"""Characters between two columns."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Columns of a leaderboard as tables that fit."""

    columns: tuple[Column, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Choose by the width there is."""
        shown = [replace(column, cells=column.cells[:_MOST_LINES]) for column in self.columns]
        for part, table in _fitted(shown, options.max_width):
            if part:
                yield Text(part, style="italic")
            yield Padding(table, (0, 0, 1, 0))
        left = len(self.columns[0].cells) - _MOST_LINES
        if left > 0:
            yield Text(f"{left:,} more lines are in leaderboard.md and leaderboard.csv", style="italic")


def _fitted(columns: Sequence[Column], room: int) -> Iterator[tuple[str, Table]]:
    """One table, or one for every part."""
    whole = [_size(column).widest for column in columns]
    if sum(whole) + _GAP * (len(whole) - 1) <= room:
        yield "", _table(columns, whole)
        return
    for part in ("scores", "likelihoods", "tasks", "size and cost", "knob", "efficiency"):
        chosen = [column for column in columns if column.part in ("name", part)]
        if any(column.part == part for column in chosen):
            sizes = [_size(column, _NARROW_WORD if column.part == "tasks" else _UNBOUNDED) for column in chosen]
            yield part, _table(chosen, _narrowed(sizes, room - _GAP * (len(chosen) - 1)))


def _table(columns: Sequence[Column], widths: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column, width in zip(columns, widths, strict=True):
        heading = Text("\n".join(textwrap.wrap(column.heading.replace("_", " "), width)))
        is_text = column.part in ("name", "knob")
        table.add_column(heading, justify="left" if is_text else "right", width=width, overflow="fold")
    blocks = list(zip(*(column.cells for column in columns if column.heading in ("model", "sparsity")), strict=True))
    for position, line in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if position and blocks[position] != blocks[position - 1]:
            table.add_section()
        table.add_row(*(Text(_compact(cell), style="bold" if cell.bold else "") for cell in line))
    return table


class _Size(NamedTuple):
    """Characters of a column."""

    widest: int
    """So that no cell breaks; headings break between words."""
    least: int
    """So that cells break only between words, and names not at all."""


def _size(column: Column, longest_word: int = _UNBOUNDED) -> _Size:
    """Of a column whose heading's words break from that length on."""
    texts = [_compact(cell) for cell in column.cells]
    heading = min(longest_word, max(map(cell_len, column.heading.replace("_", " ").split())))
    unbroken = texts if column.part == "name" else [word for text in texts for word in text.split()]
    least = min(_WIDEST_UNBROKEN, max(map(cell_len, unbroken), default=0))
    return _Size(max(heading, *map(cell_len, texts)), max(heading, least))


def _narrowed(sizes: Sequence[_Size], room: int) -> list[int]:
    """Widths that fit if they can, the widest narrowed first.

    Ours, as rich narrows columns below their least width, widens them again and then cuts off the table's right edge.
    """
    widths = [size.widest for size in sizes]
    while sum(widths) > room:
        wide = [i for i, size in enumerate(sizes) if widths[i] > size.least]
        if not wide:
            break  # rich breaks words
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _compact(cell: Cell) -> str:
    """The text without the spaces inside an interval, which then breaks before its bracket if it must."""
    return _BETWEEN_ENDS.sub(",", cell.text)
