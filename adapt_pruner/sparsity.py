"""Each layer's share of what is removed: how it moves with the layer's importance, and the widths it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

MAX_SPARSITY = 0.99
"""No layer is removed whole."""


@dataclass(frozen=True, slots=True)
class SparsityState:
    """Where a course of pruning stands, in fractions of the dense model's widths.

    Interleaved training carries it from round to round: a layer's share counts from the dense model, never from the
    start of a round (a kv head leaves at a share of 1 / num_key_value_heads, which no single round would reach).
    """

    per_layer: tuple[float, ...]
    """s_l in [0, 0.99] of every layer, for its kv heads and its MLP channels alike."""
    steps: int = 0
    """Steps taken since the dense model."""

    @classmethod
    def dense(cls, num_layers: int) -> SparsityState:
        """The start: nothing removed."""
        return cls((0.0,) * num_layers)

    def adapted(self, importance: Sequence[float], max_steps: int, amplitude: float) -> SparsityState:
        """After one adaptive step: s_l <- clamp(s_l + 1/T - A * importance_l, 0, 0.99).

        A share may fall; the units that left do not come back for it.

        Args:
            importance: normalised, of every layer: mean 0, magnitudes at most 1.
            max_steps: T.
            amplitude: A.

        Source: Adapt-Pruner (arXiv:2502.03460), section 3.2.
        """
        moved = (s + 1 / max_steps - amplitude * i for s, i in zip(self.per_layer, importance, strict=True))
        return SparsityState(tuple(_clamp(s) for s in moved), self.steps + 1)

    def uniform(self, max_steps: int) -> SparsityState:
        """After one step that treats all layers alike: s_l = t/T after step t."""
        share = _clamp((self.steps + 1) / max_steps)
        return SparsityState((share,) * len(self.per_layer), self.steps + 1)

    def to_json(self) -> dict[str, JsonValue]:
        """For checkpoints; ``from_json`` gives the equal state back."""
        return {"per_layer": list(self.per_layer), "steps": self.steps}

    @classmethod
    def from_json(cls, value: Mapping[str, JsonValue]) -> SparsityState:
        """The state that ``to_json`` wrote."""
        per_layer, steps = value["per_layer"], value["steps"]
        assert isinstance(per_layer, list), "per_layer must be a list of shares"
        assert isinstance(steps, int), "steps must be a count"
        return cls(tuple(float(s) for s in per_layer), steps)  # type: ignore[arg-type]


def channels_kept(num_channels: int, sparsity: float) -> int:
    """MLP channels left of the dense model's: int(f (1 - s)), and at least one."""
    return max(int(num_channels * (1 - sparsity)), 1)


def heads_kept(num_heads: int, head_dim: int, sparsity: float) -> int:
    """kv heads left of the dense model's: one leaves for every D whole k channels removed, and one stays at least.

    With 3 heads of 64 the first leaves at a share above 0.328, the second above 0.661.
    """
    num_channels = num_heads * head_dim
    return max(num_heads - (num_channels - int(num_channels * (1 - sparsity))) // head_dim, 1)


def _clamp(sparsity: float) -> float:
    return min(max(sparsity, 0.0), MAX_SPARSITY)
