"""The course of pruning read as one ranking of the dense model's units: who left first mattered least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.structure import KeepPlan, ModelStructure


def leaving_scores(dense: ModelStructure, kept: Sequence[KeepPlan], last: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Group name -> a number per unit of the dense model, higher for units that stayed longer: float64 [num_units].

    Args:
        dense: structure of the dense model.
        kept: units of the dense model that were left, at every position of a course in order.
        last: group name -> a score per unit left at the last position, where one was made for as many; it orders the
            units that never left.
    """
    scores = {}
    for group in dense.groups:
        values = torch.zeros(group.num_units, dtype=torch.float64)
        for plan in kept:
            values[plan.get(group.name, torch.arange(group.num_units))] += 1
        survivors = kept[-1].get(group.name, torch.arange(group.num_units))
        if group.name in last and last[group.name].numel() == survivors.numel():
            rank = last[group.name].cpu().argsort(stable=True).argsort().double()
            values[survivors] += rank / (2 * max(survivors.numel(), 1))
        scores[group.name] = values
    return scores
