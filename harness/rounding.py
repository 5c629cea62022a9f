"""Widths that kernels like: MLP widths moved to multiples, or one width for all layers, under the same target."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.budget import ParameterTarget
from harness.errors import UserError
from harness.structure import CoupledGroup, KeepPlan, ModelStructure, removed_params


def rounded(
    plan: KeepPlan,
    structure: ModelStructure,
    scores: Mapping[str, Tensor],
    target: ParameterTarget,
    added_params: int = 0,
) -> dict[str, Tensor]:
    """The plan nearest to ``plan`` whose MLP widths are what the target asks for; heads stay whole.

    It removes at most what the target allows and, where widths can be found at all, less by under one step
    (``ParameterTarget.finest_step``).

    Args:
        plan: what a method would keep.
        structure: of the dense model.
        scores: group name -> a number per unit of the dense model, the lowest leave first; groups that are absent are
            kept whole.
        target: with ``round_to`` and ``uniform``.
        added_params: parameters that the method adds, to be removed on top.

    Raises:
        UserError: one width for all layers was asked of a method that leaves some layers whole.
    """
    to_remove = target.to_remove + added_params
    if target.uniform:
        return _uniform(plan, structure, scores, to_remove, target.round_to)
    groups = [group for group in structure.mlp if group.name in scores]
    asked = {group.name: _kept(plan, group).numel() for group in groups}
    widths = {g.name: max(asked[g.name] // target.round_to, 1) * target.round_to for g in groups}
    widths = {g.name: min(widths[g.name], g.num_units) for g in groups}

    def plan_of(widths: Mapping[str, int]) -> dict[str, Tensor]:
        return dict(plan) | {g.name: _resized(g, _kept(plan, g), scores[g.name], widths[g.name]) for g in groups}

    def removed(widths: Mapping[str, int]) -> int:
        mlp = sum((g.num_units - widths[g.name]) * g.unit_params for g in groups)
        return mlp + removed_params(structure, {n: k for n, k in plan.items() if n not in widths})

    # Largest remainder first: every floor took something that the target did not ask for.
    while removed(widths) > to_remove:
        free = [g for g in groups if widths[g.name] < g.num_units]
        nearest = max(free, key=lambda g: (asked[g.name] - widths[g.name], g.num_units))
        widths[nearest.name] = min(widths[nearest.name] + target.round_to, nearest.num_units)
    return plan_of(widths)


def _uniform(
    plan: KeepPlan, structure: ModelStructure, scores: Mapping[str, Tensor], to_remove: int, multiple: int
) -> dict[str, Tensor]:
    """One number of kv heads and one MLP width for all layers: the heads that ``plan`` keeps on average, rounded."""
    left_out = [group.name for group in structure.groups if group.name not in scores and group.num_units]
    if left_out:
        raise UserError(
            f"--uniform needs a score for every layer, and this method leaves {left_out[0]} whole; have it take part "
            "(for llm-pruner --set first_layer=0 and --set last_layer to the last one) or drop --uniform"
        )
    heads = round(sum(_kept(plan, group).numel() for group in structure.attention) / structure.num_layers)
    full = min(group.num_units for group in structure.mlp)
    widths = sorted({*range(multiple, full + 1, multiple), full})
    most_heads = min(group.num_units for group in structure.attention)
    # Fewest heads first from where the method stands; more of them where even whole MLPs would overshoot the target.
    for num_heads in range(min(max(heads, 1), most_heads), most_heads + 1):
        attention = {g.name: _resized(g, _kept(plan, g), scores[g.name], num_heads) for g in structure.attention}
        for width in widths:
            mlp = {g.name: _resized(g, _kept(plan, g), scores[g.name], width) for g in structure.mlp}
            if removed_params(structure, attention | mlp) <= to_remove:
                return attention | mlp
    return {}


def _kept(plan: KeepPlan, group: CoupledGroup) -> Tensor:
    return plan.get(group.name, torch.arange(group.num_units))


def _resized(group: CoupledGroup, kept: Tensor, scores: Tensor, width: int) -> Tensor:
    """Sorted indices of ``width`` units: those kept before all others, then by score."""
    stays = torch.zeros(group.num_units, dtype=torch.bool)
    stays[kept] = True
    order = scores.cpu().argsort(stable=True)
    order = torch.cat([order[~stays[order]], order[stays[order]]])
    return order[group.num_units - width :].sort().values
