"""From unit scores and a pruning ratio to a keep plan, and from a parameter target to the ratio that meets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.budget import ParameterTarget, close_gap, solve_knob, unreachable
from harness.rounding import rounded
from harness.structure import CoupledGroup, KeepPlan, ModelStructure, removed_params

Scores = Mapping[str, Tensor]
"""Group name -> score per unit [num_units], higher is kept; groups that are absent are kept whole."""


@dataclass(frozen=True)
class SolvedPlan:
    """A plan that meets a target."""

    plan: KeepPlan
    ratio: float
    """The method's knob before the last stretch."""
    last_stretch_share: float
    """Fraction of the removed parameters that left as single MLP channels after the ratio was solved."""

    @property
    def knob(self) -> dict[str, float]:
        """What a record tells of it."""
        return {"pruning_ratio": self.ratio, "last_stretch_share": self.last_stretch_share}


def keep_highest(scores_U: Tensor, num_kept: int) -> Tensor:
    """Sorted int64 indices of the ``num_kept`` highest scores; of equal ones the later stay."""
    order = scores_U.argsort(stable=True)
    return order[order.numel() - num_kept :].sort().values


def keep_ratio(group: CoupledGroup, scores_U: Tensor, ratio: float, head_dim: int) -> Tensor:
    """Units of a group left when it loses ``ratio`` of its channels, at least one; sorted int64 indices.

    Kept are int(C (1 - ratio)) of C channels. A kv head has head_dim channels (rows of k_proj) and leaves when that
    many are due: with three heads none leaves before about a third.

    Source: LLM-Pruner (arXiv:2305.11627), its published code.
    """
    channels_per_unit = head_dim if group.kind == "kv_head" else 1
    num_channels = group.num_units * channels_per_unit
    removed = (num_channels - int(num_channels * (1 - ratio))) // channels_per_unit
    return keep_highest(scores_U, max(group.num_units - removed, min(group.num_units, 1)))


def uniform_plan(scores: Scores, structure: ModelStructure, ratio: float) -> dict[str, Tensor]:
    """Every group in ``scores`` loses the same ratio of its channels, its own lowest scores first."""
    return {
        name: keep_ratio(structure.by_name[name], values, ratio, structure.head_dim) for name, values in scores.items()
    }


def uniform_priority(scores: Scores, structure: ModelStructure) -> dict[str, Tensor]:
    """Order of the last stretch under which layers go on losing equal ratios: rank in the layer over its width."""
    return {
        name: values.argsort(stable=True).argsort().double() / max(values.numel(), 1)
        for name, values in scores.items()
        if structure.by_name[name].kind == "mlp_channel"
    }


def global_plan(scores: Scores, structure: ModelStructure, ratio: float) -> dict[str, Tensor]:
    """All units compete by their raw scores; the lowest leave until ``ratio`` of all channels have; one a group stays.

    A kv head counts head_dim channels, as in ``keep_ratio``.
    """
    threshold = _global_threshold(scores, structure, ratio)
    plan = {}
    for name, values in scores.items():
        num_kept = int((values >= threshold).sum())
        plan[name] = keep_highest(values, max(num_kept, min(values.numel(), 1)))
    return plan


def meet_target(
    method: str,
    plan_at: Callable[[float], KeepPlan],
    structure: ModelStructure,
    target: ParameterTarget,
    priority: Scores,
    *,
    added_params: int = 0,
    min_channels: int = 1,
    scores: Scores | None = None,
) -> SolvedPlan:
    """The largest ratio that does not overshoot the target, and single MLP channels for what is still missing.

    Args:
        method: its name, for the error.
        plan_at: the method's plan at a ratio in [0, 1]; a larger ratio removes no fewer parameters.
        structure: of the dense model.
        target: what may be left.
        priority: MLP group name -> number per channel, the lowest leave first in the last stretch.
        added_params: parameters the method adds, to be removed on top.
        min_channels: channels every MLP keeps.
        scores: group name -> number per unit, for targets that want one number of heads in all layers.

    Raises:
        UnreachableSparsityError: all that the method may remove is not enough.
    """
    to_remove = target.to_remove + added_params
    ratio, coarse = solve_knob(plan_at, structure, to_remove)
    plan = close_gap(coarse, structure, priority, to_remove, min_channels)
    removed = removed_params(structure, plan)
    finest = min((structure.by_name[name].unit_params for name in priority), default=0)
    if to_remove - removed >= max(finest, 1):
        raise unreachable(method, target, removed - added_params)
    if target.is_rounded:
        plan = rounded(plan, structure, {**(scores or {}), **priority}, target, added_params)
        removed = removed_params(structure, plan)
    stretch = max(removed - removed_params(structure, coarse), 0)
    return SolvedPlan(plan, ratio, stretch / removed if removed else 0.0)


def _global_threshold(scores: Scores, structure: ModelStructure, ratio: float) -> float:
    """The lowest score that stays; infinite where none does."""
    channels = {name: structure.head_dim if structure.by_name[name].kind == "kv_head" else 1 for name in scores}
    values = torch.cat([value.double() for value in scores.values()])
    costs = torch.cat([torch.full((value.numel(),), channels[name]) for name, value in scores.items()])
    order = values.argsort(stable=True)
    due = costs.sum() - int(costs.sum() * (1 - ratio))
    num_removed = int((costs[order].cumsum(0) <= due).sum())
    return float(values[order][num_removed]) if num_removed < values.numel() else float("inf")
