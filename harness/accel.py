"""A run of Adapt-Accel from a recipe: settings checked, forecast told, model pruned and trained, folder saved."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from adapt_pruner.accel import AdaptAccel
from adapt_pruner.recipes import Recipe, Round, forecast
from harness.budget import ParameterTarget
from harness.calibration import draw_calibration
from harness.card import Origin, model_card
from harness.cpu import fast_matmul
from harness.durable import write_file
from harness.errors import UserError
from harness.evaluation.quiet import quiet
from harness.footprint import Footprint
from harness.models import load_model
from harness.models.prospect import Prospect, prospect
from harness.models.saving import require_new, save_model
from harness.records import CalibrationSpec, Dtype, ModelRef, ParamCounts, TrainingSpec
from harness.registry import build_method
from harness.request import calibration_spec, model_ref, one_sparsity
from harness.steps import SavedModel, outcome_of
from harness.structure import count_parameters, describe
from harness.training import Session, StepLog, Trainer
from harness.training.sharding import sharding_asked
from harness.training.text import training_text
from harness.training_request import training_spec


@dataclass(frozen=True)
class AccelPlan:
    """A checked run."""

    model: ModelRef
    method: AdaptAccel
    target_sparsity: float | None
    target_params: int | None
    training: TrainingSpec
    calibration: CalibrationSpec
    seed: int = 0

    def target(self, dense: ParamCounts) -> ParameterTarget:
        """Where the last round ends.

        Raises:
            UserError: it is not smaller than the dense model.
        """
        if self.target_params is None:
            assert self.target_sparsity is not None
            return ParameterTarget(self.target_sparsity, "total", dense)
        if not 0 < self.target_params < dense.total:
            raise UserError(
                f"--target-params {self.target_params:,} is not below the {dense.total:,} parameters of "
                f"{self.model.name}; pass fewer"
            )
        return ParameterTarget(1 - self.target_params / dense.total, "total", dense)


@dataclass(frozen=True)
class Forecast:
    """What a run will look like, from shapes alone."""

    prospect: Prospect
    dense: ParamCounts
    rounds: list[Round]
    training_bytes: int
    """Most memory of a process that trains, estimated; the dense weights beside it included."""


def plan_of(recipe: Recipe, changes: list[str], params: dict[str, Any], seed: int) -> AccelPlan:
    """The run of a recipe.

    Args:
        recipe: with the flags in place of what it says.
        changes: settings of the training, ``name=value``, over the recipe's.
        params: settings of the method, over the recipe's.
        seed: draws the calibration and the order of the text.

    Raises:
        UserError: anything that is not allowed.
    """
    if (recipe.target_params is None) == (recipe.target_sparsity is None):
        raise UserError("an Adapt-Accel run needs one target; pass --target-sparsity 0.2 or --target-params 125M")
    told = [f"{name}={json.dumps(value)}" for name, value in recipe.train.items()]
    training = training_spec("full", recipe.tokens, recipe.text, [*told, *changes])
    if training.heldout_points:
        raise UserError("heldout_points is for harness compare, which scores models; leave it out here")
    settings = {"rounds": recipe.rounds, **recipe.params, **params}
    method = build_method("adapt-accel", settings)
    assert isinstance(method, AdaptAccel)
    drawn = CalibrationSpec().model_dump() | recipe.calibration
    return AccelPlan(
        model=model_ref(recipe.model),
        method=method,
        target_sparsity=None if recipe.target_sparsity is None else one_sparsity(recipe.target_sparsity),
        target_params=recipe.target_params,
        training=training.model_copy(update={"seed": seed}),
        calibration=calibration_spec(drawn["source"], drawn["num_samples"], drawn["num_tokens"]),
        seed=seed,
    )


def forecast_of(plan: AccelPlan) -> Forecast:
    """Rounds and memory of a run; nothing is loaded but a configuration.

    Raises:
        UserError: the model is unknown, or the target beyond reach.
    """
    seen = prospect(plan.model)
    dense, structure = count_parameters(seen.model.named_parameters()), describe(seen.model)
    rounds = list(forecast(plan.method, structure, plan.target(dense), plan.training))
    footprint = Footprint(
        structure=structure, params=dense, vocab_size=seen.model.config.vocab_size, bytes_per_weight=4,
        num_samples=plan.calibration.num_samples, num_tokens=plan.calibration.num_tokens,
    )  # fmt: skip
    needed = footprint.training_bytes(
        max(plan.training.micro_batch_tokens, plan.training.context_length),
        checkpointing=plan.training.gradient_checkpointing,
    )
    return Forecast(seen, dense, rounds, needed)


def run_accel(
    plan: AccelPlan,
    out: Path,
    *,
    dtype: Dtype,
    device: str,
    minutes: float,
    on_step: Callable[[StepLog, Trainer], None],
) -> SavedModel | None:
    """Prune and train, and save the model as a folder with ``training.json`` (the loss of every step) beside its card.

    Killed and run again it goes on from its last checkpoint, in ``<out>.checkpoints``, which is deleted at the end.

    Args:
        plan: the run.
        out: folder that must not exist.
        dtype: of the weights.
        device: of the model.
        minutes: between checkpoints.
        on_step: hears of every step.

    Returns:
        What was written; None in processes that help another one.

    Raises:
        UserError: anything the user must mend; checkpoints stay.
    """
    require_new(out)
    accelerator = _accelerator()
    with quiet():
        loaded = load_model(plan.model, dtype, device if accelerator is None else str(accelerator.device))
    target = plan.target(loaded.params)
    longest = getattr(loaded.model.config, "max_position_embeddings", None)
    calibration = draw_calibration(plan.calibration, loaded.tokenizer, plan.seed, longest)
    key = json.dumps([plan.method.model_dump(mode="json"), target.params, loaded.weights_sha256, calibration.sha256])
    session = Session(
        plan.training,
        training_text(plan.training, loaded.tokenizer, user_cache_path("adapt-pruner-harness")),
        teacher=loaded.model if plan.training.distillation else None,
        accelerator=accelerator,
        sharded=accelerator is not None and sharding_asked(),
        folder=out.with_name(f"{out.name}.checkpoints"),
        key=key,
        minutes=minutes,
        on_step=on_step,
    )
    tokens = calibration.tokens.to(loaded.model.device)
    start = time.perf_counter()
    with fast_matmul():
        pruned = plan.method.prune_and_train(loaded, tokens, target, plan.seed, session)
    seconds = {"prune": time.perf_counter() - start - session.seconds_here, "train": session.seconds_here}
    if accelerator is not None and not accelerator.is_main_process:
        return None
    after = count_parameters(pruned.model.named_parameters())
    origin = Origin(
        plan.model, plan.method.name, plan.method.model_dump(mode="json"), target, plan.seed, dtype, plan.calibration,
        loaded.weights_sha256, plan.training,
    )  # fmt: skip
    outcome = outcome_of(pruned, after)
    with quiet():
        save_model(pruned.model, loaded.tokenizer, out, model_card(origin, outcome, []))
    told = {
        "training": plan.training.model_dump(mode="json"),
        "seconds_since_last_start": seconds,
        "steps": [asdict(entry) for entry in session.log],
    }
    write_file(out / "training.json", json.dumps(told, indent=1).encode())
    session.finish()
    return SavedModel(loaded.params, after, target.params, outcome.class_name)


def _accelerator() -> Any:
    """accelerate's, under ``accelerate launch`` with several processes; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator()
