"""From a sparsity to a parameter count, and from a method's own knob to that count.

Every method has a knob of its own (a pruning ratio, a slicing ratio, a number of steps). The benchmark fixes the
counted parameters and solves for the knob, so that methods are compared at equal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import UserError
from harness.records import Basis, ParamCounts
from harness.structure import KeepPlan, ModelStructure, removed_params


class UnreachableSparsityError(UserError):
    """A method cannot remove that much of that model."""


@dataclass(frozen=True, slots=True)
class ParameterTarget:
    """How many parameters may be left."""

    sparsity: float
    """Fraction to remove, in [0, 1)."""
    basis: Basis
    dense: ParamCounts
    round_to: int = 1
    """MLP widths must be multiples of this."""
    uniform: bool = False
    """Whether all layers must have one width and one number of heads."""
    finest_step: int = 0
    """Parameters by which rounded widths differ at the least, so that a model may end this far above the target."""

    @property
    def is_rounded(self) -> bool:
        """Whether widths are not free."""
        return self.round_to > 1 or self.uniform

    @property
    def params(self) -> int:
        """The smallest count on the basis that does not overshoot the sparsity."""
        return math.ceil(self.dense.on(self.basis) * (1 - self.sparsity) - 1e-6)

    @property
    def to_remove(self) -> int:
        """Parameters to remove from the dense model, at most."""
        return self.dense.on(self.basis) - self.params

    def excess(self, counts: ParamCounts) -> int:
        """Parameters still above the target; negative where it was overshot."""
        return counts.on(self.basis) - self.params

    def is_met_by(self, counts: ParamCounts, tolerance: float) -> bool:
        """Whether a model has the target's size: at or above it by at most ``tolerance`` of the dense count.

        Rounded widths may end one step above it, where that is more.
        """
        return 0 <= self.excess(counts) <= max(tolerance * self.dense.total, self.finest_step)


def target_for(
    sparsity: float,
    basis: Basis,
    dense: ParamCounts,
    structure: ModelStructure,
    round_to: int | None,
    uniform: bool | None,
) -> ParameterTarget:
    """A target whose finest step is that of the model's widths.

    Args:
        sparsity: fraction to remove.
        basis: of which parameters.
        dense: counts of the dense model.
        structure: its groups.
        round_to: multiple of MLP widths; None leaves them free.
        uniform: one width for all layers.

    Raises:
        UserError: the step is more than half of what is to be removed.
    """
    if round_to is None and not uniform:
        return ParameterTarget(sparsity, basis, dense)
    channel = max(group.unit_params for group in structure.mlp)
    step = (round_to or 1) * channel * (structure.num_layers if uniform else 1)
    to_remove = ParameterTarget(sparsity, basis, dense).to_remove
    if 0 < to_remove < 2 * step:
        flags = " ".join([f"--round-to {round_to}" if round_to else "", "--uniform" if uniform else ""]).strip()
        raise UserError(
            f"with {flags} a model shrinks in steps of {step:,} parameters, too coarse for the {to_remove:,} that a "
            f"sparsity of {sparsity:g} removes; pass a smaller --round-to or a larger sparsity"
        )
    return ParameterTarget(sparsity, basis, dense, round_to or 1, bool(uniform), step)


def unreachable(method: str, target: ParameterTarget, most_removed: int) -> UnreachableSparsityError:
    """The error for a target beyond what a method can remove.

    Args:
        method: its name.
        target: what was asked.
        most_removed: parameters that the method can remove at most, on the target's basis.
    """
    largest = math.floor(most_removed / target.dense.on(target.basis) * 1000) / 1000
    return UnreachableSparsityError(
        f"{method} cannot remove {target.sparsity:.1%} of this model's {target.basis} parameters; "
        f"the largest sparsity it reaches is {largest:.3f}"
    )


def solve_knob(
    plan_at: Callable[[float], KeepPlan], structure: ModelStructure, to_remove: int, upper: float = 1.0
) -> tuple[float, KeepPlan]:
    """The largest knob setting whose plan removes at most ``to_remove`` parameters, and that plan.

    Args:
        plan_at: plan for a knob in [0, upper]; a larger knob removes no fewer parameters.
        structure: of the model the plans speak of.
        to_remove: parameters; never exceeded.
        upper: largest setting.
    """
    low, low_plan, high = 0.0, plan_at(0.0), upper
    top = plan_at(upper)
    if removed_params(structure, top) <= to_remove:
        return upper, top
    for _ in range(40):
        middle = (low + high) / 2
        plan = plan_at(middle)
        if removed_params(structure, plan) <= to_remove:
            low, low_plan = middle, plan
        else:
            high = middle
    return low, low_plan


def close_gap(
    plan: KeepPlan,
    structure: ModelStructure,
    priority: Mapping[str, Tensor],
    to_remove: int,
    min_channels: int = 1,
) -> dict[str, Tensor]:
    """Remove further MLP channels, lowest priority first over all layers, until the target is met and never overshot.

    Args:
        plan: what is kept so far.
        structure: of the model the plan speaks of.
        priority: MLP group name -> a number per unit of the group [num_units]; only the groups named here give units.
        to_remove: parameters to remove from the model in all, ``plan`` included.
        min_channels: channels every group keeps, those of the highest priority.

    Returns:
        A plan that removes at most ``to_remove``; less by under one channel unless the named groups gave all they can.
    """
    missing = to_remove - removed_params(structure, plan)
    closed = dict(plan)
    candidates = []
    for name in priority:
        group = structure.by_name[name]
        kept = closed.get(name, torch.arange(group.num_units))
        order = kept[priority[name].cpu()[kept].argsort(stable=True)]
        free = order[: max(order.numel() - min_channels, 0)]
        candidates += [(float(priority[name][unit]), name, int(unit), group.unit_params) for unit in free]
    leaving: dict[str, list[int]] = {}
    for _, name, unit, params in sorted(candidates):
        if params > missing:
            break
        leaving.setdefault(name, []).append(unit)
        missing -= params
    for name, units in leaving.items():
        kept = closed.get(name, torch.arange(structure.by_name[name].num_units))
        closed[name] = kept[~torch.isin(kept, torch.tensor(units))]
    return closed
