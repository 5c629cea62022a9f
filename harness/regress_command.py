"""`harness regress`: two results folders in, a verdict out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.durable import write_file
from harness.errors import UserError
from harness.garbage import collection_paused
from harness.options import BatchTokens, Device
from harness.terminal import complain, console

if TYPE_CHECKING:
    from harness.regression import Regression
    from harness.results import Results
    from harness.store import Store


def regress(
    reference: Annotated[str, typer.Option(help="Results folder, or its URL, to hold on to.")],
    candidate: Annotated[str, typer.Option(help="Results folder or URL, made with what is under test.")],
    run: Annotated[bool, typer.Option("--run", help="Make the candidate, by the reference's specs.")] = False,
    tolerance: Annotated[float, typer.Option(help="Points that the average may drop.")] = 1.0,
    min_recovery: Annotated[
        float | None, typer.Option(help="Least share of the candidate's dense average to keep, such as 0.95.")
    ] = None,
    max_loss_increase: Annotated[
        float | None, typer.Option(help="Nats per token that the held-out loss may grow; 0.02 is 2% of perplexity.")
    ] = None,
    max_params_ratio: Annotated[
        float | None, typer.Option(help="Counted parameters over the reference's, at most.")
    ] = None,
    max_time_ratio: Annotated[float | None, typer.Option(help="Pruning time over the reference's, at most.")] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare although documents, versions or settings differ.")
    ] = False,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="Refuse a candidate that lacks runs of the reference.")
    ] = False,
    allow_cannot_tell: Annotated[
        bool, typer.Option("--allow-cannot-tell", help="Exit with 0, not 3, where the documents are too few to tell.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write the summary to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML to this file.")] = None,
    annotate: Annotated[
        bool, typer.Option(envvar="GITHUB_ACTIONS", help="Also print GitHub annotations; the default on GitHub.")
    ] = False,
    device: Device = "cpu",
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Is the candidate's accuracy worse than the reference's for real? Exit code 0 pass, 1 fail, 3 cannot tell."""
    from harness import regression
    from harness.results import results_at

    limits = regression.Limits(tolerance, min_recovery, max_loss_increase, max_params_ratio, max_time_ratio)
    ours, theirs = results_at(reference), results_at(candidate)
    ours.pull()
    if run:
        _make_candidate(ours.store, theirs, device, batch_tokens)
    theirs.pull()
    with collection_paused():
        found = regression.regress(
            ours.store, theirs.store, limits, allow_different=allow_different, require_all=require_all
        )
        _tell(found, markdown, junit, annotate)
    sys.exit(0 if allow_cannot_tell and found.verdict == "cannot tell" else found.exit_code)


def _tell(found: Regression, markdown: Path | None, junit: Path | None, annotate: bool) -> None:
    """On the terminal, then into files."""
    from harness.regression import to_annotations, to_junit, to_markdown

    print(to_markdown(found))
    if annotate:
        print("\n".join(to_annotations(found)))
    for path, write in ((markdown, to_markdown), (junit, to_junit)):
        if path is not None:
            write_file(path, write(found).encode())


def _make_candidate(reference: Store, candidate: Results, device: str, batch_tokens: int) -> None:
    """Run every finished spec of the reference anew: a record does not tell that the code has changed since."""
    from harness.compare import make_runs, tracks_of
    from harness.executors import LocalExecutor
    from harness.progress import ComparisonProgress

    tracks = tracks_of(record.spec for record in reference.records() if record.status == "ok")
    store = candidate.store
    if store.root.resolve() == reference.root.resolve():
        raise UserError("--candidate is the reference itself, which --run would overwrite; name another folder")
    candidate.require_writable()
    try:
        with ComparisonProgress(console) as progress:
            make_runs(
                tracks,
                store,
                LocalExecutor(),
                progress.event,
                {"device": device, "batch_tokens": batch_tokens, "num_threads": None, "stream": False},
                on_plan=progress.plan,
                on_cost=progress.say,
                force=True,
            )
    except KeyboardInterrupt:
        complain("stopped; nothing was compared")
        sys.exit(130)
    candidate.push([spec.run_id for track in tracks for spec in track])
