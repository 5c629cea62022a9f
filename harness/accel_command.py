"""`harness accel`: flags in, a pruned and trained model out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from harness.options import Device, DtypeName, TrainingSettings
from harness.parsing import MOST_SEED
from harness.terminal import console

if TYPE_CHECKING:
    from harness.accel import Forecast
    from harness.records import TrainingSpec
    from harness.training import StepLog, Trainer


def accel(
    model: Annotated[str | None, typer.Option(help="Catalog name, hub id or folder.")] = None,
    target_sparsity: Annotated[float | None, typer.Option(help="Fraction of all parameters to remove.")] = None,
    target_params: Annotated[str | None, typer.Option(help="Parameters to keep instead, such as 125M.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How often it is pruned, and trained after each.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Trained on in all rounds together, such as 200k.")] = None,
    text: Annotated[
        str | None, typer.Option(help="What is trained on: names of `harness texts` joined by +, or a file.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings under those of the flags: a name, or a .toml.")] = None,
    train: TrainingSettings = [],  # noqa: B006
    set_: Annotated[list[str], typer.Option("--set", help="A setting of the method, such as split=constant.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Draws the calibration and orders the text.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model; must not exist. The same command goes on if killed.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 10.0,
    dtype: DtypeName = "float32",
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rounds, sizes and memory; load no weights.")
    ] = False,
) -> None:
    """Shrink one model by Adapt-Accel: rounds of pruning and training, one schedule over all of them."""
    from adapt_pruner.recipes import Recipe, load_recipe
    from harness.accel import forecast_of, plan_of, run_accel
    from harness.errors import UserError
    from harness.parsing import large_number
    from harness.request import chosen_dtype, settings_of

    console.quiet = os.environ.get("RANK", "0") != "0"  # of several processes, one speaks
    values = (load_recipe(recipe) if recipe else Recipe()).model_dump(exclude_unset=True)
    if target_sparsity is not None or target_params is not None:
        values |= {"target_sparsity": None, "target_params": None}
    given = {
        "model": model, "target_sparsity": target_sparsity, "rounds": rounds, "text": text,
        "target_params": None if target_params is None else large_number("--target-params", target_params),
        "tokens": None if tokens is None else large_number("--tokens", tokens),
    }  # fmt: skip
    values |= {name: value for name, value in given.items() if value is not None}
    plan = plan_of(Recipe(**values), train, settings_of("adapt-accel", set_), seed)
    console.print(*_told(forecast_of(plan), plan.training), sep="\n", highlight=False, soft_wrap=True)
    if dry_run:
        return
    if out is None:
        raise UserError("a run needs a folder for its model; pass --out FOLDER, or --dry-run to see the plan alone")
    saved = run_accel(
        plan, out, dtype=chosen_dtype(dtype, device), device=device, minutes=checkpoint_minutes, on_step=_tell
    )
    if saved is not None:
        console.print(
            f"{out}: {saved.params_after.total:,} of {saved.params_before.total:,} parameters "
            f"(target {saved.target_params:,}), {saved.class_name}; training.json holds the loss of every step",
            highlight=False,
            soft_wrap=True,
        )


def _told(forecast: Forecast, training: TrainingSpec) -> Iterator[str | Table]:
    """The plan, for the terminal."""
    from harness.doctor import gigabytes

    seen = forecast.prospect
    yield f"{seen.source}: {forecast.dense.total:,} parameters, to {forecast.rounds[-1].params:,} in rounds:"
    table = Table("round", "parameters", "kv heads*", "MLP width*", "tokens", "steps")
    for entry in forecast.rounds:
        cells = (entry.params, entry.kv_heads, entry.intermediate_size, entry.tokens, entry.steps)
        table.add_row(str(entry.number), *(f"{cell:,}" for cell in cells))
    yield table
    yield "* at least, if all layers were alike; which layer loses what is decided on the way"
    yield (
        f"text      {training.source}, {training.tokens:,} tokens in steps of {training.batch_tokens:,}, windows of "
        f"{training.context_length:,}, rate {training.learning_rate:g} to {training.min_learning_rate:g}"
    )
    yield f"memory    about {gigabytes(forecast.training_bytes)} a process, the dense weights beside it included"


def _tell(log: StepLog, trainer: Trainer) -> None:
    if log.step == 0 or (log.step + 1) % 10 == 0 or log.step + 1 == trainer.total_steps:
        console.print(
            f"step {log.step + 1:,} of {trainer.total_steps:,}: loss {log.loss:.4f}, rate {log.learning_rate:.2g}, "
            f"{trainer.spec.batch_tokens / log.seconds:,.0f} tokens/s",
            highlight=False,
        )
