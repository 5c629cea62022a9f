"""The leaderboard: built from records alone, written as CSV and Markdown, shown on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Group
from rich.padding import Padding
from rich.text import Text
from tabulate import tabulate

from harness.durable import write_file
from harness.errors import UserError
from harness.report.cells import Cell, Column, layout
from harness.report.frame import build_frame, order_rows, task_columns
from harness.report.notes import notes, ppl_heading
from harness.report.pairs import PairTable, pair_tables
from harness.report.rows import Row, contests, dense_rows, group_rows
from harness.report.scores import RowScores, score_contest
from harness.report.terminal import Tables
from harness.store import Store


@dataclass(frozen=True, slots=True)
class Section:
    """The rows of one precision that were trained alike."""

    heading: str
    """Names it; empty where there is only one."""
    columns: tuple[Column, ...]
    frame: pd.DataFrame = field(repr=False)
    """The numbers behind the columns: the lines of the leaderboard's that stand here."""
    rows: tuple[Row, ...] = field(repr=False)

    def to_markdown(self) -> str:
        """As a pipe table below its heading."""
        headings = [column.heading for column in self.columns]
        lines = list(zip(*([_markdown(cell) for cell in column.cells] for column in self.columns), strict=True))
        alignment = ["left" if column.part == "name" else "right" for column in self.columns]
        table = tabulate(lines, headings, tablefmt="pipe", disable_numparse=True, colalign=alignment)
        return f"## {self.heading}\n\n{table}" if self.heading else table


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """A table of methods with everything a reader needs to judge it."""

    frame: pd.DataFrame
    """The CSV file: see `harness.report.frame`."""
    sections: tuple[Section, ...]
    """The same for people, one table per precision and training: scores of different ones do not compare."""
    notes: tuple[str, ...]
    store: Store = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False)
    """What the lines of ``frame`` sum up, in their order."""

    @property
    def title(self) -> str:
        """Names the models."""
        return "Leaderboard: " + ", ".join(dict.fromkeys(self.frame["model"].dropna()))

    @property
    def exit_code(self) -> int:
        """1 if any run of the table failed, else 0."""
        return int(any(row.status == "failed" for row in self.rows))

    @property
    def why_nothing_ran(self) -> str | None:
        """Why no method could do what was asked, where that is so; None where one was scored or failed."""
        competing = [row for row in self.rows if not row.is_reference]
        if not competing or any(row.status != "unsupported" for row in competing):
            return None
        return competing[0].records[0].reason

    def to_csv(self, path: Path) -> None:
        """Write the numbers, atomically.

        Raises:
            UserError: the folder cannot be written to.
        """
        write_file(path, self.frame.to_csv(index=False, float_format="%.8g", lineterminator="\n").encode())

    def to_markdown(self) -> str:
        """The table for people and its notes."""
        tables = "\n\n".join(section.to_markdown() for section in self.sections)
        bullets = "\n".join(f"- {note}" for note in self.notes)
        return f"# {self.title}\n\n{tables}\n\n{bullets}\n"

    def to_markdown_file(self, path: Path) -> None:
        """Write the table for people and its notes, atomically.

        Raises:
            UserError: the folder cannot be written to.
        """
        write_file(path, self.to_markdown().encode())

    def write(self, folder: Path) -> None:
        """Write ``leaderboard.csv`` and ``leaderboard.md`` into a folder.

        Raises:
            UserError: the folder cannot be written to.
        """
        self.to_csv(folder / "leaderboard.csv")
        self.to_markdown_file(folder / "leaderboard.md")

    def to_rich(self) -> Group:
        """The same for the terminal, of a long table its first lines."""
        bullets = [Padding(Text(f"• {note}"), (0, 0, 0, 1)) for note in self.notes]
        tables: list[Text | Tables] = []
        for section in self.sections:
            tables += [Text(section.heading, style="bold")] if section.heading else []
            tables.append(Tables(section.columns))
        return Group(Text(self.title, style="bold"), *tables, *bullets)

    def pairs(self) -> list[PairTable]:
        """Every pair of methods at one sparsity, read anew from the per-document scores."""
        return pair_tables(self.store, self.rows)

    def pairs_to_rich(self) -> Group:
        """The pairs for the terminal."""
        tables = self.pairs()
        return (
            Group(*(table.to_rich() for table in tables)) if tables else Group(Text("No two scored methods to pair."))
        )


def build_leaderboard(store: Store, run_ids: Sequence[str] | None = None, command: str | None = None) -> Leaderboard:
    """Build the table from what is stored.

    Args:
        store: holds the runs.
        run_ids: of the runs to show; None shows all.
        command: the command line that makes these runs, for the notes.

    Raises:
        UserError: there are no runs, or one of them is corrupt.
    """
    records = store.summaries(None if run_ids is None else dict.fromkeys(run_ids))
    if not records:
        raise UserError(f"no runs in {store.shown}; `harness compare --out {store.shown}` makes some")
    rows = group_rows(records)
    dense = dense_rows(rows)
    scores: dict[Row, RowScores] = {}
    for contest in contests(rows):
        scores |= score_contest(store, contest, dense.get(contest[0].reference))
    rows = order_rows(rows, scores)
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.spec.dtype, row.training), []).append(row)
    tasks = task_columns(rows)
    frames = {key: build_frame(part, scores, tasks) for key, part in parts.items()}
    headings = _headings(parts)
    sections = [
        Section(headings[key], tuple(layout(frame, tasks, ppl_heading(parts[key]))), frame, tuple(parts[key]))
        for key, frame in frames.items()
    ]
    frame = pd.concat(frames.values(), ignore_index=True) if len(frames) > 1 else next(iter(frames.values()))
    return Leaderboard(frame, tuple(sections), tuple(notes(rows, scores, command)), store, tuple(rows))


def _headings(parts: Mapping[tuple[str, str], list[Row]]) -> dict[tuple[str, str], str]:
    """What tells the sections apart; nothing where there is only one, without training."""
    dtypes, trainings = ({key[i] for key in parts} for i in (0, 1))
    headings = {}
    for key, rows in parts.items():
        told = [f"Weights in {key[0]}"] if len(dtypes) > 1 else []
        headings[key] = ", ".join([*told, _training(rows[0])] if trainings != {""} else told)
    return headings


def _training(row: Row) -> str:
    recovery = row.spec.recovery
    if recovery is None:
        return "Without training"
    how = "Full training" if recovery.mode == "full" else f"Low-rank training (rank {recovery.lora_rank})"
    distilled = ", distilled from dense" if recovery.distillation else ""
    return f"{how} on {recovery.tokens:,} tokens of {recovery.source}, rate {recovery.learning_rate:g}{distilled}"


def _markdown(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|")
    return f"**{text}**" if cell.bold else text
