"""`harness compare` and `harness merge`: both end with a leaderboard."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    Out,
    Profile,
    RoundTo,
    Stream,
    Tasks,
    TrainingSettings,
    TrainingText,
    Uniform,
)
from harness.terminal import complain, console

if TYPE_CHECKING:
    from harness.compare import Executor
    from harness.report import Leaderboard


def compare(
    context: typer.Context,
    models: Annotated[str, typer.Option(help="Comma-separated catalog names, hub ids or folders.")] = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Comma-separated methods, or `all`.")] = "all",
    sparsities: Annotated[str, typer.Option(help="Comma-separated fractions of parameters to remove.")] = "0.2,0.4",
    basis: BasisName = "total",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds; calibration is drawn anew for each.")] = "0",
    calibration: Annotated[
        str, typer.Option(help="wikipedia, books, c4, wikitext2, slimpajama, bookcorpus, or a .txt/.jsonl file.")
    ] = "wikipedia",
    calibration_samples: CalibrationSamples = 64,
    calibration_length: CalibrationLength = 128,
    tasks: Tasks = None,
    profile: Profile = "quick",
    limit: Limit = None,
    mmlu_limit: MmluLimit = None,
    mmlu_shots: MmluShots = None,
    heldout_tokens: HeldoutTokens = None,
    offline: Offline = None,
    efficiency: Annotated[bool, typer.Option(help="Time every model beside the dense one, count its MACs.")] = True,
    set_: Annotated[list[str], typer.Option("--set", help="A method's setting, such as flap.metric=wifn.")] = [],  # noqa: B006
    config: Annotated[Path | None, typer.Option(help="A .toml file with the same settings; flags win.")] = None,
    recovery: Annotated[
        str, typer.Option(help="Comma-separated trainings after pruning: none, lora, full; a table for each.")
    ] = "none",
    recovery_tokens: Annotated[
        str, typer.Option(help="Tokens every pruned model is trained on, such as 200k.")
    ] = "100k",
    recovery_text: TrainingText = "reading",
    train: TrainingSettings = [],  # noqa: B006
    round_to: RoundTo = None,
    uniform: Uniform = False,
    dtype: DtypeName = "float32",
    out: Out = Path("results"),
    force: Annotated[bool, typer.Option("--force", help="Run again what is done.")] = False,
    executor: Annotated[str, typer.Option(help="Where tracks run: local, or ray for a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Of the cluster, such as auto or HOST:6379; default a new one on this machine.")
    ] = None,
    track_cpus: Annotated[float, typer.Option(help="Cores that a track reserves on its node of the cluster.")] = 1,
    track_gpus: Annotated[float, typer.Option(help="GPUs, likewise.")] = 0,
    track_memory: Annotated[str | None, typer.Option(help="Bytes of memory, likewise, such as 24B or 500M.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="K/N: make the K-th of N parts alone; `harness merge` joins their folders.")
    ] = None,
    device: Device = "cpu",
    batch_tokens: BatchTokens = 4096,
    stream: Stream = False,
) -> None:
    """Prune with every method at matched sparsities, evaluate, and write the leaderboard."""
    from harness.compare import compare as run_comparison
    from harness.parsing import one_shard
    from harness.progress import ComparisonProgress
    from harness.request import comparison_from
    from harness.store import Store

    given = {k for k in context.params if (source := context.get_parameter_source(k)) and source.name != "DEFAULT"}
    comparison, part = comparison_from(context.params, given, config), one_shard(shard)
    store = Store(out)
    store.require_writable()
    try:
        with ComparisonProgress(console) as progress:
            leaderboard = run_comparison(
                comparison,
                store,
                _executor(executor, ray_address, track_cpus, track_gpus, track_memory),
                progress.event,
                on_plan=progress.plan,
                on_cost=progress.say,
                force=force,
                shard=part,
                device=device,
                batch_tokens=batch_tokens,
                stream=stream,
                command=_command_line(),
            )
    except KeyboardInterrupt:
        complain("stopped; finished runs are kept, and the same command goes on with the rest")
        sys.exit(130)
    sys.exit(_show(leaderboard, out / "latest"))


def _executor(name: str, address: str | None, cpus: float, gpus: float, memory: str | None) -> Executor:
    """Where tracks will run.

    Raises:
        UserError: there is no such executor, or no cluster.
    """
    from harness.executors import LocalExecutor
    from harness.parsing import large_number, one_of

    if one_of("executor", name, ("local", "ray")) == "local":
        return LocalExecutor()
    from harness.ray_executor import RayExecutor, Resources

    reserved = None if memory is None else large_number("track-memory", memory)
    return RayExecutor(address, Resources(cpus, gpus, reserved))


def _show(leaderboard: Leaderboard, folder: Path) -> int:
    """Write and print a table; the exit code.

    Raises:
        UserError: no method could do what was asked.
    """
    from harness.compare import write_leaderboard

    write_leaderboard(leaderboard, folder)
    console.print(leaderboard.to_rich())
    console.print(f"{folder / 'leaderboard.csv'} and leaderboard.md hold this table", highlight=False)
    if (reason := leaderboard.why_nothing_ran) is not None:
        raise UserError(reason)
    return leaderboard.exit_code


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Results folders, such as those of `compare --shard`.")],
    out: Annotated[Path, typer.Option(help="Results folder that gets their runs; may hold some already.")],
) -> None:
    """Join results folders, and show the table of all their runs."""
    from harness.merging import merge as merge_stores
    from harness.report import build_leaderboard
    from harness.store import Store

    into = Store(out)
    into.require_writable()
    merged = merge_stores(into, [Store(folder) for folder in folders])
    console.print(f"{merged.copied} runs copied, {merged.known} known already", highlight=False)
    for run_id in merged.differing:
        complain(f"{run_id}: there already with other numbers, which stay")
    sys.exit(_show(build_leaderboard(into), out / "latest"))


def _command_line() -> str:
    return shlex.join(["harness", *sys.argv[1:]])
