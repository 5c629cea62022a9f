"""Models larger than memory: decoder layers stay in their files and are read when they run, one at a time.

Embedding, final norm and head are mapped into memory. A layer's weights are read by accelerate's offload hook before it
runs, cast to the type that the model computes in, and let go of after it. A pruned model is streamed too: the dense
files and the positions that are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from harness.errors import UserError
from harness.models import mobilellm
from harness.models.assemble import assemble, without_weights
from harness.models.checkpoint import check_weights, parameter_shapes, read_config, stored_tensors
from harness.structure import KeepPlan, ModelStructure, apply_plan
from harness.weights import VOCABULARY_ROWS, Weight, read

LAYERS = "model.layers."

STREAMED_TOKENS = 4
"""Times as many tokens run at once through a streamed model: only one layer's activations exist, and fewer
micro-batches read its weights less often."""


@dataclass(frozen=True)
class Streamed:
    """What a streamed model knows of its weights; ``model.streamed``."""

    state: Mapping[str, Weight]
    """Parameters by name, tied ones once, in the type they are stored in."""
    dtype: torch.dtype
    """The model computes in it."""
    device: str


def streamed(model: Any) -> Streamed | None:
    """How a model is streamed; None for one whose weights are in memory."""
    found: Streamed | None = getattr(model, "streamed", None)
    return found


def stream_checkpoint(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The model of a checkpoint folder, its layers left in their files.

    Raises:
        UserError: weights and configuration contradict each other, or the architecture cannot be streamed.
        Exception: what transformers raises for a configuration that it cannot make a model of.
    """
    if read_config(folder).get("model_type") == mobilellm.MODEL_TYPE:
        raise UserError("a MobileLLM checkpoint is small enough for memory; leave out --stream")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    shapes = parameter_shapes(without_weights(config))
    check_weights(folder, shapes)
    state = {name: tensor for name, tensor in stored_tensors(folder).items() if name in shapes}
    return stream(config, state, dtype, device)


def stream(
    config: PreTrainedConfig,
    state: Mapping[str, Weight],
    dtype: torch.dtype,
    device: str,
    known: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The causal language model of ``state``, as ``assemble`` makes it, its layers read whenever they run.

    Args:
        config: of the model that the weights come from.
        state: parameters by name, tied ones once.
        dtype: what layers compute in, whatever they are stored in.
        device: where they run.
        known: tensors outside the layers that another model has on the device already; they are shared, not read.
    """
    held: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith(LAYERS):
            held[name] = torch.empty(weight.shape, dtype=dtype, device="meta")
        elif known is not None and name in known:
            held[name] = known[name]
        else:
            is_matrix = len(weight.shape) > 1  # embedding and head keep the type of the file, and so its pages
            held[name] = read(weight).to(device, None if is_matrix else dtype)
    model: Any = assemble(config, held)
    model.requires_grad_(False)
    model.streamed = Streamed(state, dtype, device)
    model.model.rotary_emb.to(device)
    for i, layer in enumerate(model.model.layers):
        weights = _LayerWeights(state, f"{LAYERS}{i}.")
        add_hook_to_module(layer, AlignDevicesHook(device, offload=True, weights_map=weights, place_submodules=True))
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: output.to(dtype))
    _cast_head(model.lm_head)
    streamed_model: PreTrainedModel = model
    return streamed_model


def remove_units(model: PreTrainedModel, structure: ModelStructure, plan: KeepPlan) -> PreTrainedModel:
    """A new model without the units that ``plan`` leaves out; tensors that lose nothing are shared with ``model``.

    Args:
        model: left as it was.
        structure: ``describe(model)``.
        plan: units to keep.
    """
    return rebuilt(model, dict(apply_plan(state_of(model), structure, plan)))


def rebuilt(model: PreTrainedModel, state: Mapping[str, Weight]) -> PreTrainedModel:
    """The model that ``assemble`` makes of ``model``'s configuration and other weights; streamed where ``model`` is.

    Args:
        model: left as it was.
        state: parameters by name, tied ones once; in memory, or for a streamed model in files too.
    """
    if (how := streamed(model)) is not None:
        same = [name for name, weight in state.items() if not name.startswith(LAYERS) and how.state.get(name) is weight]
        known = {name: model.get_parameter(name).detach() for name in same}
        new = stream(model.config, state, how.dtype, how.device, known)
    else:
        new = assemble(model.config, {name: read(weight) for name, weight in state.items()})
    new.generation_config = copy.deepcopy(model.generation_config)
    return new


def state_of(model: PreTrainedModel) -> dict[str, Weight]:
    """Parameters by name, tied ones once; those of a streamed model in their files, to be ``read``."""
    how = streamed(model)
    return dict(model.named_parameters() if how is None else how.state)


def weight_of(model: PreTrainedModel, module: str) -> Tensor:
    """The weight of a linear map, without gradient, on the model's device; in the type it is stored in."""
    how = streamed(model)
    if how is None:
        weight: Tensor = model.get_submodule(module).weight.detach()
        return weight
    return read(how.state[f"{module}.weight"]).to(how.device)


def micro_batch_rows(model: Any, num_tokens: int, micro_batch_tokens: int) -> int:
    """Sequences that a pass over a model runs at once, one at the least.

    Args:
        model: streamed or not.
        num_tokens: of one sequence.
        micro_batch_tokens: most tokens run at once through a model in memory; ``STREAMED_TOKENS`` times as many through
            a streamed one.
    """
    factor = 1 if streamed(model) is None else STREAMED_TOKENS
    return max(factor * micro_batch_tokens // num_tokens, 1)


class _LayerWeights(Mapping[str, Tensor]):
    """The weights of one layer by their names in it, read at every look."""

    def __init__(self, state: Mapping[str, Weight], prefix: str) -> None:
        self._weights = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        return read(self._weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _cast_head(head: Any) -> None:
    """Let a head kept in the file's type multiply hidden states of the model's, a slice of the vocabulary at a time."""

    def forward(hidden: Tensor) -> Tensor:
        slices = head.weight.split(VOCABULARY_ROWS)
        return torch.cat([functional.linear(hidden, part.to(hidden.dtype)) for part in slices], dim=-1)

    head.forward = forward
