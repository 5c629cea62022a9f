"""Runs a token forest through a model: log-likelihoods of the tails of many sequences, in as few tokens as can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from harness.cpu import fast_cpu, return_surplus
from harness.evaluation.attention import AttentionDone, ChunkAttention, Place, attending, forest_attention
from harness.evaluation.chunks import SHORTEST_TRUNK, Chunk, cut
from harness.evaluation.forest import Forest, Ints, grow
from harness.evaluation.head import token_logprobs

Progress = Callable[[int, int], None]
"""Called with (tokens run, tokens in all)."""


class NonFiniteOutputError(RuntimeError):
    """A model gave NaN or infinity; the message names the first module that did."""


@dataclass(frozen=True, slots=True)
class TailScores:
    """Scores of the tails, in the order the sequences were given."""

    loglikelihood: NDArray[np.float64]
    """Nats, summed over the tail."""
    greedy: NDArray[np.bool_]
    """Whether greedy decoding gives the tail."""


def score_tails(
    model: PreTrainedModel,
    head: nn.Linear,
    sequences: Sequence[Ints],
    tails: Sequence[Ints],
    batch_tokens: int,
    progress: Progress | None = None,
) -> TailScores:
    """Score what follows each of the last tokens of each sequence.

    Args:
        model: a causal language model whose attention transformers' AttentionInterface can exchange.
        head: its output embedding.
        sequences: token ids of the inputs, non-empty: what is scored is not the inputs but what they predict.
        tails: tokens to score; the last of them follows the last token of the sequence.
        batch_tokens: tokens run at once.
        progress: told after every chunk.

    Raises:
        NonFiniteOutputError: the model is broken.
        AttentionNotCoveredError: the model's attention is not plain causal attention.
    """
    forest = grow(sequences, [len(tail) for tail in tails])
    targets = _Targets.of(forest, tails)
    loglikelihood = np.zeros(len(sequences))
    greedy = np.ones(len(sequences), np.bool_)
    carried: dict[Place, tuple[Tensor, Tensor]] = {}
    # Merging the attention to a trunk with that to other keys takes the sums of exponentials, which the CPU gives.
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    with torch.no_grad(), fast_cpu(), forest_attention(model):
        for chunk in cut(forest, batch_tokens, SHORTEST_TRUNK if on_cpu else None):
            attention = ChunkAttention(chunk, carried)
            row, token, sequence = targets.within(chunk)
            rows, of_row = np.unique(row, return_inverse=True)
            # A chunk without scored tokens only hands keys and values on: any one of its tokens will do.
            scored = _hidden_states(
                model,
                forest,
                chunk,
                attention,
                torch.from_numpy(rows) if len(rows) else torch.zeros(1, dtype=torch.int64),
            )
            if len(rows):
                logprob, likeliest = token_logprobs(head, scored, torch.from_numpy(of_row), torch.from_numpy(token))
                if not torch.isfinite(logprob).all():
                    raise NonFiniteOutputError(_first_non_finite(model, forest, chunk, ChunkAttention(chunk, carried)))
                np.add.at(loglikelihood, sequence, logprob.double().numpy())
                np.logical_and.at(greedy, sequence, likeliest.numpy())
            carried = attention.carry_out
            return_surplus()
            if progress is not None:
                progress(chunk.end, forest.num_nodes)
    return TailScores(loglikelihood, greedy)


@dataclass(frozen=True, slots=True)
class _Targets:
    """What is scored where, sorted by node; all ``[num_scored_tokens]``."""

    node: Ints
    token: Ints
    sequence: Ints

    @staticmethod
    def of(forest: Forest, tails: Sequence[Ints]) -> _Targets:
        node = np.concatenate(forest.nodes_of)
        token = np.concatenate(tails)
        sequence = np.repeat(np.arange(len(tails)), [len(tail) for tail in tails])
        order = np.argsort(node, kind="stable")
        return _Targets(node[order], token[order], sequence[order])

    def within(self, chunk: Chunk) -> tuple[Ints, Ints, Ints]:
        first, last = np.searchsorted(self.node, [chunk.start, chunk.end])
        return self.node[first:last] - chunk.start, self.token[first:last], self.sequence[first:last]


def _hidden_states(
    model: PreTrainedModel, forest: Forest, chunk: Chunk, attention: ChunkAttention, rows: Tensor | None = None
) -> Tensor:
    """Last hidden states ``[T, hidden_size]`` of a chunk, or of some of its tokens alone."""
    device = model.get_input_embeddings().weight.device
    padding = (0, chunk.num_padded - (chunk.end - chunk.start))
    token, position = (
        torch.from_numpy(np.pad(values[chunk.start : chunk.end], padding)).to(device)
        for values in (forest.token, forest.position)
    )
    last = _last_layer(model) if rows is not None and 2 * len(rows) < len(token) else None
    short = nullcontext() if last is None or rows is None else _running_on(last, rows, attention)
    with attending(attention), short:
        out = model.base_model(input_ids=token.unsqueeze(0), position_ids=position.unsqueeze(0), use_cache=False)
    hidden_TC: Tensor = out.last_hidden_state[0]
    if rows is None:
        return hidden_TC[: chunk.end - chunk.start]
    return hidden_TC if last is not None else hidden_TC[rows.to(hidden_TC.device)]


def _last_layer(model: PreTrainedModel) -> nn.Module | None:
    """The last decoder layer, where it runs once a pass and its weights are at hand."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None or getattr(model.config, "layer_repeats", 1) > 1 or hasattr(layers[-1], "_hf_hook"):
        return None
    last: nn.Module = layers[-1]
    return last


@contextmanager
def _running_on(last: nn.Module, rows: Tensor, attention: ChunkAttention) -> Iterator[None]:
    """Within it the last layer gives its output at some tokens alone: the others are only attended to.

    It runs on all tokens as far as its attention, and then, with that attention's output, on those tokens.
    """

    def before(
        layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attention.wanted = rows
        with suppress(AttentionDone):
            layer.forward(*given, **named)
        attention.wanted = None  # a layer without heads does not ask
        hidden_BTC = given[0] if given else named["hidden_states"]
        at = rows.to(hidden_BTC.device)

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(part) for part in value)
            per_token = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == hidden_BTC.shape[1]
            return value.index_select(1, at) if per_token else value

        return cut(given), {name: cut(value) for name, value in named.items()}

    handle = last.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first_non_finite(model: PreTrainedModel, forest: Forest, chunk: Chunk, attention: ChunkAttention) -> str:
    """Runs the chunk again with an eye on every module, and says where it breaks."""
    with watching_for_non_finite(model) as broken:
        _hidden_states(model, forest, chunk, attention)
    return describe_break(broken)


@contextmanager
def watching_for_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules whose output is not finite, in the order they ran (inner before outer)."""
    broken: list[str] = []

    def watch(name: str) -> RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.is_floating_point() and not torch.isfinite(first).all():
                broken.append(name)

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [watch(name) for name, _ in model.named_modules() if name]
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()


def describe_break(broken: list[str]) -> str:
    """The sentence for the modules that ``watching_for_non_finite`` found."""
    where = f"the output of {broken[0]!r}" if broken else "the output of the head"
    return f"{where} is not finite (NaN or infinity): the model is broken from there on and cannot be scored"
