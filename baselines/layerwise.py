"""The gradient pass of a streamed model: a layer takes all micro-batches backward before the one below it is read.

A first pass forward keeps the input of every layer. From the last layer to the first, each then runs again, with
gradients: its weights, activations and gradients exist while it does, and those of no other layer.

Source: gradient checkpointing, arXiv:1604.06174, with every layer a segment.

Shape letters: B samples, T tokens of a sample, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from baselines.next_token_loss import batch_loss
from baselines.taps import LayerObserver, Moments, Reducer, layers_observed, tapped

STREAMED_TOKENS = 4
"""Times as many tokens run at once through a streamed model: only one layer's activations exist, and fewer
micro-batches read its weights less often."""


@dataclass
class _MicroBatch:
    """Some sequences on their way back through the layers."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> residual stream before it [B, T, H]; taken out when the layer's turn has come."""
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Layer -> what else it is called with."""
    slope: Tensor | None = None
    """Gradient of the loss by the output of the layer whose turn it is [B, T, H]."""


def layerwise_pass(
    model: Any,
    calibration: Tensor,
    weight_B: Tensor,
    modules: Sequence[str],
    reduce: Reducer,
    *,
    moments: Moments,
    rows: int,
    bfloat16: bool,
    on_layer: LayerObserver | None,
) -> float:
    """Hand out the gradients of the weighted sum of token losses, last layer first; returns their plain sum.

    Args:
        model: a streamed causal language model without gradients of its own.
        calibration: token ids [B, T].
        weight_B: what each token of a sample weighs in the loss.
        modules: see ``gradients.gradient_pass``, as all that follow.
        reduce: receives a layer's gradients as soon as all micro-batches have passed it.
        moments: which ones.
        rows: samples of a micro-batch.
        bfloat16: let the matrix products run in bfloat16.
        on_layer: sees the first pass.
    """
    by_layer: dict[int, list[str]] = {}
    for name in modules:
        by_layer.setdefault(int(name.split(".")[2]), []).append(name)
    first = min(by_layer)
    total_loss, micro_batches = 0.0, []
    for start in range(0, calibration.shape[0], rows):
        part = slice(start, start + rows)
        micro_batch, loss = _forward(model, calibration[part], weight_B[part], first, bfloat16, on_layer)
        micro_batches.append(micro_batch)
        total_loss += loss
    for i in range(len(model.model.layers) - 1, first - 1, -1):
        with ExitStack() as stack:
            names = by_layer.get(i, ())
            taps = [stack.enter_context(tapped(model, name, moments, calibration.shape[0])) for name in names]
            for micro_batch in micro_batches:
                for tap in taps:
                    tap.reduce = reduce if micro_batch is micro_batches[-1] else None
                _backward(model.model.layers[i], i, micro_batch, bfloat16, is_first=i == first)
    return total_loss


def _forward(
    model: Any, batch_BT: Tensor, weight_B: Tensor, first: int, bfloat16: bool, on_layer: LayerObserver | None
) -> tuple[_MicroBatch, float]:
    """Run some sequences through the model; the slope is that of the last layer's output then."""
    kept = _MicroBatch()
    layers = model.model.layers
    outputs: list[Tensor] = []

    def before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.inputs[index] = args[0] if args else kwargs["hidden_states"]
            kept.arguments[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return keep

    with ExitStack() as stack:
        for i in range(first, len(layers)):
            stack.callback(layers[i].register_forward_pre_hook(before(i), with_kwargs=True).remove)
        stack.callback(layers[-1].register_forward_hook(lambda _m, _args, out: outputs.append(_stream(out))).remove)
        if on_layer is not None:
            stack.enter_context(layers_observed(model, on_layer))
        with torch.no_grad(), torch.autocast(batch_BT.device.type, torch.bfloat16, enabled=bfloat16):
            model.model(input_ids=batch_BT, use_cache=False)
    with torch.enable_grad():
        last = outputs[0].detach().requires_grad_()
        with torch.autocast(batch_BT.device.type, torch.bfloat16, enabled=bfloat16):
            hidden = model.model.norm(last)
        loss, plain = batch_loss(hidden, model.lm_head.weight.detach(), batch_BT, weight_B, bfloat16=bfloat16)
        (kept.slope,) = torch.autograd.grad(loss, last)
    return kept, float(plain)


def _backward(layer: nn.Module, index: int, micro_batch: _MicroBatch, bfloat16: bool, *, is_first: bool) -> None:
    """Run a layer again and turn the slope by its output into the slope by its input."""
    assert micro_batch.slope is not None
    given = micro_batch.inputs.pop(index).detach().requires_grad_(not is_first)
    with torch.enable_grad():
        with torch.autocast(given.device.type, torch.bfloat16, enabled=bfloat16):
            output = _stream(layer(given, **micro_batch.arguments.pop(index)))
        torch.autograd.backward(output, micro_batch.slope)
    micro_batch.slope = given.grad


def _stream(output: Any) -> Tensor:
    """The residual stream that a layer returns."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream
