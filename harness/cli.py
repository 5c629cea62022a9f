"""The command line: flags in, exit code out. Heavy imports stand inside the commands."""

from __future__ import annotations

import io
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from harness import lookups
from harness.accel_command import accel
from harness.compare_command import compare, merge
from harness.durable import write_file
from harness.errors import UserError
from harness.options import (
    BasisName,
    BatchTokens,
    CalibrationLength,
    CalibrationSamples,
    Device,
    DtypeName,
    HeldoutTokens,
    Limit,
    MmluLimit,
    MmluShots,
    Offline,
    Profile,
    RoundTo,
    Stream,
    Tasks,
    Uniform,
)
from harness.parsing import MOST_SEED
from harness.regress_command import regress
from harness.report_command import report
from harness.terminal import complain, console

app = typer.Typer(
    help="Compare structural pruning methods for language models at matched parameter counts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

INTERNAL_ERROR = 70
"""Exit code that no verdict has. Source: sysexits.h, EX_SOFTWARE."""


def main() -> None:
    """Run the command line; a UserError is one sentence and exit code 2, any other error `INTERNAL_ERROR`."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without the signs of a table still gets the table
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Being told to end is like Ctrl-C, in the background too: the running track must not outlive this process.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)
    try:
        app()
    except UserError as error:
        complain(str(error))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        complain("this is an error of the harness itself, not a result; finished runs are kept")
        sys.exit(INTERNAL_ERROR)


app.command()(compare)
app.command()(merge)
app.command()(report)
app.command()(regress)


@app.command()
def prune(
    method: Annotated[str, typer.Option(help="One method.")],
    sparsity: Annotated[float, typer.Option(help="Fraction of parameters to remove.")],
    out: Annotated[Path, typer.Option(help="Folder to write the pruned model to; must not exist.")],
    model: Annotated[str, typer.Option(help="Catalog name, hub id or folder.")] = "smollm2-135m",
    basis: BasisName = "total",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Draws the calibration.")] = 0,
    calibration: Annotated[str, typer.Option(help="Corpus name or file, as in compare.")] = "wikipedia",
    calibration_samples: CalibrationSamples = 64,
    calibration_length: CalibrationLength = 128,
    set_: Annotated[list[str], typer.Option("--set", help="A setting of the method, such as metric=wifn.")] = [],  # noqa: B006
    round_to: RoundTo = None,
    uniform: Uniform = False,
    dtype: DtypeName = "float32",
    device: Device = "cpu",
    stream: Stream = False,
    results: Annotated[Path, typer.Option(help="Results folder whose scores of this model go into its card.")] = Path(
        "results"
    ),
) -> None:
    """Prune one model and save it as a folder that from_pretrained loads."""
    from harness.parsing import one_of
    from harness.request import (
        BASES,
        calibration_spec,
        chosen_dtype,
        model_ref,
        one_device,
        one_multiple,
        one_sparsity,
        settings_of,
    )
    from harness.steps import prune_and_save

    pruned = prune_and_save(
        model=model_ref(model),
        method=method,
        params=settings_of(method, set_),
        sparsity=one_sparsity(sparsity),
        basis=one_of("basis", basis, BASES),
        seed=seed,
        calibration=calibration_spec(calibration, calibration_samples, calibration_length),
        dtype=chosen_dtype(dtype, one_device(device)),
        device=device,
        out=out,
        results=results,
        round_to=one_multiple(round_to),
        uniform=uniform or None,
        stream=stream,
    )
    console.print(
        f"{out}: {pruned.params_after.total:,} of {pruned.params_before.total:,} parameters "
        f"(target {pruned.target_params:,} {basis}), {pruned.class_name}",
        highlight=False,
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, catalog name or hub id.")],
    tasks: Tasks = None,
    profile: Profile = "quick",
    limit: Limit = None,
    mmlu_limit: MmluLimit = None,
    mmlu_shots: MmluShots = None,
    heldout_tokens: HeldoutTokens = None,
    offline: Offline = None,
    dtype: DtypeName = "float32",
    device: Annotated[
        str, typer.Option(help="torch device; auto spreads a large model over the GPUs, then CPU and disk.")
    ] = "cpu",
    batch_tokens: BatchTokens = 4096,
    reference: Annotated[
        str | None, typer.Option(help="The model that was pruned: measures the divergence from it.")
    ] = None,
    stream: Stream = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the measures to this file.")] = None,
) -> None:
    """Score one model."""
    from pydantic_core import to_json

    from harness.request import chosen_dtype, evaluation_spec, model_ref
    from harness.steps import evaluate_folder, scoring_cost_of

    spec = evaluation_spec(tasks, profile, limit, mmlu_limit, mmlu_shots, heldout_tokens, offline)
    scored, chosen = model_ref(model), chosen_dtype(dtype, device)
    against = None if reference is None else model_ref(reference)
    console.print(scoring_cost_of(scored, spec, chosen, device, batch_tokens), highlight=False, markup=False)
    evaluation = evaluate_folder(scored, spec, chosen, device, batch_tokens, against, stream=stream)
    table = Table("measure", "value", "±", "documents", "chance")
    for m in evaluation.measures:
        cells = (m.stderr, m.num_examples, m.chance)
        table.add_row(m.name, f"{m.value:.4f}", *("" if c is None else f"{c:.4g}" for c in cells))
    console.print(table)
    for note in evaluation.notes:
        console.print(note)
    if json_ is not None:
        write_file(json_, b"[" + b",\n ".join(to_json(m) for m in evaluation.measures) + b"]\n")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model folder, catalog name or hub id.")],
    format_: Annotated[str, typer.Option("--format", help="gguf, which llama.cpp runs.")] = "gguf",
    precision: Annotated[str, typer.Option(help="Of the matrices: float32, float16 or q8_0.")] = "float16",
    out: Annotated[
        Path | None, typer.Option(help="The file; default MODEL-PRECISION.gguf, here. Must not exist.")
    ] = None,
) -> None:
    """Write a model, pruned or not, as a file for another program."""
    from harness.export import FORMATS, PRECISIONS
    from harness.parsing import one_of
    from harness.request import model_ref
    from harness.steps import export_model

    one_of("format", format_, FORMATS)
    one_of("precision", precision, tuple(PRECISIONS))
    ref = model_ref(model)
    exported = export_model(ref, precision, out or Path(f"{Path(ref.name).name}-{precision}.gguf"))
    console.print(
        f"{exported.path}: llama.cpp's architecture {exported.architecture}, {exported.num_bytes:,} bytes",
        highlight=False,
    )
    if exported.num_float16:
        console.print(
            f"{exported.num_float16} matrices stay float16: Q8_0 wants rows of a multiple of 32 values", highlight=False
        )


app.command()(lookups.methods)


@app.command()
def verify(
    methods: Annotated[str, typer.Option(help="Comma-separated methods with published figures, or `all`.")] = "all",
    golden: Annotated[
        Path | None, typer.Option(help="Folder of the figures; default a checkout's tests/golden.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the tables as a Markdown page.")] = None,
) -> None:
    """Repeat the runs of the published implementations with ours, and compare what comes out."""
    from harness.fidelity.golden import CHECKOUT_FOLDER, Golden
    from harness.fidelity.page import fidelity_page
    from harness.fidelity.verify import verify as verify_methods
    from harness.provenance import machine
    from harness.registry import PUBLISHED_READERS
    from harness.request import published_methods

    figures = Golden(golden or CHECKOUT_FOLDER)
    names = published_methods(methods, tuple(PUBLISHED_READERS))
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    results = list(verify_methods(names, figures, tell))
    page = fidelity_page(results, machine())
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write_file(out, page.encode())
    sys.exit(1 if any(result.disagreements for result in results) else 0)


app.command()(accel)
for _command in (lookups.models, lookups.doctor, lookups.tasks, lookups.texts):
    app.command()(_command)


if __name__ == "__main__":
    main()
