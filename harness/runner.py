"""One track: one method on one model, its sparsities in one pass. `python -m harness.runner track.json` repeats it."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness.errors import UserError
from harness.records import RunRecord, RunSpec

CACHE = "cache"
"""Folder of a results folder for what its runs share; safe to delete."""


class Track(BaseModel):
    """Runs that share a pass, and where and how to make them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    specs: tuple[RunSpec, ...]
    """By rising sparsity; alike in everything else."""
    out: Path
    """The results folder."""
    device: str = "cpu"
    batch_tokens: int = 4096
    """Tokens scored at once."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    stream: bool = False
    """Leave layers in their files and read them when they run."""

    @property
    def track_id(self) -> str:
        """Readable and unique: the first run's id."""
        return self.specs[0].run_id


class Event(BaseModel):
    """One line of a track's progress."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """``phase`` (text says which), ``progress`` (done of total), ``finished`` (a record is written), ``user_error``."""
    run_id: str
    text: str = ""
    done: int = 0
    total: int = 0


Emit = Callable[[Event], None]


def run_track(track: Track, emit: Emit) -> None:
    """Make every run of a track and write its records, whatever becomes of them.

    Raises:
        UserError: something the user must mend (too little calibration text, say); nothing more is written.
    """
    from harness.budget import UnreachableSparsityError
    from harness.store import Store

    store = Store(track.out)
    pending = list(track.specs)

    def write(record: RunRecord, documents: Any = None) -> None:
        store.write(record, documents)
        emit(Event(kind="finished", run_id=record.spec.run_id, text=record.status))

    try:
        for record, documents in _records(track, emit):
            write(record, documents)
            pending.pop(0)
    except UnreachableSparsityError as error:
        for spec in pending:
            write(RunRecord(spec=spec, status="unsupported", reason=str(error)))
    except UserError:
        raise
    except Exception as error:
        for spec in pending:
            reason = f"{type(error).__name__}: {error}"
            write(RunRecord(spec=spec, status="failed", reason=reason, traceback=traceback.format_exc()))


@dataclass
class _Context:
    """What the runs of a track share."""

    track: Track
    emit: Emit
    loaded: Any
    calibration: Any
    load_seconds: float


def _records(track: Track, emit: Emit) -> Iterator[tuple[RunRecord, Any]]:
    import torch

    from harness.budget import target_for
    from harness.calibration import draw_calibration
    from harness.efficiency import measured
    from harness.evaluation.quiet import quiet
    from harness.models import load_model
    from harness.registry import build_method

    if track.num_threads:
        torch.set_num_threads(track.num_threads)
    first = track.specs[0]
    method = build_method(first.method, first.method_params)
    emit(Event(kind="phase", run_id=first.run_id, text="loading"))
    with quiet(), measured(track.device) as load:
        loaded = load_model(first.model, first.dtype, track.device, stream=track.stream)
        calibration = None
        if first.calibration is not None:
            longest = getattr(loaded.model.config, "max_position_embeddings", None)
            calibration = draw_calibration(first.calibration, loaded.tokenizer, first.seed, longest)
    context = _Context(track, emit, loaded, calibration, load.seconds)

    reason = method.why_unsupported(loaded.structure)
    if reason is not None:
        for spec in track.specs:
            yield RunRecord(spec=spec, status="unsupported", reason=reason, params_before=loaded.params), None
        return
    targets = [
        target_for(spec.sparsity, spec.basis, loaded.params, loaded.structure, spec.round_to, spec.uniform)
        for spec in track.specs
    ]
    pruned_models = _prune(context, method, targets)
    for spec, target in zip(track.specs, targets, strict=True):
        emit(Event(kind="phase", run_id=spec.run_id, text="pruning"))
        with measured(track.device) as cost:
            pruned = next(pruned_models)
        yield _evaluate(context, spec, target, method.tolerance, pruned, cost)
        del pruned  # the next model is made in the memory of this one


def _prune(context: _Context, method: Any, targets: list[Any]) -> Iterator[Any]:
    from harness.method import PrunedModel

    ahead = [target for target in targets if target.sparsity > 0]
    # Sparsity 0 is the identity for every method, SliceGPT's rotations included: the model as it was.
    for _ in range(len(targets) - len(ahead)):
        yield PrunedModel(model=context.loaded.model)
    if ahead:
        tokens = context.calibration.tokens.to(context.track.device) if context.calibration is not None else None
        yield from method.prune(context.loaded, tokens, ahead, context.track.specs[0].seed)


def _evaluate(
    context: _Context, spec: RunSpec, target: Any, tolerance: float, pruned: Any, prune_cost: Any
) -> tuple[RunRecord, Any]:
    from harness.efficiency import measured
    from harness.evaluation.reference import Dense
    from harness.evaluation.run import evaluate
    from harness.provenance import provenance
    from harness.structure import count_parameters, describe, layer_widths

    loaded, track = context.loaded, context.track
    params = count_parameters(pruned.model.named_parameters())
    known = {
        "spec": spec,
        "params_before": loaded.params,
        "params_after": params,
        "tied_embeddings": bool(pruned.model.config.tie_word_embeddings),
        "knob": dict(pruned.knob),
        "layers": layer_widths(describe(pruned.model)),
        "trace": dict(pruned.trace),
    }
    if not target.is_met_by(params, tolerance):
        reason = (
            f"ended at {params.on(spec.basis):,} {spec.basis} parameters, the target being {target.params:,} "
            f"(at most {tolerance:.2%} of the dense model above it, never below)"
        )
        return RunRecord(**known, status="failed", reason=reason), None

    def progress(done: int, total: int) -> None:
        context.emit(Event(kind="progress", run_id=spec.run_id, done=done, total=total))

    context.emit(Event(kind="phase", run_id=spec.run_id, text="evaluating"))
    with measured(track.device) as cost:
        evaluation = evaluate(
            pruned.model,
            loaded.tokenizer,
            spec.evaluation,
            batch_tokens=track.batch_tokens,
            dense=Dense(loaded.model, loaded.weights_sha256),
            cache=track.out / CACHE,
            progress=progress,
        )
    efficiency, timing_seconds = _measure_efficiency(context, spec, pruned)
    measures = (*evaluation.measures, *efficiency)
    broken = [m.name for m in measures if not math.isfinite(m.value)]
    record = RunRecord(
        **known,
        status="failed" if broken else "ok",
        reason=f"not finite: {', '.join(broken)}" if broken else None,
        measures=() if broken else measures,
        phase_seconds={
            "load": context.load_seconds,
            "prune": prune_cost.seconds,
            "evaluate": cost.seconds,
            **timing_seconds,
        },
        peak_bytes={"prune": prune_cost.peak_bytes, "evaluate": cost.peak_bytes},
        notes=(*_calibration_notes(context, spec), *_streaming_notes(track), *evaluation.notes),
        provenance=provenance(
            weights_sha256=loaded.weights_sha256,
            calibration_sha256=context.calibration.sha256 if context.calibration is not None else None,
            data_fingerprints=evaluation.data_fingerprints,
            device=track.device,
        ),
    )
    return record, evaluation.documents


def _measure_efficiency(context: _Context, spec: RunSpec, pruned: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    """What running the model costs, and the seconds it took to find out; nothing where it was not asked for."""
    from harness.efficiency import measured
    from harness.inference_cost import measure_inference

    if spec.efficiency is None:
        return (), {}
    context.emit(Event(kind="phase", run_id=spec.run_id, text="timing"))
    with measured(context.track.device) as cost:
        found = measure_inference(pruned.model, context.loaded.model, spec.efficiency)
    return found, {"efficiency": cost.seconds}


def _calibration_notes(context: _Context, spec: RunSpec) -> tuple[str, ...]:
    if context.calibration is None or spec.calibration is None:
        return ()
    shared = sorted(context.calibration.evaluated_tasks & set(spec.evaluation.tasks))
    if not shared:
        return ()
    return (f"calibrated on {spec.calibration.source}, whose text {', '.join(shared)} asks about",)


def _streaming_notes(track: Track) -> tuple[str, ...]:
    return ("layers were read from their files whenever they ran (--stream); the seconds include it",) * track.stream


def main() -> None:
    """Run the track in the file named on the command line; events go to standard output, one JSON object a line."""
    track = Track.model_validate_json(Path(sys.argv[1]).read_text())

    def emit(event: Event) -> None:
        print(event.model_dump_json(exclude_defaults=True), flush=True)

    try:
        run_track(track, emit)
    except UserError as error:
        emit(Event(kind="user_error", run_id=track.track_id, text=str(error)))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
