"""A model's weights, gradients and moments spread over processes while it trains, and brought together to be pruned.

Source: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (arXiv:2304.11277); here by
``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def sharding_asked() -> bool:
    """Whether ``accelerate launch --use_fsdp`` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(loss: Any, model: Any) -> None:
    """Spread the parameters over all processes, in place: a decoder layer is whole while it runs, what is outside of
    the layers during a forward and backward pass.

    Args:
        loss: module that runs ``model``; its gradients are averaged over the processes.
        model: causal language model, on the device it trains on; the same in every process.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    empty: set[nn.Parameter] = {parameter for parameter in model.parameters() if parameter.numel() == 0}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=empty)
    fully_shard(loss, mesh=mesh, ignored_params=empty)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread; every process must ask for it, and has it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The same in CPU memory where it was spread: a device may have no room for all of them."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, spread as a parameter of that size is; on its device."""
    placed = tensor.to(parameter.device)
    # AdamW's count of steps is of no parameter's shape, and is no process's alone.
    if not isinstance(parameter, DTensor) or placed.shape != parameter.shape:
        return placed
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements)
