"""The gradient pass of a streamed model: a layer takes all micro-batches backward before the one below it is read.

A first pass forward keeps the input of every layer. From the last layer to the first, each then runs again, with
gradients: its weights, activations and gradients exist while it does, and those of no other layer.

Source: gradient checkpointing, arXiv:1604.06174, with every layer a segment.

Shape letters: B samples, T tokens of a sample, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from baselines.taps import Gathering, layers_observed, stream_into, stream_out_of, tapped
from harness.token_loss import batch_loss


@dataclass
class _MicroBatch:
    """Some sequences on their way back through the layers."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> residual stream before it [B, T, H]; taken out when the layer's turn has come."""
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Layer -> what else it is called with."""
    slope: Tensor | None = None
    """Gradient of the loss by the output of the layer whose turn it is [B, T, H]."""


def layerwise_pass(model: Any, calibration: Tensor, weight_B: Tensor, gathering: Gathering) -> float:
    """Hand out the gradients of the weighted sum of token losses, last layer first; returns their plain sum.

    Args:
        model: a streamed causal language model without gradients of its own.
        calibration: token ids [B, T].
        weight_B: what each token of a sample weighs in the loss.
        gathering: its ``reduce`` receives a layer's gradients as soon as all micro-batches have passed the layer.
    """
    by_layer: dict[int, list[str]] = {}
    for name in gathering.modules:
        by_layer.setdefault(int(name.split(".")[2]), []).append(name)
    first, num_samples = min(by_layer), calibration.shape[0]
    total_loss, micro_batches = 0.0, []
    for part in gathering.micro_batches(num_samples):
        micro_batch, loss = _forward(model, calibration[part], weight_B[part], first, gathering)
        micro_batches.append(micro_batch)
        total_loss += loss
    for i in range(len(model.model.layers) - 1, first - 1, -1):
        with ExitStack() as stack:
            taps = [
                stack.enter_context(tapped(model, name, gathering.moments, num_samples)) for name in by_layer.get(i, ())
            ]
            for micro_batch in micro_batches:
                for tap in taps:
                    tap.reduce = gathering.reduce if micro_batch is micro_batches[-1] else None
                _backward(model.model.layers[i], i, micro_batch, gathering.bfloat16, is_first=i == first)
    return total_loss


def _forward(
    model: Any, batch_BT: Tensor, weight_B: Tensor, first: int, gathering: Gathering
) -> tuple[_MicroBatch, float]:
    """Run some sequences through the model; the slope is that of the last layer's output then."""
    kept = _MicroBatch()
    layers = model.model.layers
    outputs: list[Tensor] = []
    autocast = partial(torch.autocast, batch_BT.device.type, torch.bfloat16, enabled=gathering.bfloat16)

    def before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.inputs[index] = stream_into(args, kwargs)
            kept.arguments[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return keep

    with ExitStack() as stack:
        for i in range(first, len(layers)):
            stack.callback(layers[i].register_forward_pre_hook(before(i), with_kwargs=True).remove)
        stack.callback(
            layers[-1].register_forward_hook(lambda _m, _args, out: outputs.append(stream_out_of(out))).remove
        )
        if gathering.on_layer is not None:
            stack.enter_context(layers_observed(model, gathering.on_layer))
        with torch.no_grad(), autocast():
            model.model(input_ids=batch_BT, use_cache=False)
    with torch.enable_grad():
        last = outputs[0].detach().requires_grad_()
        with autocast():
            hidden = model.model.norm(last)
        head_VH = model.lm_head.weight.detach()
        loss, plain = batch_loss(hidden, head_VH, batch_BT, weight_B, bfloat16=gathering.bfloat16)
        (kept.slope,) = torch.autograd.grad(loss, last)
    return kept, float(plain)


def _backward(layer: nn.Module, index: int, micro_batch: _MicroBatch, bfloat16: bool, *, is_first: bool) -> None:
    """Run a layer again and turn the slope by its output into the slope by its input."""
    assert micro_batch.slope is not None
    given = micro_batch.inputs.pop(index).detach().requires_grad_(not is_first)
    with torch.enable_grad():
        with torch.autocast(given.device.type, torch.bfloat16, enabled=bfloat16):
            output = stream_out_of(layer(given, **micro_batch.arguments.pop(index)))
        torch.autograd.backward(output, micro_batch.slope)
    micro_batch.slope = given.grad
