"""`harness compare` and `harness merge`: both end with a leaderboard."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from harness.errors import UserError
from harness.options import (
    BasisName,
    BatchTokens,
    CalibrationLength,
    CalibrationSamples,
    CalibrationText,
    Config,
    Device,
    DtypeName,
    Efficiency,
    ExecutorName,
    Force,
    HeldoutTokens,
    Limit,
    MethodSettings,
    MmluLimit,
    MmluShots,
    Offline,
    Profile,
    RayAddress,
    Recovery,
    RecoveryTokens,
    ResultsOption,
    RoundTo,
    ShardName,
    Stream,
    Tasks,
    TrackCpus,
    TrackGpus,
    TrackMemory,
    TrainingSettings,
    TrainingText,
    Uniform,
)
from harness.terminal import complain, console

if TYPE_CHECKING:
    from harness.compare import Executor
    from harness.report import Leaderboard
    from harness.results import Results
    from harness.track import Event


def compare(
    context: typer.Context,
    models: Annotated[str, typer.Option(help="Comma-separated catalog names, hub ids or folders.")] = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Comma-separated methods, or `all`.")] = "all",
    sparsities: Annotated[str, typer.Option(help="Comma-separated fractions of parameters to remove.")] = "0.2,0.4",
    basis: BasisName = "total",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds; calibration is drawn anew for each.")] = "0",
    calibration: CalibrationText = "wikipedia",
    calibration_samples: CalibrationSamples = 64,
    calibration_length: CalibrationLength = 128,
    tasks: Tasks = None,
    profile: Profile = "quick",
    limit: Limit = None,
    mmlu_limit: MmluLimit = None,
    mmlu_shots: MmluShots = None,
    heldout_tokens: HeldoutTokens = None,
    offline: Offline = None,
    efficiency: Efficiency = True,
    set_: MethodSettings = [],  # noqa: B006
    config: Config = None,
    recovery: Recovery = "none",
    recovery_tokens: RecoveryTokens = "100k",
    recovery_text: TrainingText = "reading",
    train: TrainingSettings = [],  # noqa: B006
    round_to: RoundTo = None,
    uniform: Uniform = False,
    dtype: DtypeName = "float32",
    out: ResultsOption = "results",
    force: Force = False,
    executor: ExecutorName = "local",
    ray_address: RayAddress = None,
    track_cpus: TrackCpus = 1,
    track_gpus: TrackGpus = 0,
    track_memory: TrackMemory = None,
    shard: ShardName = None,
    device: Device = "cpu",
    batch_tokens: BatchTokens = 4096,
    stream: Stream = False,
) -> None:
    """Prune with every method at matched sparsities, evaluate, and write the leaderboard."""
    from harness.compare import compare as run_comparison
    from harness.parsing import one_shard
    from harness.progress import ComparisonProgress
    from harness.request import comparison_from
    from harness.results import results_at

    given = {k for k in context.params if (source := context.get_parameter_source(k)) and source.name != "DEFAULT"}
    comparison, part = comparison_from(context.params, given, config), one_shard(shard)
    results = results_at(out)
    results.require_writable()
    try:
        with _handed_over(results), ComparisonProgress(console) as progress:
            leaderboard = run_comparison(
                comparison,
                results.store,
                _executor(executor, results, ray_address, track_cpus, track_gpus, track_memory),
                _with_push(progress.event, results),
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
    sys.exit(_show(leaderboard, results))


@contextmanager
def _handed_over(results: Results) -> Iterator[None]:
    """Runs that others made are fetched before the block; what is not there yet is handed over however it ends."""
    results.pull()
    try:
        yield
    finally:
        results.push()


def _with_push(hear: Callable[[Event], None], results: Results) -> Callable[[Event], None]:
    """What hears of progress, and hands over every run that is finished."""

    def told(event: Event) -> None:
        hear(event)
        if event.kind == "finished":
            results.push([event.run_id])

    return told


def _executor(
    name: str, results: Results, address: str | None, cpus: float, gpus: float, memory: str | None
) -> Executor:
    """Where tracks will run.

    Raises:
        UserError: there is no such executor, or no cluster.
    """
    from harness.doctor import memory_of
    from harness.executors import LocalExecutor
    from harness.parsing import large_number, one_of

    if one_of("executor", name, ("local", "ray")) == "local":
        return LocalExecutor()
    from harness.ray_executor import RayExecutor, Resources

    reserved = None if memory is None else large_number("track-memory", memory)
    return RayExecutor(address, Resources(cpus, gpus, reserved), results, memory_of)


def _show(leaderboard: Leaderboard, results: Results) -> int:
    """Write and print a table; the exit code.

    Raises:
        UserError: no method could do what was asked.
    """
    folder = results.store.root / "latest"
    leaderboard.write(folder)
    results.publish(folder)
    console.print(leaderboard.to_rich())
    console.print(f"{results.store.shown}/latest/leaderboard.csv and leaderboard.md hold this table", highlight=False)
    if (reason := leaderboard.why_nothing_ran) is not None:
        raise UserError(reason)
    return leaderboard.exit_code


def merge(
    folders: Annotated[list[str], typer.Argument(help="Results folders or URLs, such as those of `compare --shard`.")],
    out: Annotated[str, typer.Option(help="Results folder or URL that gets their runs; may hold some already.")],
) -> None:
    """Join results folders, and show the table of all their runs."""
    from harness.merging import merge as merge_stores
    from harness.report import build_leaderboard
    from harness.results import results_at

    into, others = results_at(out), [results_at(folder) for folder in folders]
    into.require_writable()
    for results in (into, *others):
        results.pull()
    merged = merge_stores(into.store, [other.store for other in others])
    into.push(merged.copied)
    console.print(f"{len(merged.copied)} runs copied, {merged.known} known already", highlight=False)
    for run_id in merged.differing:
        complain(f"{run_id}: there already with other numbers, which stay")
    sys.exit(_show(build_leaderboard(into.store), into))


def _command_line() -> str:
    return shlex.join(["harness", *sys.argv[1:]])
