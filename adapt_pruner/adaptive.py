"""The steps of Adapt-Pruner and Adapt-Accel: a look at the model as it is, and an exact last stretch."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from adapt_pruner.course import Position, Step, normalised, observe_layers
from adapt_pruner.layer_importance import DistanceSign, LayerImportance, LayerMetric
from adapt_pruner.sparsity import MAX_SPARSITY, SparsityState
from adapt_pruner.step import partial_step, whole_step, widths_after
from baselines.gradients import unit_gradient_scores
from baselines.importance import TAYLOR, Criterion, QueryFold
from harness.budget import ParameterTarget, unreachable
from harness.errors import UserError
from harness.method import Footprint, PruningMethod
from harness.structure import ModelStructure, removed_params


class AdaptiveSteps(PruningMethod):
    """A method that removes units in steps, each layer's share moving against its importance.

    Source: Adapt-Pruner (arXiv:2502.03460), section 3.
    """

    max_steps: Annotated[int, Field(ge=1)] = 50
    """T: steps from the dense model to (almost) nothing, so that a step's mean share is 1/T."""
    amplitude: Annotated[float, Field(ge=0)] = 0.02
    """A: how far the most important layer's share stays behind the mean in one step (the published scripts' value)."""
    adaptive: bool = True
    """Whether layers differ at all; without it, every layer's share is t/T."""
    layer_importance: LayerMetric = "cosine"
    """How a layer's output is compared with its input, token by token."""
    distance_sign: DistanceSign = "sensible"
    """Of ``manhattan`` and ``euclidean``: more change is more important; ``published`` has it reversed."""
    importance: Criterion = "param_first"
    """What a unit scores; ``l1`` and ``l2`` need no gradients."""
    samples_per_step: Annotated[int, Field(ge=1)] | None = None
    """Calibration sequences of one step, drawn anew for each as the paper does (512 there); None takes all, always."""
    mini_batch: Annotated[int, Field(ge=1)] = 16
    """Sequences whose mean loss gives one gradient; the gradients of all mini-batches are summed."""
    query_fold: QueryFold = "group"
    """Which kv head a query head's score counts for; ``upstream`` is the published code's, which mixes up groups."""
    last_heads: Literal["keep", "fit"] = "keep"
    """Of the kv heads that an overshooting step wants to remove: all stay, or the lowest-scored that fit leave."""
    pass_dtype: Literal["weights", "bfloat16"] = "weights"
    """Type the forward and backward passes compute in: the weights' own, or bfloat16."""

    def working_bytes(self, footprint: Footprint) -> int:
        """The model as it is now, and a micro-batch of 1024 tokens with the gradients of its matrices."""
        if self.importance not in TAYLOR:
            return 2 * footprint.copy_bytes
        moments = 2 if self.importance == "param_mix" else 1
        gradients = footprint.gradient_bytes(footprint.structure.groups, moments)
        # On the way to the next model only the scores are left of the pass.
        return footprint.copy_bytes + max(footprint.backward_bytes(1024) + gradients, footprint.copy_bytes)

    def look(self, position: Position, calibration: Tensor, seed: int, target: ParameterTarget) -> Step:
        """Run the calibration tokens through the model as it is, and find the next step.

        Args:
            position: where the course stands; unchanged.
            calibration: token ids [num_samples, num_tokens].
            seed: draws the step's sequences; the same step of the same seed draws the same ones.
            target: for the error.

        Raises:
            UnreachableSparsityError: no step is left.
        """
        if position.state.steps >= self.max_steps:
            raise unreachable(self.name, target, position.removed)
        tokens = self._drawn(calibration, seed, position.state.steps).to(position.model.device)
        layers = LayerImportance(position.dense.num_layers, self.layer_importance, self.distance_sign)
        told: dict[str, JsonValue] = {"layer_importance": None, "loss": None}
        scores = unit_gradient_scores(
            position.model,
            position.structure,
            position.structure.groups,
            tokens,
            self.importance,
            fold=self.query_fold,
            mean_over=self.mini_batch if self.importance in ("param_first", "vectorize") else None,
            bfloat16=self.pass_dtype == "bfloat16",
            on_layer=layers.observe if self.adaptive else None,
            on_loss=lambda loss: told.update(loss=loss),
        )
        if not self.adaptive:
            state = position.state.uniform(self.max_steps)
        else:
            if self.importance not in TAYLOR:
                observe_layers(position.model, tokens, layers, bfloat16=self.pass_dtype == "bfloat16")
            told["layer_importance"] = layers.raw().tolist()
            state = position.state.adapted(normalised(layers), self.max_steps, self.amplitude)
        plan = whole_step(position.structure, widths_after(position.dense, state), scores)
        return Step(state, scores, plan, told)

    def end_at(
        self, target: ParameterTarget, position: Position, step: Step, calibration: Tensor, seed: int
    ) -> Position:
        """Leave the course where its next step would overshoot, and end within one channel above the target.

        Where the step's channels do not fill what is missing, all of them leave and the branch takes further steps.

        Raises:
            UnreachableSparsityError: no step is left.
        """
        channel_params = min(group.unit_params for group in position.dense.mlp)
        while True:
            missing = target.to_remove - position.removed
            plan = partial_step(
                position.structure, step.plan, step.scores, missing, keep_heads=self.last_heads == "keep"
            )
            position = position.after(plan, step)
            if target.to_remove - position.removed < channel_params:
                return position
            step = self.look(position, calibration, seed, target)

    def _drawn(self, calibration: Tensor, seed: int, steps_taken: int) -> Tensor:
        """This step's sequences, by step and seed alone: a branch draws what the course would have drawn."""
        if self.samples_per_step is None:
            return calibration
        generator = torch.Generator().manual_seed(seed * 1_000_003 + steps_taken)
        rows = torch.randperm(calibration.shape[0], generator=generator)[: self.samples_per_step]
        return calibration[rows.to(calibration.device)]

    def check_samples(self, calibration: Tensor) -> None:
        """Refuse a calibration with fewer sequences than a step was asked to draw; the default draws what there is.

        Raises:
            UserError: it has.
        """
        default = type(self).model_fields["samples_per_step"].default
        if self.samples_per_step not in (None, default) and self.samples_per_step > calibration.shape[0]:
            raise UserError(
                f"{self.name}.samples_per_step is {self.samples_per_step}, but there are {calibration.shape[0]} "
                "calibration sequences; lower it or raise --calibration-samples"
            )

    def check_reachable(self, dense: ModelStructure, target: ParameterTarget) -> None:
        """Refuse at once what no course reaches: it ends, at the latest, with every layer at its largest share."""
        all_shares = SparsityState((MAX_SPARSITY,) * dense.num_layers)
        widths = widths_after(dense, all_shares)
        most = sum((group.num_units - widths[group.name]) * group.unit_params for group in dense.groups)
        if target.to_remove > most:
            raise unreachable(self.name, target, most)

    @staticmethod
    def overshoots(position: Position, step: Step, target: ParameterTarget) -> bool:
        """Whether the whole step would remove more than the target asks."""
        return position.removed + removed_params(position.structure, step.plan) > target.to_remove
