"""Making one smaller model of a run: pruning it, training it where that is asked for, and what to tell of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import JsonValue

from harness.budget import ParameterTarget
from harness.calibration import Calibration
from harness.corpora import load_corpus
from harness.cpu import fast_matmul, lean_cpu, return_surplus
from harness.efficiency import measured
from harness.evaluation.heldout import measure_heldout
from harness.evaluation.heldout_text import HeldOutText
from harness.method import InterleavedMethod, LoadedModel, PrunedModel, PruningMethod
from harness.records import EvaluationSpec, ParamCounts, RunSpec
from harness.structure import count_parameters
from harness.track import CACHE, Emit, Event, Track
from harness.training import Session, StepLog, Trainer, recover
from harness.training.text import tasks_asking_about, training_text


@dataclass
class Context:
    """What the runs of a track share."""

    track: Track
    emit: Emit
    loaded: LoadedModel
    calibration: Calibration | None
    load_seconds: float
    fingerprint: int
    """Of the dense model's weights: every other model is measured against them."""

    @property
    def tokens(self) -> Any:
        """Calibration tokens on the track's device; None where the method looks at none."""
        return None if self.calibration is None else self.calibration.tokens.to(self.track.device)


@dataclass
class Made:
    """A smaller model, and what making it took."""

    pruned: PrunedModel
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    session: Session | None = None
    """How it was trained; None where it was not."""


def make(
    context: Context,
    method: PruningMethod,
    spec: RunSpec,
    target: ParameterTarget,
    pruned_models: Iterator[PrunedModel],
) -> Made:
    """Prune, and train where the run asks for it.

    Raises:
        TrainingDivergedError: a loss is not finite.
    """
    session = _session(context, spec)
    if session is not None and isinstance(method, InterleavedMethod) and spec.sparsity > 0:
        return _make_interleaved(context, method, spec, target, session)
    with measured(context.track.device) as cost, lean_cpu() if context.track.stream else fast_matmul():
        pruned = next(pruned_models)
        return_surplus()
    made = Made(pruned, {"prune": cost.seconds}, {"prune": cost.peak_bytes}, session)
    params = count_parameters(pruned.model.named_parameters())
    if session is not None and why_missed(spec, target, method.tolerance, params) is None:
        _train(context, spec, made, session)
    return made


def _make_interleaved(
    context: Context, method: InterleavedMethod, spec: RunSpec, target: ParameterTarget, session: Session
) -> Made:
    with measured(context.track.device) as cost, fast_matmul():
        pruned = method.prune_and_train(context.loaded, context.tokens, target, spec.seed, session)
    seconds = {"prune": cost.seconds - session.seconds_here, "train": session.seconds}
    return Made(pruned, seconds, {"train": cost.peak_bytes}, session)


def _train(context: Context, spec: RunSpec, made: Made, session: Session) -> None:
    """Train the model after pruning, as the session says."""
    context.emit(Event(kind="phase", run_id=spec.run_id, text="training"))
    if made.pruned.model is context.loaded.model:  # sparsity 0
        made.pruned = replace(made.pruned, model=copy.deepcopy(made.pruned.model))
    with measured(context.track.device) as cost:
        recover(made.pruned.model, session)
    made.seconds["train"] = session.seconds
    made.peak_bytes["train"] = cost.peak_bytes


def _session(context: Context, spec: RunSpec) -> Session | None:
    """The training that a run asks for; None where it asks for none."""
    if spec.recovery is None:
        return None
    cache = context.track.out / CACHE
    points = spec.recovery.heldout_points
    heldout = _heldout_text(context, spec.evaluation) if points else None

    def on_step(log: StepLog, trainer: Trainer) -> None:
        done, total = log.step + 1, trainer.total_steps
        context.emit(Event(kind="progress", run_id=spec.run_id, text="training", done=done, total=total))
        if heldout is not None and done * points // total > log.step * points // total:
            found = measure_heldout(trainer.model, heldout, batch_tokens=context.track.batch_tokens)
            session.heldout.append((log.tokens, found.loss.value))

    session = Session(
        spec.recovery,
        training_text(spec.recovery, context.loaded.tokenizer, cache),
        teacher=context.loaded.model if spec.recovery.distillation else None,
        folder=cache / "checkpoints" / spec.run_id,
        key=spec.run_id,
        on_step=on_step,
    )
    return session


def _heldout_text(context: Context, evaluation: EvaluationSpec) -> HeldOutText:
    """The text that the evaluation measures perplexity on."""
    corpus = load_corpus("heldout")
    return HeldOutText.of(corpus, context.loaded.tokenizer, evaluation.heldout_tokens, evaluation.heldout_length)


def why_missed(spec: RunSpec, target: ParameterTarget, tolerance: float, params: ParamCounts) -> str | None:
    """Why a model's size is not the one that was asked for; None where it is."""
    if target.is_met_by(params, tolerance):
        return None
    return (
        f"ended at {params.on(spec.basis):,} {spec.basis} parameters, the target being {target.params:,} "
        f"(at most {tolerance:.2%} of the dense model above it, never below)"
    )


def prune_all(context: Context, method: PruningMethod, targets: list[ParameterTarget]) -> Iterator[PrunedModel]:
    """One smaller model per target, as they are asked for; the dense one for sparsity 0."""
    ahead = [target for target in targets if target.sparsity > 0]
    # Sparsity 0 is the identity for every method, SliceGPT's rotations included: the model as it was.
    for _ in range(len(targets) - len(ahead)):
        yield PrunedModel(model=context.loaded.model)
    if ahead:
        yield from method.prune(context.loaded, context.tokens, ahead, context.track.specs[0].seed)


def notes_on(context: Context, spec: RunSpec, session: Session | None) -> tuple[str, ...]:
    """What a reader of the table must know of how the model was made."""
    notes = []
    if context.calibration is not None and spec.calibration is not None:
        notes += _asked("calibrated", spec.calibration.source, context.calibration.evaluated_tasks, spec)
    if session is not None:
        notes += _asked("trained", session.spec.source, tasks_asking_about(session.spec.source), spec)
        num_tokens = len(session.text.tokens)
        if session.tokens > num_tokens:
            notes.append(f"trained {session.tokens / num_tokens:.1f} times over the {num_tokens:,} tokens there are")
        if spec.dtype == "bfloat16" and session.spec.mode == "full":
            notes.append("weights and moments of the training are bfloat16, which rounds small updates away")
    if context.track.stream:
        notes.append("layers were read from their files whenever they ran (--stream); the seconds include it")
    return tuple(notes)


def _asked(what: str, source: str, evaluated_tasks: Iterable[str], spec: RunSpec) -> list[str]:
    shared = sorted(set(evaluated_tasks) & set(spec.evaluation.tasks))
    return [f"{what} on {source}, whose text {', '.join(shared)} asks about"] if shared else []


def told_of_training(session: Session | None) -> dict[str, JsonValue]:
    """The loss over the tokens, for the trace: at most a hundred steps of it."""
    if session is None:
        return {}
    every = max(-(-len(session.log) // 100), 1)
    curve: list[JsonValue] = [[log.tokens, round(log.loss, 6)] for log in session.log[::every]]
    heldout: list[JsonValue] = [[tokens, round(loss, 6)] for tokens, loss in session.heldout]
    told: dict[str, JsonValue] = {"loss": curve, "steps": len(session.log), "text_sha256": session.text.sha256}
    return {"training": told | ({"heldout": heldout} if heldout else {})}
