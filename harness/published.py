"""Figures measured on published implementations, and the settings of ours that must give the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """What one run of a published implementation gave."""

    params: int
    """Counted parameters of the pruned model, as ours are counted."""
    loss: float
    """Mean next-token loss on the fixed held-out tokens, in nats."""
    kept: Mapping[str, frozenset[int]] | None
    """Group name -> units of the dense model that are left; None where no units were removed."""
    seconds: float | None = None
    """Wall time of the pruning step; None where it was not measured by itself."""
    peak_bytes: int | None = None
    """Peak resident memory of the process in the pruning step."""


@dataclass(frozen=True, slots=True)
class PublishedCase:
    """One run of a published implementation on the embedded model, and how to repeat it with ours."""

    name: str
    method: str
    params: Mapping[str, JsonValue]
    """Settings on top of the method's ``published`` ones."""
    knob: float
    """For ``ReimplementedMethod.prune_at``."""
    calibration: tuple[int, int]
    """First rows and columns of the fixed calibration tokens."""
    figures: PublishedFigures
    loss_tolerance: float = 2e-3
    """How far our loss may be from the published one, in nats."""
    multi_head: bool = False
    """Run on the multi-head expansion of the model, for code without grouped-query attention."""
