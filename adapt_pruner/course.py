"""Where a course of pruning stands, and what one look at the calibration tokens says about its next step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from adapt_pruner.layer_importance import LayerImportance, normalise
from adapt_pruner.sparsity import SparsityState
from baselines.taps import layers_observed
from harness.cpu import return_surplus
from harness.models import micro_batch_rows, remove_units
from harness.structure import (
    KeepPlan,
    ModelStructure,
    compose,
    count_parameters,
    describe,
    layer_widths,
    removed_params,
)

FORWARD_TOKENS = 1024
"""Most tokens run at once where only the layers' importances are wanted."""


@dataclass(frozen=True)
class Position:
    """A model on its way, with all that a further step, or a further round after training it, needs to know."""

    model: Any
    """As it is now."""
    dense: ModelStructure
    """Of the model the course began with."""
    kept: KeepPlan
    """Units of the dense model that are left."""
    state: SparsityState
    trace: tuple[JsonValue, ...] = ()
    """One entry per step, in order."""

    @classmethod
    def start(cls, model: Any, dense: ModelStructure) -> Position:
        """The dense model; it is not changed by what follows."""
        return cls(model, dense, {}, SparsityState.dense(dense.num_layers))

    @cached_property
    def structure(self) -> ModelStructure:
        """Of the model as it is now."""
        return describe(self.model)

    @property
    def removed(self) -> int:
        """Parameters removed from the dense model so far."""
        return removed_params(self.dense, self.kept)

    def after(self, plan: KeepPlan, step: Step) -> Position:
        """The next position: ``plan`` (units of the model as it is now) applied, the step's state taken on."""
        model = remove_units(self.model, self.structure, plan)
        return_surplus()  # of the pass that found the step, whose blocks are of no use at the next one's sizes
        widths = layer_widths(describe(model))
        entry: dict[str, JsonValue] = {
            **step.told,
            "sparsity": list(step.state.per_layer),
            "num_key_value_heads": [layer.num_key_value_heads for layer in widths],
            "intermediate_size": [layer.intermediate_size for layer in widths],
            "params": count_parameters(model.named_parameters()).total,
        }
        return Position(model, self.dense, compose(self.kept, plan), step.state, (*self.trace, entry))


@dataclass(frozen=True)
class Step:
    """What a step would remove, found on the model as it is now; taken whole, in part, or both on two branches."""

    state: SparsityState
    """After the step."""
    scores: Mapping[str, Tensor]
    """Group name -> score per unit of the model as it is now."""
    plan: KeepPlan
    """The whole step, in units of the model as it is now."""
    told: Mapping[str, JsonValue] = field(default_factory=dict)
    """For the trace: ``layer_importance`` and ``loss``, None where they were not needed."""


def observe_layers(model: Any, tokens: Tensor, importance: LayerImportance, *, bfloat16: bool = False) -> None:
    """Run the decoder layers alone, without head or gradient, for their importances.

    Args:
        model: a causal language model.
        tokens: ids, int64 [num_samples, num_tokens].
        importance: fed with every layer's input and output.
        bfloat16: let the matrix products run in bfloat16.
    """
    rows = micro_batch_rows(model, tokens.shape[1], FORWARD_TOKENS)
    autocast = torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16)
    with torch.no_grad(), autocast, layers_observed(model, importance.observe):
        for start in range(0, tokens.shape[0], rows):
            model.model(input_ids=tokens[start : start + rows], use_cache=False)


def normalised(importance: LayerImportance) -> list[float]:
    """The importances as the sparsity update takes them."""
    values: list[float] = normalise(importance.raw()).tolist()
    return values
