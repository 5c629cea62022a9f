"""One track: one method on one model, its sparsities in one pass. `python -m harness.runner track.json` repeats it."""

from __future__ import annotations

import math
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.budget import ParameterTarget, UnreachableSparsityError, target_for
from harness.calibration import draw_calibration
from harness.efficiency import measured
from harness.errors import UserError
from harness.evaluation.quiet import quiet
from harness.evaluation.reference import Dense
from harness.evaluation.run import Evaluation, evaluate
from harness.inference_cost import measure_inference
from harness.making import Context, Made, make, notes_on, prune_all, told_of_training, why_missed
from harness.models import load_model
from harness.provenance import provenance
from harness.records import Measure, RunRecord, RunSpec
from harness.registry import build_method
from harness.store import Store
from harness.structure import count_parameters, describe, layer_widths
from harness.track import ATTENDED, CACHE, Emit, Event, Track
from harness.training import TrainingDivergedError
from harness.weights import fingerprint


def run_track(track: Track, emit: Emit) -> None:
    """Make every run of a track and write its records, whatever becomes of them.

    Raises:
        UserError: something the user must mend (too little calibration text, say); nothing more is written.
    """
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


def _records(track: Track, emit: Emit) -> Iterator[tuple[RunRecord, Any]]:
    if track.num_threads:
        torch.set_num_threads(track.num_threads)
    first = track.specs[0]
    method = build_method(first.method, first.method_params)
    context = _load(track, emit)
    loaded = context.loaded
    reason = method.why_unsupported(loaded.structure)
    if reason is not None:
        for spec in track.specs:
            yield RunRecord(spec=spec, status="unsupported", reason=reason, params_before=loaded.params), None
        return
    targets = [
        target_for(spec.sparsity, spec.basis, loaded.params, loaded.structure, spec.round_to, spec.uniform)
        for spec in track.specs
    ]
    pruned_models = prune_all(context, method, targets)
    for spec, target in zip(track.specs, targets, strict=True):
        emit(Event(kind="phase", run_id=spec.run_id, text="pruning"))
        try:
            made = make(context, method, spec, target, pruned_models)
        except TrainingDivergedError as error:
            yield RunRecord(spec=spec, status="failed", reason=str(error), params_before=loaded.params), None
            continue
        if fingerprint(loaded.model.parameters()) != context.fingerprint:
            raise RuntimeError(f"{method.name} changed the dense model, which every model is measured against")
        yield _finished(context, spec, target, method.tolerance, made)
        if made.session is not None:
            made.session.finish()  # the record is written
        del made  # the next model is made in the memory of this one


def _load(track: Track, emit: Emit) -> Context:
    first = track.specs[0]
    emit(Event(kind="phase", run_id=first.run_id, text="loading"))
    with quiet(), measured(track.device) as load:
        loaded = load_model(first.model, first.dtype, track.device, stream=track.stream)
        calibration = None
        if first.calibration is not None:
            longest = getattr(loaded.model.config, "max_position_embeddings", None)
            calibration = draw_calibration(first.calibration, loaded.tokenizer, first.seed, longest)
    return Context(track, emit, loaded, calibration, load.seconds, fingerprint(loaded.model.parameters()))


def _finished(
    context: Context, spec: RunSpec, target: ParameterTarget, tolerance: float, made: Made
) -> tuple[RunRecord, Any]:
    """The record of a model, scored where its size is right, and its documents."""
    loaded, pruned = context.loaded, made.pruned
    params = count_parameters(pruned.model.named_parameters())
    known = {
        "spec": spec,
        "params_before": loaded.params,
        "params_after": params,
        "tied_embeddings": bool(pruned.model.config.tie_word_embeddings),
        "knob": dict(pruned.knob),
        "layers": layer_widths(describe(pruned.model)),
        "trace": {**pruned.trace, **told_of_training(made.session)},
    }
    if (reason := why_missed(spec, target, tolerance, params)) is not None:
        return RunRecord(**known, status="failed", reason=reason), None
    with measured(context.track.device) as cost:
        evaluation = _evaluate(context, spec, pruned.model)
    efficiency, timing_seconds = _measure_efficiency(context, spec, pruned.model)
    measures = (*evaluation.measures, *efficiency)
    broken = [m.name for m in measures if not math.isfinite(m.value)]
    record = RunRecord(
        **known,
        status="failed" if broken else "ok",
        reason=f"not finite: {', '.join(broken)}" if broken else None,
        measures=() if broken else measures,
        phase_seconds={
            "load": context.load_seconds,
            **made.seconds,
            "evaluate": cost.seconds,
            **timing_seconds,
        },
        peak_bytes={**made.peak_bytes, "evaluate": cost.peak_bytes},
        notes=(*notes_on(context, spec, made.session), *evaluation.notes),
        provenance=provenance(
            weights_sha256=loaded.weights_sha256,
            calibration_sha256=context.calibration.sha256 if context.calibration is not None else None,
            data_fingerprints=evaluation.data_fingerprints,
            device=context.track.device,
        ),
    )
    return record, evaluation.documents


def _evaluate(context: Context, spec: RunSpec, model: Any) -> Evaluation:
    def progress(done: int, total: int) -> None:
        context.emit(Event(kind="progress", run_id=spec.run_id, done=done, total=total))

    context.emit(Event(kind="phase", run_id=spec.run_id, text="evaluating"))
    return evaluate(
        model,
        context.loaded.tokenizer,
        spec.evaluation,
        batch_tokens=context.track.batch_tokens,
        dense=Dense(context.loaded.model, context.loaded.weights_sha256),
        cache=context.track.out / CACHE,
        progress=progress,
    )


def _measure_efficiency(context: Context, spec: RunSpec, model: Any) -> tuple[tuple[Measure, ...], dict[str, float]]:
    """What running the model costs, and the seconds it took to find out; nothing where it was not asked for."""
    if spec.efficiency is None:
        return (), {}
    context.emit(Event(kind="phase", run_id=spec.run_id, text="timing"))
    with measured(context.track.device) as cost:
        found = measure_inference(model, context.loaded.model, spec.efficiency)
    return found, {"efficiency": cost.seconds}


def _end_when_left_alone() -> None:
    """A parent that is killed cannot end its children, but the pipe it held closes."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Run the track in the file named on the command line; events go to standard output, one JSON object a line.

    What libraries print there goes to standard error. With `ATTENDED` after the file, the process ends at once when
    standard input closes.
    """
    track = Track.model_validate_json(Path(sys.argv[1]).read_text())
    if ATTENDED in sys.argv[2:]:
        threading.Thread(target=_end_when_left_alone, daemon=True).start()
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: Event) -> None:
        print(event.model_dump_json(exclude_defaults=True), file=events, flush=True)

    try:
        run_track(track, emit)
    except UserError as error:
        emit(Event(kind="user_error", run_id=track.track_id, text=str(error)))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
