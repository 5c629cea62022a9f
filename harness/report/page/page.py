"""One self-contained HTML file: the leaderboard to sort and filter, figures, pairs, and the record behind every row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from harness.durable import write_file
from harness.records import RunRecord
from harness.report.cells import Cell
from harness.report.frame import CHANCE
from harness.report.leaderboard import Leaderboard, Section
from harness.report.page.canvas import Figure
from harness.report.page.figures import Panel, draw
from harness.report.rows import Row

FIGURES = "figures"
_NUMBER = re.compile(r"^[+-]?[\d,]*\.?\d+")


@dataclass(frozen=True)
class Line:
    """One row of a table, and what the filters look at."""

    cells: tuple[tuple[Cell, float | None], ...]
    """With the number that the cell begins with, for sorting."""
    model: str
    sparsity: str
    track: str
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One table of the page: the rows of a section of the leaderboard."""

    heading: str
    columns: tuple[tuple[str, bool], ...]
    """Headings, and whether they name the row."""
    lines: tuple[Line, ...]


def write_page(leaderboard: Leaderboard, folder: Path) -> list[Path]:
    """Write ``index.html`` and, beside it, every figure as SVG and PNG.

    Args:
        leaderboard: what to show.
        folder: created where needed; files of the same names are replaced.

    Returns:
        The files written, the page first.

    Raises:
        UserError: matplotlib is missing, per-document scores are corrupt, or the folder cannot be written to.
    """
    figures = [figure for panel in panels(leaderboard) for figure in draw(panel)]
    written = [folder / "index.html"]
    drawn = {figure.name: figure.svg() for figure in figures}
    for figure in figures:
        for suffix, data in (("svg", drawn[figure.name].encode()), ("png", figure.png())):
            written.append(folder / FIGURES / f"{figure.name}.{suffix}")
            write_file(written[-1], data)
    write_file(written[0], render(leaderboard, figures, drawn).encode())
    return written


def render(leaderboard: Leaderboard, figures: Sequence[Figure], drawn: dict[str, str]) -> str:
    """The page.

    Args:
        leaderboard: what to show.
        figures: in their order.
        drawn: name of a figure -> its SVG element.
    """
    tables = [table_of(section) for section in leaderboard.sections]
    lines = [line for table in tables for line in table.lines]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string((files(__package__) / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=leaderboard.title,
        style=Markup((files(__package__) / "page.css").read_text(encoding="utf-8")),
        script=Markup((files(__package__) / "page.js").read_text(encoding="utf-8")),
        tables=tables,
        filters=[
            ("model", "Model", _choices(line.model for line in lines)),
            ("sparsity", "Sparsity", _choices(line.sparsity for line in lines)),
            ("track", "Training", _choices(line.track for line in lines)),
        ],
        notes=leaderboard.notes,
        figures=[(figure, Markup(_described(figure, drawn[figure.name]))) for figure in figures],
        pairs=leaderboard.pairs(),
        records=[(record, _dump(record)) for row in leaderboard.rows for record in _whole(leaderboard, row).records],
    )


def table_of(section: Section) -> Table:
    """A section of the leaderboard with what sorting and filtering need."""
    lines = []
    for i, line in enumerate(section.frame.to_dict("records")):
        cells = tuple((column.cells[i], number_of(column.cells[i].text)) for column in section.columns)
        is_chance = line["method"] == CHANCE
        lines.append(
            Line(
                cells,
                model="" if pd.isna(line["model"]) else str(line["model"]),
                sparsity="" if is_chance else f"{100 * line['target_sparsity']:.4g}%",
                track=section.heading,
                run_ids=() if is_chance else tuple(str(line["run_ids"]).split()),
            )
        )
    columns = tuple((column.heading, column.part == "name") for column in section.columns)
    return Table(section.heading, columns, tuple(lines))


def number_of(text: str) -> float | None:
    """The number that a cell begins with, None where there is none."""
    found = _NUMBER.match(text)
    return float(found.group().replace(",", "")) if found else None


def panels(leaderboard: Leaderboard) -> Iterator[Panel]:
    """What may stand in one figure: a model's rows in one section."""
    several = len(leaderboard.sections) > 1
    named: Counter[str] = Counter()
    for number, section in enumerate(leaderboard.sections, start=1):
        for model in dict.fromkeys(row.spec.model.name for row in section.rows):
            frame = section.frame
            mine = (frame["model"] == model) & (frame["status"] == "ok")
            rows = tuple(row for row in section.rows if row.spec.model.name == model and row.status == "ok")
            rows = tuple(_whole(leaderboard, row) for row in rows)
            base = re.sub(r"[^\w.-]+", "-", model.rsplit("/", 1)[-1])
            heading = f"{model}, {section.heading}" if section.heading else model
            name = f"{base}-{number}" if several else base
            named[name] += 1  # other folders may be called the same
            unique = name if named[name] == 1 else f"{name}-{named[name]}"
            yield Panel(unique, heading, frame[mine | (frame["method"] == CHANCE)], rows)


def _whole(leaderboard: Leaderboard, row: Row) -> Row:
    """With the way its runs went, which a leaderboard leaves in the store."""
    return replace(row, records=tuple(leaderboard.store.load(record.spec.run_id) for record in row.records))


def _choices(values: Iterator[str]) -> list[str]:
    """What a filter offers; nothing where there is nothing to choose between."""
    found = [value for value in dict.fromkeys(values) if value]
    return found if len(found) > 1 else []


def _described(figure: Figure, svg: str) -> str:
    """An SVG element that says what it shows."""
    opening = svg.index("<svg") + len("<svg")
    return f'{svg[:opening]} role="img" aria-labelledby="caption-{figure.name}"{svg[opening:]}'


def _dump(record: RunRecord) -> str:
    """A record for reading: without the trace, which the figures draw."""
    values: dict[str, Any] = record.model_dump(mode="json", exclude={"trace"}, exclude_none=True)
    return json.dumps(values, indent=1)
