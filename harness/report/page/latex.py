"""The leaderboard for papers: LaTeX tables that need the package booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from harness.report.cells import NOTHING, TIED, Cell, Column
from harness.report.leaderboard import Leaderboard, Section

_PARTS = (("scores", "likelihoods"), ("tasks",), ("size and cost", "efficiency"), ("knob",))
"""One table each, of columns that fit a page's width together."""
_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$", "±": r"$\pm$", TIED: r"$^\dagger$",
    NOTHING: "--",
}  # fmt: skip


def to_latex(leaderboard: Leaderboard) -> str:
    """Every section as ``table*`` environments; the notes as comments at the end."""
    tables = [_table(section, parts) for section in leaderboard.sections for parts in _PARTS]
    comments = "\n".join(f"% {note}" for note in leaderboard.notes)
    return "\n\n".join(["% needs \\usepackage{booktabs}", *(table for table in tables if table), comments]) + "\n"


def _table(section: Section, parts: Sequence[str]) -> str:
    columns = [column for column in section.columns if column.part == "name" or column.part in parts]
    if all(column.part == "name" for column in columns):
        return ""
    alignment = "".join("l" if column.part == "name" else "r" for column in columns)
    lines = [" & ".join(row) + r" \\" for row in zip(*(map(_cell, column.cells) for column in columns), strict=True)]
    caption = ", ".join(filter(None, [escaped(section.heading), " and ".join(parts)]))
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\small",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            " & ".join(_heading(column) for column in columns) + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{caption[:1].upper()}{caption[1:]}.}}",
            r"\end{table*}",
        ]
    )


def _heading(column: Column) -> str:
    return escaped(column.heading)


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    # Brackets at the start of a line would be read as the optional argument of the \\ before it.
    text = f"{{}}{text}" if text.startswith("[") else text
    return rf"\textbf{{{text}}}" if cell.bold else text


def escaped(text: str) -> str:
    """Text in which LaTeX sees no command."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)
