"""The control every ranking must beat: units leave at random, the same ratio in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from baselines.ratio import meet_target, uniform_plan, uniform_priority
from harness.method import LoadedModel, ParameterTarget, PrunedModel, PruningMethod
from harness.models import remove_units
from harness.structure import ModelStructure


class Random(PruningMethod):
    """Ranks kv heads and MLP channels by chance; all layers take part."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "control"
    needs_calibration: ClassVar[bool] = False

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """One model per target from one ranking; ``seed`` draws it."""
        structure = loaded.structure
        scores = self.scores(structure, seed)
        priority = uniform_priority(scores, structure)
        for target in targets:
            solved = meet_target(
                self.name, partial(uniform_plan, scores, structure), structure, target, priority, scores=scores
            )
            yield PrunedModel(remove_units(loaded.model, structure, solved.plan), solved.knob, kept=solved.plan)

    def scores(self, structure: ModelStructure, seed: int) -> dict[str, Tensor]:
        """Group name -> a number in [0, 1) per unit."""
        generator = torch.Generator().manual_seed(seed)
        return {group.name: torch.rand(group.num_units, generator=generator) for group in structure.groups}
