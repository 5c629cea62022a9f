"""Which units leave in one step: from every layer's share and the units' scores to a keep plan, whole or partial."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapt_pruner.sparsity import SparsityState, channels_kept, heads_kept
from harness.budget import close_gap
from harness.structure import CoupledGroup, KeepPlan, ModelStructure, removed_params


def widths_after(dense: ModelStructure, state: SparsityState) -> dict[str, int]:
    """Units that every group of the dense model may keep once the layers' shares are removed."""
    return {group.name: _units_kept(group, dense, state.per_layer[group.layer]) for group in dense.groups}


def whole_step(current: ModelStructure, widths: Mapping[str, int], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plan that takes every group down to its width, lowest scores first; a group already there keeps its units.

    Args:
        current: of the model as it is now.
        widths: units to keep, by group name.
        scores: group name -> a score per unit of ``current`` [num_units].

    Returns:
        Groups that lose units -> the units of ``current`` they keep.
    """
    plan = {}
    for group in current.groups:
        num_removed = group.num_units - widths[group.name]
        if num_removed > 0:
            order = scores[group.name].cpu().argsort(stable=True)
            plan[group.name] = order[num_removed:].sort().values
    return plan


def partial_step(
    current: ModelStructure, whole: KeepPlan, scores: Mapping[str, Tensor], to_remove: int, *, keep_heads: bool
) -> dict[str, Tensor]:
    """The part of a step that ends at a target without overshooting it, its last stretch made of MLP channels.

    Only units that the whole step removes are candidates: the kv heads that fit, lowest scores first, unless they are
    all to stay; then channels, lowest scores of all layers first. Where the channels run out before the target is met,
    the plan removes them all, and it takes a further step.

    Args:
        current: of the model as it is now.
        whole: the step, as ``whole_step`` gives it.
        scores: group name -> a score per unit of ``current`` [num_units].
        to_remove: parameters still to remove from the model as it is now.
        keep_heads: whether no head leaves.
    """
    plan = {} if keep_heads else _heads_that_fit(current, whole, scores, to_remove)
    channels = {group.name: whole[group.name] for group in current.mlp if group.name in whole}
    if removed_params(current, plan | channels) <= to_remove:
        return plan | channels
    candidates = {name: _only_leaving(scores[name].cpu(), kept) for name, kept in channels.items()}
    return close_gap(plan, current, candidates, to_remove)


def _units_kept(group: CoupledGroup, dense: ModelStructure, sparsity: float) -> int:
    if group.kind == "mlp_channel":
        return channels_kept(group.num_units, sparsity)
    return heads_kept(group.num_units, dense.head_dim, sparsity)


def _heads_that_fit(
    current: ModelStructure, whole: KeepPlan, scores: Mapping[str, Tensor], to_remove: int
) -> dict[str, Tensor]:
    leaving = []
    for group in current.attention:
        if group.name in whole:
            units = set(range(group.num_units)) - set(whole[group.name].tolist())
            leaving += [(float(scores[group.name][unit]), group, unit) for unit in units]
    plan: dict[str, Tensor] = {}
    for _, group, unit in sorted(leaving, key=lambda entry: (entry[0], entry[1].name, entry[2])):
        if group.unit_params <= to_remove:
            to_remove -= group.unit_params
            kept = plan.get(group.name, torch.arange(group.num_units))
            plan[group.name] = kept[kept != unit]
    return plan


def _only_leaving(scores: Tensor, kept: Tensor) -> Tensor:
    # Channels that the step keeps come last, and the step's own suffice: none of them is reached.
    return scores.index_fill(0, kept, float("inf"))
