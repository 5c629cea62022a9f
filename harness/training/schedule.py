"""Learning rates and token budgets over the course of a run."""

from __future__ import annotations

import math
from typing import Literal

Split = Literal["linear", "constant", "cosine"]
"""How the rounds of a run share its tokens: later rounds more, all the same, or later ones more along a cosine."""


def warmup_stable_decay(
    step: int, total: int, peak: float, minimum: float, *, warmup: float = 0.05, decay: float = 0.1
) -> float:
    """The learning rate of one step: a linear rise, a plateau, and a linear fall that ends at the minimum.

    Args:
        step: from 0.
        total: steps of the whole run.
        peak: rate of the plateau.
        minimum: rate of the last step.
        warmup: fraction of the steps that rise; the first has 1/n of the peak.
        decay: fraction of the steps that fall.

    Source: Adapt-Pruner (arXiv:2502.03460), training settings: WSD over all rounds together.
    """
    rising, falling = math.ceil(total * warmup), math.ceil(total * decay)
    if step < rising:
        return peak * (step + 1) / rising
    left = total - 1 - step
    if left < falling:
        return minimum + (peak - minimum) * left / falling
    return peak


def shares(rounds: int, split: Split = "linear") -> list[float]:
    """The fraction of the tokens that each round trains on; they add up to 1.

    Source: Adapt-Pruner (arXiv:2502.03460), section 3.3: in round i of n, linear gives 2 i / (n (n + 1)).
    Differs: the cosine of the published code is not described; here round i gets 1 - cos(pi i / (n + 1)) in proportion.
    """
    if split == "linear":
        weights = [float(i) for i in range(1, rounds + 1)]
    elif split == "cosine":
        weights = [1 - math.cos(math.pi * i / (rounds + 1)) for i in range(1, rounds + 1)]
    else:
        weights = [1.0] * rounds
    return [weight / sum(weights) for weight in weights]


def round_ends(total_steps: int, rounds: int, split: Split = "linear") -> list[int]:
    """The step before which each round ends; every round has one step at least where there are enough.

    Args:
        total_steps: of all rounds.
        rounds: how many.
        split: of the tokens.
    """
    cumulative = 0.0
    ends: list[int] = []
    for i, share in enumerate(shares(rounds, split)):
        cumulative += share
        least = ends[-1] + 1 if ends else 1
        ends.append(min(max(round(cumulative * total_steps), least), total_steps - (rounds - 1 - i)))
    return ends
