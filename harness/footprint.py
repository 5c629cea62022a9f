"""How much memory pruning takes, from a model's shapes and a calibration batch alone.

A method says what it holds beyond the dense weights (``PruningMethod.working_bytes``); the pieces they are made of are
here. Estimates: allocators round up, and torch keeps a few blocks more.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.records import ParamCounts
from harness.structure import ModelStructure

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

    @property
    def weight_bytes(self) -> int:
        """The dense weights."""
        return self.params.total * self.bytes_per_weight

    @property
    def copy_bytes(self) -> int:
        """A pruned model beside the dense one: every prunable tensor is new, the embeddings are shared."""
        return self.structure.prunable_params * self.bytes_per_weight

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
        """A micro-batch forward and backward: activations of all layers, and a few tokens' logits thrice in float32."""
        width = max(self.bytes_per_weight, 4)  # norms and softmax keep float32
        activations = min(tokens, self.calibration_tokens) * self.layer_floats(layers) * width
        return activations + 3 * logit_tokens * self.vocab_size * 4

    def scoring_bytes(self, batch_tokens: int, *, copy: bool = True) -> int:
        """Everything held while a model is scored; the dense one waits beside a pruned ``copy`` for the next target."""
        widest = max((group.num_units for group in self.structure.mlp), default=0)
        activations = batch_tokens * self.bytes_per_weight * (11 * self.structure.hidden_size + 4 * widest)
        return PROCESS_BYTES + SCORING_DATA_BYTES + self.weight_bytes + copy * self.copy_bytes + activations
