"""Which of llama.cpp's architectures computes what a model computes, and what it must be told.

``llama`` is for layers that are all alike. ``deci`` is the same network with the number of heads, of kv heads and the
feed-forward length given layer by layer. Both read optional biases of every projection.

Facts checked in llama.cpp's source, as bundled with llama-cpp-python 0.3.36: in ``deci`` a layer of no heads skips its
attention together with its output bias, a layer of feed-forward length 0 drops what its attention gave, and the head
dimension is ignored where layer 0 has no heads. So a part that lost all its units is written with one unit of zero
weights: the same function, in every case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError

STATIC_ROPE = ("default", "linear", "llama3")
"""Rope types whose frequencies depend on nothing but the configuration, and whose attention is not rescaled."""


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file says of a model besides its tensors."""

    num_heads: tuple[int, ...]
    """Query heads of every layer, at least 1."""
    num_kv_heads: tuple[int, ...]
    """kv heads of every layer, at least 1."""
    feed_forward_lengths: tuple[int, ...]
    """MLP channels of every layer, at least 1."""
    hidden_size: int
    head_dim: int
    vocab_size: int
    context_length: int
    """Longest context in which llama.cpp computes the same: shorter than the model's where it has a sliding window."""
    norm_eps: float
    rope_theta: float
    rope_factors: Tensor | None
    """By which the plain rotary frequencies are divided, float32 [head_dim / 2]; None where they are all 1."""
    layer_repeats: int
    """Times in a row that the model applies each of its layers; the file holds one layer an application."""
    tied: bool
    """Whether the head is the embedding, and so not in the file."""

    @property
    def name(self) -> str:
        """``llama`` or ``deci``."""
        per_layer = zip(self.num_heads, self.num_kv_heads, self.feed_forward_lengths, strict=True)
        return "llama" if len(set(per_layer)) == 1 else "deci"


def architecture_of(model: Any) -> Architecture:
    """Read the architecture off a model's modules and configuration.

    Raises:
        UserError: llama.cpp has no architecture that computes what this model computes.
    """
    config = model.config
    reason = why_not_expressible(config)
    if reason is not None:
        raise UserError(f"this model cannot be written as GGUF: {reason}; it loads with transformers")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    repeats = int(getattr(config, "layer_repeats", 1))
    layers = [layer for layer in model.model.layers for _ in range(repeats)]
    windows = [w for w in (config.max_position_embeddings, _sliding_window(config)) if w is not None]
    return Architecture(
        num_heads=tuple(max(1, layer.self_attn.o_proj.in_features // head_dim) for layer in layers),
        num_kv_heads=tuple(max(1, layer.self_attn.k_proj.out_features // head_dim) for layer in layers),
        feed_forward_lengths=tuple(max(1, layer.mlp.down_proj.in_features) for layer in layers),
        hidden_size=int(config.hidden_size),
        head_dim=head_dim,
        vocab_size=int(model.get_input_embeddings().num_embeddings),
        context_length=min(windows),
        norm_eps=float(config.rms_norm_eps),
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_factors=_rope_factors(model, head_dim),
        layer_repeats=repeats,
        tied=bool(config.tie_word_embeddings),
    )


def why_not_expressible(config: Any) -> str | None:
    """Why neither of the two architectures computes this model, in a sentence; None where one does."""
    if getattr(config, "residual_size", None) is not None:
        return (
            "SliceGPT's rotations on the shortcuts and its sliced residual stream have no place in llama.cpp's models"
        )
    if config.model_type.endswith("qwen3"):
        return "Qwen3's norms of queries and keys are in neither of llama.cpp's llama and deci architectures"
    if config.hidden_act != "silu":
        return f"its MLP's activation is {config.hidden_act!r}, llama.cpp's is silu"
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type not in STATIC_ROPE:
        return f"its rope type is {rope_type!r}, and {', '.join(STATIC_ROPE)} can be written"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it turns only a part of every head, and llama.cpp's models turn all of it"
    return None


def _sliding_window(config: Any) -> int | None:
    # Mistral's window holds in every layer; Qwen2's only where use_sliding_window asks for it.
    if not getattr(config, "use_sliding_window", True):
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _rope_factors(model: Any, head_dim: int) -> Tensor | None:
    scaled: Tensor = model.model.rotary_emb.inv_freq.detach().to("cpu", torch.float64)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = float(model.config.rope_parameters["rope_theta"]) ** -exponents
    factors = plain / scaled
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):  # the model's frequencies are float32
        return None
    return factors.float()
