"""The oldest ranking as a control: units of small weights leave, the same ratio in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.ratio import meet_target, uniform_plan, uniform_priority
from harness.method import Footprint, LoadedModel, ParameterTarget, PrunedModel, PruningMethod
from harness.models import remove_units, weight_of
from harness.structure import CoupledGroup, ModelStructure


class Magnitude(PruningMethod):
    """Ranks kv heads and MLP channels by the L2 norm of all their weights; all layers take part.

    Source: Li et al. (arXiv:1608.08710), section 3.1, who rank convolution filters by their L1 norm.
    Differs: the L2 norm, over every matrix of the coupled structure; biases do not count.
    """

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "arXiv:1608.08710"
    needs_calibration: ClassVar[bool] = False
    needs_seed: ClassVar[bool] = False

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """One model per target from one ranking; neither ``calibration`` nor ``seed`` matters."""
        structure = loaded.structure
        scores = self.scores(loaded.model, structure)
        priority = uniform_priority(scores, structure)
        for target in targets:
            solved = meet_target(
                self.name, partial(uniform_plan, scores, structure), structure, target, priority, scores=scores
            )
            yield PrunedModel(remove_units(loaded.model, structure, solved.plan), solved.knob, kept=solved.plan)

    def working_bytes(self, footprint: Footprint) -> int:
        """A pruned copy, and before it the squares of one matrix in float32."""
        return max(footprint.copy_bytes, 2 * 4 * footprint.largest_matrix)

    def scores(self, model: Any, structure: ModelStructure) -> dict[str, Tensor]:
        """Group name -> L2 norm of each unit's weights."""
        return {group.name: _norms(model, group) for group in structure.groups}


def _norms(model: Any, group: CoupledGroup) -> Tensor:
    """Root of the summed squares of the weights of each unit: [num_units]."""
    if not group.num_units:
        return torch.empty(0)
    parts = []
    for member in group.members:
        weight = weight_of(model, member.module)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        parts.append(wide.square().sum(1 - member.dim).view(-1, member.block).sum(1))
    return torch.stack(parts).sum(0).sqrt().cpu()
