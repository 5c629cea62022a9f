"""LLM-Pruner: gradient-based ranking of coupled structures, the same ratio off every layer of a middle range.

Source: LLM-Pruner (arXiv:2305.11627). Kv heads with their query groups and MLP channels are the coupled structures
(section 3.1). A weight w with gradient g of the calibration loss L and diagonal Hessian A matters by how much L changes
without it, |L(w) - L(0)| = |w g - w A w / 2 + ...| (eq. 3, 5), the Fisher information standing for A; the weights of a
structure are added up, its matrices combined (section 3.2), and the lowest leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue
from torch import Tensor

from baselines.gradients import matrix_scores
from baselines.importance import TAYLOR, Criterion, Grouping, QueryFold, unit_scores
from baselines.ratio import Scores, global_plan, meet_target, uniform_plan, uniform_priority
from harness.errors import UserError
from harness.method import Footprint, LoadedModel, ParameterTarget, PrunedModel, ReimplementedMethod
from harness.models import remove_units
from harness.structure import CoupledGroup, ModelStructure

KEPT_FIRST, KEPT_LAST, OF_LAYERS = 4, 2, 32
"""The published settings keep the first 4 and the last 2 of LLaMA-7B's 32 layers whole."""


class LLMPruner(ReimplementedMethod):
    """Block-wise LLM-Pruner, without its recovery training.

    Differs:
        - The pruning ratio is not set but solved for the counted parameters. kv heads leave all layers at once
          (SmolLM2: at a third), so the rest of the way to the target is made with MLP channels, equal ratios off every
          layer.
        - Scores are float32, never float16, where 29% of A is zero.
        - A query head counts for the kv head it leaves with; the published code credits another one
          (``query_fold="upstream"``), which moves kv head scores by up to 14% and takes another head in 6 of SmolLM2's
          layers 4..25. On one draw of 10 x 64 tokens its loss was lower by 0.07 at 20% and 0.36 at 40% there; over
          layers 4..27 it was equal at 20%, where no head leaves, and 0.05 lower at 40%: right, but no better.
        - Of every group one unit stays.
    """

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[str] = "arXiv:2305.11627"
    published: ClassVar[Mapping[str, JsonValue]] = {"query_fold": "upstream"}
    variants: ClassVar[tuple[Mapping[str, JsonValue], ...]] = ({"query_fold": "upstream"}, {"pass_dtype": "bfloat16"})

    importance: Criterion = "param_first"
    """Element-wise Taylor term (section 3.2): ``param_first``, ``param_second``, ``param_mix``; ``vectorize`` is its
    vector-wise form; ``l1`` and ``l2`` need no data."""
    grouping: Grouping = "sum"
    """How the matrices of a structure combine (section 3.2); ``l1`` and ``l2`` always take the mean."""
    ranking: Literal["per_layer", "global"] = "per_layer"
    """Whether units compete inside their layer, or in all layers by their raw scores."""
    first_layer: Annotated[int, Field(ge=0)] | None = None
    """First layer that is pruned; None scales the published 4 of 32 to the depth, rounded (30 layers: 4)."""
    last_layer: Annotated[int, Field(ge=0)] | None = None
    """Last layer that is pruned; None scales the published 29 of 0..31 to the depth, rounded (30 layers: 27)."""
    query_fold: QueryFold = "group"
    """``upstream`` reproduces the published grouped-query scores."""
    pass_dtype: Literal["weights", "bfloat16"] = "weights"
    """Type the forward and backward pass computes in: the weights' own, or bfloat16 (on SmolLM2 at
    the published 0.25 it keeps 99.5% of the same units and adds 0.007 to the loss)."""

    def why_unsupported(self, structure: ModelStructure) -> str | None:
        """Why the range of layers does not fit the model."""
        first, last = self.layer_range(structure)
        if first <= last < structure.num_layers:
            return None
        return (
            f"{self.name} cannot prune layers {first}..{last} of a model with layers 0..{structure.num_layers - 1}; "
            "set first_layer and last_layer inside it"
        )

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """One model per target, all from one gradient pass; nothing is random."""
        structure = loaded.structure
        if (reason := self.why_unsupported(structure)) is not None:
            raise UserError(reason)
        scores = self.scores(loaded, calibration)
        priority = uniform_priority(scores, structure)
        if self.ranking == "global":
            priority = {name: scores[name] for name in priority}
        for target in targets:
            plan_at = partial(self.plan_at, scores, structure)
            solved = meet_target(self.name, plan_at, structure, target, priority, scores=scores)
            yield PrunedModel(remove_units(loaded.model, structure, solved.plan), solved.knob, kept=solved.plan)

    def prune_at(self, loaded: LoadedModel, calibration: Tensor, knob: float, seed: int) -> PrunedModel:
        """One model at a pruning ratio; nothing is random."""
        plan = self.plan_at(self.scores(loaded, calibration), loaded.structure, knob)
        return PrunedModel(remove_units(loaded.model, loaded.structure, plan), {"pruning_ratio": knob}, kept=plan)

    def working_bytes(self, footprint: Footprint) -> int:
        """A micro-batch of 1024 tokens forward and backward, with the gradients of the matrices of the range."""
        if self.importance not in TAYLOR:
            return footprint.copy_bytes
        groups = self.groups(footprint.structure)
        moments = 2 if self.importance == "param_mix" else 1
        gradients = footprint.gradient_bytes(groups, moments)
        layers = footprint.structure.num_layers - min(group.layer for group in groups)
        return max(footprint.backward_bytes(1024, layers) + gradients, footprint.copy_bytes)

    def scores(self, loaded: LoadedModel, calibration: Tensor) -> dict[str, Tensor]:
        """Group name -> score per unit [num_units], for the groups in the range of layers.

        Args:
            loaded: the dense model.
            calibration: token ids [B, T]; the gradient is that of the mean next-token loss over all of them.
        """
        groups, bfloat16 = self.groups(loaded.structure), self.pass_dtype == "bfloat16"
        matrices = matrix_scores(loaded.model, groups, calibration, self.importance, bfloat16=bfloat16)
        return self.combined(matrices, loaded.structure)

    def combined(self, matrices: Mapping[str, Tensor], structure: ModelStructure) -> dict[str, Tensor]:
        """Scores of units from those of the channels of every matrix, by module name."""
        shape = {"head_dim": structure.head_dim, "query_group_size": structure.query_group_size}
        return {
            group.name: unit_scores(
                group, matrices, criterion=self.importance, grouping=self.grouping, fold=self.query_fold, **shape
            )
            for group in self.groups(structure)
        }

    def plan_at(self, scores: Scores, structure: ModelStructure, ratio: float) -> dict[str, Tensor]:
        """The published plan at a pruning ratio: int(C (1 - ratio)) channels stay, kv heads leave whole."""
        if self.ranking == "global":
            return global_plan(scores, structure, ratio)
        return uniform_plan(scores, structure, ratio)

    def layer_range(self, structure: ModelStructure) -> tuple[int, int]:
        """First and last layer that are pruned."""
        depth = structure.num_layers
        first = round(depth * KEPT_FIRST / OF_LAYERS) if self.first_layer is None else self.first_layer
        last = depth - 1 - round(depth * KEPT_LAST / OF_LAYERS) if self.last_layer is None else self.last_layer
        return first, last

    def groups(self, structure: ModelStructure) -> tuple[CoupledGroup, ...]:
        """The coupled structures of those layers."""
        first, last = self.layer_range(structure)
        return tuple(group for group in structure.groups if first <= group.layer <= last)
