"""What running a model costs: multiplications, bytes, and its speed beside the dense model's in the same process.

What is counted is exact and repeats anywhere. What is timed holds for the machine, the thread count and the lengths it
was timed at; its ratio to the dense model, measured turn by turn, holds for more.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harness.records import EfficiencySpec, Measure

MACS = "efficiency/macs_per_token"
WEIGHT_BYTES = "efficiency/weight_bytes"
PEAK_BYTES = "efficiency/peak_bytes"
FIRST_TOKEN = "efficiency/first_token_seconds"
PREFILL = "efficiency/prefill_tokens_per_second"
DECODE = "efficiency/decode_tokens_per_second"
RATIO = "_vs_dense"
"""Ends the name of a speed over the dense model's."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One generation by one model."""

    first_token_seconds: float
    """From the prompt's token ids to the id of the first new token."""
    decode_seconds: float
    """For the new tokens after the first."""


def measure_inference(model: Any, dense: Any, spec: EfficiencySpec) -> tuple[Measure, ...]:
    """Count and time a model, the dense model in turn with it; for the dense model itself the ratios show the noise.

    Args:
        model: causal language model.
        dense: what it was pruned from, on the same device.
        spec: batch, lengths and repeats.
    """
    prompt_BT = _prompt(model, spec)
    counted = [
        _measure(MACS, macs_per_token(model, prompt_BT), "multiply-accumulates/token", higher_is_better=False),
        _measure(WEIGHT_BYTES, weight_bytes(model), "bytes", higher_is_better=False),
        _measure(PEAK_BYTES, peak_bytes(model, prompt_BT, spec.new_tokens), "bytes", higher_is_better=False),
    ]
    ours, theirs = interleaved_turns(model, dense, prompt_BT, spec)
    return (*counted, *speeds(ours, theirs, spec))


@torch.no_grad()
def macs_per_token(model: Any, prompt_BT: Tensor) -> float:
    """Multiply-accumulates of one forward pass over a prompt, the head at every position, by its tokens.

    Attention is counted as the full T x T products, as by torch's counter, whatever the kernel skips.
    """
    # torch's counter knows the attention kernels of GPUs and not the CPU's.
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        model(input_ids=prompt_BT, use_cache=False)
    return float(counter.get_total_flops() / 2 / prompt_BT.numel())


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters, a tied tensor once."""
    return sum(int(p.numel() * p.element_size()) for p in model.parameters())


def peak_bytes(model: Any, prompt_BT: Tensor, new_tokens: int) -> int:
    """Most bytes of weights, activations and cache alive at once in a generation, without scratch inside a kernel."""
    with LiveBytes() as live:
        take_turn(model, prompt_BT, new_tokens)
    return weight_bytes(model) + int(live.peak)


def interleaved_turns(model: Any, dense: Any, prompt_BT: Tensor, spec: EfficiencySpec) -> tuple[list[Turn], list[Turn]]:
    """``repeats`` turns of each, alternating in who begins; one more before them warms up and is dropped."""
    ours: list[Turn] = []
    theirs: list[Turn] = []
    for i in range(spec.repeats + 1):
        order = [(model, ours), (dense, theirs)]
        for whose, turns in order if i % 2 else reversed(order):
            turns.append(take_turn(whose, prompt_BT, spec.new_tokens))
    return ours[1:], theirs[1:]


@torch.no_grad()
def take_turn(model: Any, prompt_BT: Tensor, new_tokens: int) -> Turn:
    """Read a prompt and generate greedily, with a key-value cache and the head at the last position alone."""
    start = _now(prompt_BT)
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    token_B1 = output.logits[:, -1].argmax(-1, keepdim=True)
    first = _now(prompt_BT)
    for _ in range(new_tokens):
        output = model(input_ids=token_B1, past_key_values=output.past_key_values, use_cache=True)
        token_B1 = output.logits[:, -1].argmax(-1, keepdim=True)
    return Turn(first - start, _now(prompt_BT) - first)


def speeds(ours: list[Turn], theirs: list[Turn], spec: EfficiencySpec) -> tuple[Measure, ...]:
    """Medians over the turns, and the median of the ratio to the dense model's turn beside each."""
    first = median(turn.first_token_seconds for turn in ours)
    decode = median(turn.decode_seconds for turn in ours)
    pairs = list(zip(ours, theirs, strict=True))
    first_ratio = median(dense.first_token_seconds / turn.first_token_seconds for turn, dense in pairs)
    decode_ratio = median(dense.decode_seconds / turn.decode_seconds for turn, dense in pairs)
    return (
        _measure(FIRST_TOKEN, first, "seconds", higher_is_better=False),
        _measure(PREFILL, spec.batch_size * spec.prompt_tokens / first, "tokens/second"),
        _measure(PREFILL + RATIO, first_ratio, "ratio"),
        _measure(DECODE, spec.batch_size * spec.new_tokens / decode, "tokens/second"),
        _measure(DECODE + RATIO, decode_ratio, "ratio"),
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage_id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage_id(tensor) not in given | self._alive:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


def _storage_id(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _prompt(model: Any, spec: EfficiencySpec) -> Tensor:
    # Which tokens they are changes no speed and no count.
    embedding: torch.nn.Embedding = model.get_input_embeddings()
    ids = torch.arange(spec.batch_size * spec.prompt_tokens) % embedding.num_embeddings
    return ids.view(spec.batch_size, spec.prompt_tokens).to(embedding.weight.device)


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def _measure(name: str, value: float, unit: str, *, higher_is_better: bool = True) -> Measure:
    return Measure(name=name, value=value, unit=unit, higher_is_better=higher_is_better)
