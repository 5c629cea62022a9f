"""Attention over a chunk of a token forest, for any model that asks transformers' AttentionInterface for attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from harness.cpu import matmul_library
from harness.evaluation.chunks import BlockGroup, Chunk, Trunk

# Shapes: T tokens of the chunk, K keys (carried path + chunk), H query heads, G kv heads, D head_dim,
# N blocks, Q and S the longest query and key run of a group.

NAME = "harness_token_forest"


Place = tuple[nn.Module, int]
"""An attention module and how often this pass has called it before: a layer that is repeated calls it several times."""


class AttentionNotCoveredError(Exception):
    """The model asks attention for something that the forest attention does not do; the message says what."""


class AttentionDone(Exception):  # noqa: N818 (a signal, not an error)
    """The attention output that a layer was run for is known; the rest of the layer need not run."""


@dataclass(frozen=True, slots=True)
class _GroupTensors:
    queries: Tensor
    """int64 [N * Q]: chunk tokens; padding repeats token 0."""
    keys: Tensor
    """int64 [N * S]"""
    bias: Tensor
    """[N, 1, Q, S]: 0 where a key is seen, -inf elsewhere."""
    num_blocks: int


def _tensors(group: BlockGroup, device: torch.device, dtype: torch.dtype) -> _GroupTensors:
    bias = torch.zeros(group.visible.shape, dtype=dtype)
    bias.masked_fill_(~torch.from_numpy(group.visible), float("-inf"))
    return _GroupTensors(
        queries=torch.from_numpy(np.maximum(group.queries.reshape(-1), 0)).to(device),
        keys=torch.from_numpy(np.maximum(group.keys.reshape(-1), 0)).to(device),
        bias=bias.unsqueeze(1).to(device),
        num_blocks=len(group.queries),
    )


@dataclass(slots=True)
class ChunkAttention:
    """The attention of one forward pass; keeps what the next chunk needs of every attention module."""

    chunk: Chunk
    carried: dict[Place, tuple[Tensor, Tensor]]
    """Keys and values of the path to the chunk's first token, each [carried, G, D]."""
    carry_out: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    wanted: Tensor | None = None
    """int64: the next layer to attend stops after its attention, whose output at these tokens is kept in ``known``."""
    known: Tensor | None = None
    """The answer to the next call, whatever it asks."""
    _calls: Counter[nn.Module] = field(default_factory=Counter)
    _groups: dict[tuple[torch.device, torch.dtype], list[_GroupTensors]] = field(default_factory=dict)
    _out: dict[torch.device, Tensor] = field(default_factory=dict)
    _unpad: dict[torch.device, Tensor] = field(default_factory=dict)

    def attend(self, module: nn.Module, query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, scale: float) -> Tensor:
        """Attention output ``[T, H, D]`` of the chunk's tokens.

        Raises:
            AttentionDone: some tokens' output was ``wanted``; it is ``known`` now.
        """
        if self.known is not None:
            known, self.known = self.known, None
            return known
        out_THD = self._attended(module, query_HTD, key_GTD, value_GTD, scale)
        if self.wanted is not None:
            self.known, self.wanted = out_THD.index_select(0, self.wanted.to(out_THD.device)), None
            raise AttentionDone
        return out_THD

    def _attended(
        self, module: nn.Module, query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, scale: float
    ) -> Tensor:
        query, key, value = (t.transpose(0, 1) for t in (query_HTD, key_GTD, value_GTD))
        place = (module, self._calls[module])
        self._calls[module] += 1
        if self.chunk.num_carried:
            key_before, value_before = self.carried[place]
            key, value = torch.cat([key_before, key]), torch.cat([value_before, value])
        if len(self.chunk.carry_out):
            kept = self._carry_index(key.device)
            self.carry_out[place] = (key.index_select(0, kept), value.index_select(0, kept))
        parts = [self._attend_group(group, query, key, value, scale) for group in self._groups_on(query)]
        unpad = self._unpad_index(query.device)
        out_THD = torch.cat([part.out for part in parts]).index_select(0, unpad)
        if self.chunk.trunks:
            sums_TH = torch.cat([part.log_sum for part in parts if part.log_sum is not None]).index_select(0, unpad)
            for trunk in self.chunk.trunks:
                _merge_trunk(trunk, query, key, value, scale, out_THD, sums_TH)
        return out_THD

    def _attend_group(self, group: _GroupTensors, query: Tensor, key: Tensor, value: Tensor, scale: float) -> _Attended:
        def blocks(tensor: Tensor, index: Tensor) -> Tensor:
            taken = tensor.index_select(0, index)
            return taken.view(group.num_blocks, -1, *tensor.shape[1:]).transpose(1, 2)

        picked = blocks(query, group.queries), blocks(key, group.keys), blocks(value, group.keys)
        if self.chunk.trunks:
            return _attend_summed(*picked, scale=scale, bias=group.bias)
        grouped = query.shape[1] != key.shape[1]
        out_NHQD = functional.scaled_dot_product_attention(
            *picked, attn_mask=group.bias, scale=scale, enable_gqa=grouped
        )
        return _Attended(out_NHQD.transpose(1, 2).flatten(0, 1))

    def _groups_on(self, query: Tensor) -> list[_GroupTensors]:
        place = (query.device, query.dtype)
        if place not in self._groups:
            self._groups[place] = [_tensors(group, *place) for group in self.chunk.groups]
        return self._groups[place]

    def _carry_index(self, device: torch.device) -> Tensor:
        if device not in self._out:
            self._out[device] = torch.from_numpy(self.chunk.carry_out).to(device)
        return self._out[device]

    def _unpad_index(self, device: torch.device) -> Tensor:
        """Where each chunk token stands among the padded queries of all groups."""
        if device not in self._unpad:
            order = np.concatenate([group.queries.reshape(-1) for group in self.chunk.groups])
            where = np.zeros(self.chunk.num_padded, np.int64)  # padding has any token's output
            real = np.flatnonzero(order >= 0)
            where[order[real]] = real
            self._unpad[device] = torch.from_numpy(where).to(device)
        return self._unpad[device]


@dataclass(frozen=True, slots=True)
class _Attended:
    """Attention of some queries to some keys."""

    out: Tensor
    """[N * Q, H, D]"""
    log_sum: Tensor | None = None
    """Of the exponentials of the scaled products, float32 [N * Q, H]."""


def _batch_of_one(tensor: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D]."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _attend_summed(query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None) -> _Attended:
    """As ``scaled_dot_product_attention`` computes it on a CPU, which keeps the sums: ``[N, H, Q, D]`` in."""
    out_NHQD, sums_NHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    return _Attended(out_NHQD.transpose(1, 2).flatten(0, 1), sums_NHQ.transpose(1, 2).flatten(0, 1))


_ROWS = 1024
"""Queries of one kv head that are attended to at once, so that their scores stay in the cache."""


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> _Attended:
    """As `_attend_summed`, without a mask and of one block, through products that `harness.cpu` runs faster."""
    (_, num_heads, num_queries, width), num_groups = query.shape, key.shape[1]
    outs, sums = [], []
    for group in range(num_groups):
        heads = slice(group * num_heads // num_groups, (group + 1) * num_heads // num_groups)
        key_DS, value_SD = key[0, group].t().contiguous(), value[0, group].contiguous()
        for part_RD in torch.split(query[0, heads].reshape(-1, width) * scale, _ROWS):
            scores_RS = part_RD @ key_DS
            highest_R1 = scores_RS.amax(dim=-1, keepdim=True)
            total_R1 = scores_RS.sub_(highest_R1).exp_().sum(dim=-1, keepdim=True)
            outs.append((scores_RS @ value_SD).div_(total_R1))
            sums.append(highest_R1.add_(total_R1.log_()))
    out_THD = torch.cat(outs).view(num_heads, num_queries, width).transpose(0, 1)
    return _Attended(out_THD, torch.cat(sums).view(num_heads, num_queries).t())


def _merge_trunk(
    trunk: Trunk, query: Tensor, key: Tensor, value: Tensor, scale: float, out_THD: Tensor, sums_TH: Tensor
) -> None:
    """Add the keys of a trunk to the attention of the tokens below it, in place.

    Softmax over two sets of keys is the mean of the softmaxes over each, weighted by their sums of exponentials.
    """
    rows = slice(trunk.start, trunk.end)
    first, last = int(trunk.keys[0]), int(trunk.keys[-1])
    if last - first + 1 == len(trunk.keys):
        key, value = key[first : last + 1], value[first : last + 1]
    else:
        index = torch.from_numpy(trunk.keys)
        key, value = key.index_select(0, index), value.index_select(0, index)
    exchanged = matmul_library() == "onednn" and query.dtype == torch.float32
    attend = _attend_by_products if exchanged else _attend_summed
    far = attend(*(_batch_of_one(tensor) for tensor in (query[rows], key, value)), scale=scale)
    assert far.log_sum is not None
    weight = torch.sigmoid(far.log_sum - sums_TH[rows]).unsqueeze(-1)
    out_THD[rows] = out_THD[rows].float().lerp(far.out.float(), weight).to(out_THD.dtype)


_ACTIVE: ContextVar[ChunkAttention] = ContextVar("active_chunk_attention")


def _forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention; ``[1, H, T, D]`` in, ``[1, T, H, D]`` out."""
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise AttentionNotCoveredError(f"its attention uses {unsupported}")
    if attention_mask is not None:
        raise AttentionNotCoveredError("it builds its own attention mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _ACTIVE.get().attend(module, query[0], key[0], value[0], scale).unsqueeze(0), None


AttentionInterface.register(NAME, _forest_attention)


@contextmanager
def forest_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's attention is the forest's; its own implementation is put back after."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise AttentionNotCoveredError("its attention cannot be exchanged")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def attending(attention: ChunkAttention) -> Iterator[None]:
    """Within it forward passes use ``attention``."""
    token = _ACTIVE.set(attention)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
