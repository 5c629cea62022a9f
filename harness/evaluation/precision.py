"""bfloat16 weights with float32 between them: what the weights save, without most of what rounding costs.

A bfloat16 forward pass rounds the residual stream after every addition, twice a layer. Here the stream, the norms, the
attention with its softmax and, in `harness.evaluation.head`, the logits are float32; only the inputs and outputs of the
linear maps are bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def float32_stream(model: PreTrainedModel) -> Iterator[None]:
    """Within it a bfloat16 model keeps its residual stream in float32; a model in another dtype is left alone."""
    if model.dtype != torch.bfloat16:
        yield
        return
    handles = [model.get_input_embeddings().register_forward_hook(_widen)]
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):  # for whoever asks the model itself for logits
        handles.append(head.register_forward_pre_hook(_narrow))
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(_narrow))
            if name.endswith(".v_proj"):
                # Queries and keys become float32 with the rotary embedding, which follows the stream.
                handles.append(module.register_forward_hook(_widen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _narrow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (inputs[0].to(weight.dtype), *inputs[1:])
