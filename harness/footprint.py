"""How much memory pruning takes, from a model's shapes and a calibration batch alone.

A method says what it holds beyond the dense weights (``PruningMethod.working_bytes``); the pieces they are made of are
here. Estimates: allocators round up, and torch keeps a few blocks more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.models.streaming import STREAMED_TOKENS
from harness.records import ParamCounts
from harness.structure import CoupledGroup, ModelStructure
from harness.token_loss import LOGIT_TOKENS

PROCESS_BYTES = 450 * 2**20
"""Python, torch and transformers before a model is loaded; measured (resident, CPU build of torch 2.13)."""
SCORING_DATA_BYTES = 600 * 2**20
"""Documents, requests and their tokens while the default tasks are scored; measured in the reference run."""


@dataclass(frozen=True)
class Footprint:
    """A dense model and the calibration batch it is pruned with, as far as memory goes."""

    structure: ModelStructure
    params: ParamCounts
    vocab_size: int
    bytes_per_weight: int
    num_samples: int
    num_tokens: int
    """Tokens of one calibration sequence."""
    streamed: bool = False
    """Whether layers stay in their files until they run."""

    @property
    def weight_bytes(self) -> int:
        """The dense weights."""
        return self.params.total * self.bytes_per_weight

    @property
    def held_bytes(self) -> int:
        """What of a model is in memory all the time: its weights, or embedding, head and one layer of a streamed one.

        That layer is there twice: as pages of its file, and in the type that it computes in.
        """
        if not self.streamed:
            return self.weight_bytes
        one_layer = self.structure.prunable_params // self.structure.num_layers
        return (self.params.embedding + 2 * one_layer) * self.bytes_per_weight

    @property
    def copy_bytes(self) -> int:
        """A pruned model beside the dense one: every prunable tensor is new, the embeddings are shared.

        A streamed one is no more than the positions that are kept.
        """
        return 0 if self.streamed else self.structure.prunable_params * self.bytes_per_weight

    def gradient_bytes(self, groups: Iterable[CoupledGroup], moments: int = 1) -> int:
        """Gradients of the matrices of some groups in float32, or of those of one layer where layers are streamed."""
        by_layer: dict[int, int] = {}
        for group in groups:
            by_layer[group.layer] = by_layer.get(group.layer, 0) + group.num_units * group.unit_params
        weights = max(by_layer.values(), default=0) if self.streamed else sum(by_layer.values())
        return 4 * moments * weights

    @property
    def calibration_tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.num_samples * self.num_tokens

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest matrix that belongs to a group."""
        return self.structure.hidden_size * max((g.num_units for g in self.structure.mlp), default=0)

    def layer_floats(self, layers: int | None = None) -> int:
        """Numbers that layers keep for one token when nothing is freed, as in a forward pass with gradients.

        The residual stream and two norms, q, k, v, rotated and repeated, and the attention's output: ten times the
        hidden size; the MLP's gate, its activation, up, and their product: four times its width.

        Args:
            layers: how many of the last layers; None is all of them.
        """
        counted = self.structure.mlp if layers is None else self.structure.mlp[-layers:]
        per_layer = [10 * self.structure.hidden_size + 4 * group.num_units for group in counted]
        return self.structure.layer_repeats * sum(per_layer)

    def forward_bytes(self, tokens: int) -> int:
        """A forward pass without gradients: the activations of one layer, and the residual stream."""
        widest = max((group.num_units for group in self.structure.mlp), default=0)
        return (
            min(tokens, self.calibration_tokens)
            * self.bytes_per_weight
            * (11 * self.structure.hidden_size + 4 * widest)
        )

    def backward_bytes(self, tokens: int, layers: int | None = None, logit_tokens: int = 128) -> int:
        """A micro-batch forward and backward: activations of all layers, and a few tokens' logits thrice in float32.

        Of a streamed model: activations of one layer, of ``STREAMED_TOKENS`` times the tokens, and the inputs of all.
        """
        width = max(self.bytes_per_weight, 4)  # norms and softmax keep float32
        logits = 3 * logit_tokens * self.vocab_size * 4
        if not self.streamed:
            return min(tokens, self.calibration_tokens) * self.layer_floats(layers) * width + logits
        inputs = self.calibration_tokens * (layers or self.structure.num_layers) * self.structure.hidden_size
        activations = min(STREAMED_TOKENS * tokens, self.calibration_tokens) * self.layer_floats(1)
        return inputs * self.bytes_per_weight + activations * width + logits

    def training_bytes(self, micro_batch_tokens: int, *, checkpointing: bool) -> int:
        """Training every weight in float32: weights, gradients and AdamW's two moments, and one micro-batch.

        The dense weights stay beside them.

        Args:
            micro_batch_tokens: run at once.
            checkpointing: whether layers keep their inputs alone, and compute the rest again.
        """
        inputs = self.structure.num_layers * self.structure.hidden_size
        floats = inputs + self.layer_floats(1) if checkpointing else self.layer_floats()
        logits = 3 * LOGIT_TOKENS * self.vocab_size * 4
        return PROCESS_BYTES + self.weight_bytes + 16 * self.params.total + 4 * micro_batch_tokens * floats + logits

    def scoring_bytes(self, batch_tokens: int, *, copy: bool = True) -> int:
        """Everything held while a model is scored; the dense one waits beside a pruned ``copy`` for the next target."""
        widest = max((group.num_units for group in self.structure.mlp), default=0)
        activations = batch_tokens * self.bytes_per_weight * (11 * self.structure.hidden_size + 4 * widest)
        second = self.held_bytes if self.streamed else self.copy_bytes
        return PROCESS_BYTES + SCORING_DATA_BYTES + self.held_bytes + copy * second + activations
