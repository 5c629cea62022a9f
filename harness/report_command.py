"""`harness report`: tables from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.durable import write_file
from harness.garbage import collection_paused
from harness.options import ResultsArgument
from harness.terminal import console

if TYPE_CHECKING:
    from harness.store import Store


def report(
    folder: ResultsArgument,
    out: Annotated[Path | None, typer.Option(help="Where to write the tables; default FOLDER/latest.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also print every pair's difference and p-value.")] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Also write index.html, one file to look at, and its figures.")
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Also write leaderboard.tex, for papers.")] = False,
) -> None:
    """Rebuild the leaderboard from records alone."""
    from harness.results import results_at

    results = results_at(folder)
    results.pull()
    target = out or results.store.root / "latest"
    _write(results.store, target, pairs=pairs, html=html, latex=latex)
    if out is None:
        results.publish(target)


@collection_paused()
def _write(store: Store, target: Path, *, pairs: bool, html: bool, latex: bool) -> None:
    """The tables, into files and on the terminal."""
    from harness.report import build_leaderboard

    leaderboard = build_leaderboard(store)
    leaderboard.write(target)
    if latex:
        from harness.report.page.latex import to_latex

        write_file(target / "leaderboard.tex", to_latex(leaderboard).encode())
    if html:
        from harness.report.page.page import write_page

        page, *figures = write_page(leaderboard, target)
        console.print(f"{page}, and {len(figures)} figure files beside it", highlight=False)
    console.print(leaderboard.to_rich())
    if pairs:
        console.print(leaderboard.pairs_to_rich())
