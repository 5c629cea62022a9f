"""`harness compare`, the story on one screen: expand, skip what is done, say what it costs, run each track, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue

from harness.cost import CostRequest, CostUnknownError, ScoringCost, describe_cost
from harness.errors import UserError
from harness.method import InterleavedMethod, PruningMethod
from harness.records import (
    Basis,
    CalibrationSpec,
    Dtype,
    EfficiencySpec,
    EvaluationSpec,
    ModelRef,
    RunSpec,
    TrainingSpec,
)
from harness.registry import build_method
from harness.report import Leaderboard, build_leaderboard
from harness.store import Store
from harness.track import CACHE, Event, Track

POLL_SECONDS = 1.0
"""Between looks at tracks that other processes work on."""


class Comparison(BaseModel):
    """What is compared: every model with every method at every sparsity and seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[ModelRef, ...]
    methods: tuple[str, ...]
    method_params: Mapping[str, dict[str, JsonValue]] = {}
    """Method -> hyper-parameters that differ from its defaults."""
    sparsities: tuple[float, ...]
    basis: Basis = "total"
    seeds: tuple[int, ...] = (0,)
    dtype: Dtype = "float32"
    calibration: CalibrationSpec
    evaluation: EvaluationSpec
    efficiency: EfficiencySpec | None = None
    """None does not measure what running the models costs."""
    recoveries: tuple[TrainingSpec | None, ...] = (None,)
    """Tracks: every method is compared under each of these trainings; None is pruning alone."""
    round_to: int | None = None
    uniform: Literal[True] | None = None


class Executor(Protocol):
    """Runs tracks somewhere."""

    num_workers: int
    """Tracks it is given at once; with more than one, `run` is called from several threads."""

    def cost(self, request: CostRequest) -> ScoringCost:
        """What scoring will cost there."""

    def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
        """Run a track to its end; every run of it has a record afterwards."""

    def stop(self) -> None:
        """End what runs in other threads, as the comparison is given up."""


def expand(comparison: Comparison) -> list[list[RunSpec]]:
    """One spec per run, grouped into tracks: runs that differ in sparsity alone, by rising sparsity.

    Settings that cannot change a method's numbers are left out of its specs, so that a dense model is scored once
    however many seeds and calibrations are compared.
    """
    specs: list[RunSpec] = []
    for model in comparison.models:
        for recovery in comparison.recoveries:
            for name in comparison.methods:
                specs += _specs_of(comparison, model, name, recovery)
    return tracks_of(specs)


def competes(method: PruningMethod, recovery: TrainingSpec | None) -> bool:
    """Whether a method has a row under a training: dense has none, what trains itself only one of all weights."""
    if isinstance(method, InterleavedMethod):
        return recovery is not None and recovery.mode == "full"
    return recovery is None or method.name != "dense"


def _specs_of(comparison: Comparison, model: ModelRef, name: str, recovery: TrainingSpec | None) -> Iterator[RunSpec]:
    """The runs of one method under one training."""
    method = build_method(name, comparison.method_params.get(name))
    if not competes(method, recovery):
        return
    prunes = name != "dense"
    varies = method.needs_seed or recovery is not None  # the seed orders the training text too
    for seed in comparison.seeds if varies else comparison.seeds[:1]:
        for sparsity in sorted(set(comparison.sparsities)) if prunes else (0.0,):
            yield RunSpec(
                model=model,
                method=name,
                method_params=method.model_dump(mode="json"),
                sparsity=sparsity,
                basis=comparison.basis if prunes else "total",
                seed=seed if varies else 0,
                dtype=comparison.dtype,
                calibration=comparison.calibration if method.needs_calibration else None,
                evaluation=comparison.evaluation,
                efficiency=comparison.efficiency,
                recovery=None if recovery is None else recovery.model_copy(update={"seed": seed}),
                round_to=comparison.round_to if prunes else None,
                uniform=comparison.uniform if prunes else None,
            )


def tracks_of(specs: Iterable[RunSpec]) -> list[list[RunSpec]]:
    """The specs, each once, grouped into tracks: runs that differ in sparsity alone, by rising sparsity."""
    tracks: dict[str, dict[str, RunSpec]] = {}
    for spec in specs:
        tracks.setdefault(_track_name(spec), {})[spec.run_id] = spec
    return [sorted(members.values(), key=lambda spec: spec.sparsity) for members in tracks.values()]


def _track_name(spec: RunSpec) -> str:
    return spec.model_copy(update={"sparsity": 0.0}).run_id


def compare(
    comparison: Comparison,
    store: Store,
    executor: Executor,
    on_event: Callable[[Event], None],
    *,
    on_plan: Callable[[Sequence[RunSpec], Sequence[RunSpec]], None] = lambda _all, _missing: None,
    on_cost: Callable[[str], None] | None = None,
    force: bool = False,
    shard: tuple[int, int] = (1, 1),
    device: str = "cpu",
    batch_tokens: int = 4096,
    num_threads: int | None = None,
    stream: bool = False,
    command: str | None = None,
) -> Leaderboard:
    """Make the runs that ``store`` does not hold yet, and read the leaderboard off the records.

    Args:
        comparison: what to compare.
        store: where records are, and go.
        executor: where tracks run.
        on_event: hears of every track's progress.
        on_plan: hears which runs there are and which are still missing.
        on_cost: hears what scoring will cost before it starts, in a sentence per model; None spares the estimate.
        force: run again what is done.
        shard: (K, N) makes and shows the K-th of N parts of the tracks alone.
        device: torch device of every track.
        batch_tokens: tokens scored at once.
        num_threads: CPU threads of a track.
        stream: leave layers in their files until they run.
        command: how the user asked for it, for the table's notes.

    Raises:
        UserError: something the user must mend; finished runs stay.
    """
    tracks = expand(comparison)
    if not tracks:
        raise UserError("dense is not trained: name a method to prune with, or pass --recovery none")
    tracks = _part(tracks, *shard)
    options = {"device": device, "batch_tokens": batch_tokens, "num_threads": num_threads, "stream": stream}
    make_runs(tracks, store, executor, on_event, options, on_plan=on_plan, on_cost=on_cost, force=force)
    return build_leaderboard(store, [spec.run_id for track in tracks for spec in track], command=command)


def _part(tracks: Sequence[list[RunSpec]], part: int, parts: int) -> list[list[RunSpec]]:
    """Every ``parts``-th track from the ``part``-th on."""
    if part > len(tracks):
        raise UserError(f"shard {part}/{parts} has no runs: there are {len(tracks)} tracks; make fewer parts")
    return list(tracks[part - 1 :: parts])


def make_runs(
    tracks: Sequence[Sequence[RunSpec]],
    store: Store,
    executor: Executor,
    on_event: Callable[[Event], None],
    options: dict[str, Any],
    *,
    on_plan: Callable[[Sequence[RunSpec], Sequence[RunSpec]], None],
    on_cost: Callable[[str], None] | None,
    force: bool,
) -> None:
    """Make the runs of the tracks that ``store`` does not hold yet, or all of them.

    Args:
        tracks: as `tracks_of` groups them.
        store: where records are, and go.
        executor: where tracks run.
        on_event: hears of every track's progress.
        options: of every `Track`: device, batch_tokens, num_threads, stream.
        on_plan: hears which runs there are and which will be made.
        on_cost: hears what scoring will cost before it starts; None spares the estimate.
        force: make again what is done.

    Raises:
        UserError: something the user must mend; finished runs stay.
    """
    specs = [spec for track in tracks for spec in track]
    missing = specs if force else store.missing(specs)
    on_plan(specs, missing)
    if on_cost is not None:
        for sentence in _costs(missing, executor, store.root / CACHE, options):
            on_cost(sentence)
    wanted = {spec.run_id for spec in missing}
    todo = [specs for track in tracks if (specs := [spec for spec in track if spec.run_id in wanted])]
    make = partial(_make_track, store=store, executor=executor, on_event=on_event, options=options, force=force)
    with ThreadPoolExecutor(executor.num_workers) as pool:
        # One worker is this thread: a signal then reaches what it waits for.
        each = map if executor.num_workers == 1 else pool.map
        try:
            while todo:
                # What another process works on comes last: most likely it is made by then.
                taken = [specs for specs, made in zip(todo, each(make, todo), strict=True) if not made]
                if len(taken) == len(todo):
                    time.sleep(POLL_SECONDS)
                todo = taken
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            executor.stop()
            raise


def _make_track(
    specs: Sequence[RunSpec],
    store: Store,
    executor: Executor,
    on_event: Callable[[Event], None],
    options: dict[str, Any],
    *,
    force: bool,
) -> bool:
    """Make the runs of a track unless another process is at it; whether there is nothing left to make."""
    with store.lease(_track_name(specs[0])) as held:
        if held:
            # Another process may have made them in the meantime.
            left = tuple(specs) if force else tuple(store.missing(specs))
            if left:
                executor.run(Track(specs=left, out=store.root, **options), on_event)
    return held


def _costs(specs: Sequence[RunSpec], executor: Executor, cache: Path, options: dict[str, Any]) -> Iterator[str]:
    """A sentence per model, precision and set of documents."""
    alike: dict[str, list[RunSpec]] = {}
    for spec in specs:
        key = spec.model_dump_json(include={"model", "dtype", "evaluation"})
        alike.setdefault(key, []).append(spec)
    for group in alike.values():
        first = group[0]
        machine = {name: options[name] for name in ("device", "batch_tokens", "num_threads")}
        request = CostRequest(model=first.model, dtype=first.dtype, evaluation=first.evaluation, cache=cache, **machine)
        try:
            cost = executor.cost(request)
        except CostUnknownError as error:  # no reason not to run
            yield f"What scoring {first.model.name} will cost is not known: {error}"
        else:
            yield describe_cost(first.model.name, cost, [(spec.sparsity, spec.basis) for spec in group])
