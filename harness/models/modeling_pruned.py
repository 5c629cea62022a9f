"""Pruned decoder models: stock transformers architectures whose layers differ in width, bias and residual basis.

Self-contained (torch and transformers only): it is copied into the folder of every saved model that a stock class
cannot express, so that the folder loads anywhere.

Layers with their own widths are described by transformers' ``per_layer_config`` schema. Beyond it, the configuration
knows ``o_proj_bias`` and ``down_proj_bias`` (biases that FLAP adds), ``residual_size`` / ``head_size`` (the residual
stream that SliceGPT cuts; ``hidden_size`` stays the width of the dense model, by which its norms go on dividing) and
``layer_repeats`` (MobileLLM-LS applies every block twice).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3Model

LAYER_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What ``per_layer_config`` gives every layer."""


class SlicedRMSNorm(nn.Module):
    """RMS norm of a sliced residual stream: no weight, the sum of squares divided by the dense model's width.

    Source: SliceGPT (arXiv:2401.15024), section 3.2: the deleted directions carry little of the norm, and the scale
    was fused into the next linear map.
    """

    def __init__(self, dense_size: int, eps: float) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise ``hidden`` [..., residual_size] in float32 at least; the input's dtype comes back."""
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = torch.rsqrt(x.square().sum(-1, keepdim=True) / self.dense_size + self.eps)
        return (x * scale).to(hidden.dtype)


class HeadlessMixer(nn.Module):
    """What is left of an attention block that lost every head: the bias of its output projection.

    (transformers looks for classes named ``*Attention*`` in this file to decide whether the attention
    implementation can be set; those of this file's models are the stock ones, and it can.)
    """

    q_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx = attention.layer_idx
        for name, part in attention.named_children():  # empty projections: the names of the weights stay
            setattr(self, name, part)

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        """The bias at every position, [batch, length, hidden]."""
        batch, length, _width = hidden_states.shape
        if past_key_values is not None:
            # The cache counts the tokens seen in layer 0: a layer without heads keeps one empty-handed head there.
            token = hidden_states.new_zeros(batch, 1, length, 1)
            past_key_values.update(token, token, self.layer_idx)
        # Through the empty projection, so that every parameter with elements is part of the graph.
        output: torch.Tensor = self.o_proj(self.q_proj(hidden_states))
        return output, None


class SlicedDecoderLayer(GradientCheckpointingLayer):
    """Decoder layer whose two shortcuts change the basis of the residual stream.

    Source: SliceGPT (arXiv:2401.15024), figure 4: x <- x S_attn + attn(norm x); x <- x S_mlp + mlp(norm x).
    """

    def __init__(self, layer: Any, config: PreTrainedConfig, output_size: int) -> None:
        super().__init__()
        size = config.residual_size
        self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.input_layernorm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_shortcut = nn.Linear(size, size, bias=False)
        self.mlp_shortcut = nn.Linear(size, output_size, bias=False)
        for name in ("q_proj", "k_proj", "v_proj"):
            _resize(self.self_attn, name, in_features=size)
        _resize(self.self_attn, "o_proj", out_features=size)
        for name in ("gate_proj", "up_proj"):
            _resize(self.mlp, name, in_features=size)
        _resize(self.mlp, "down_proj", out_features=output_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``hidden_states`` [batch, length, residual_size] -> [batch, length, output_size]."""
        attention: torch.Tensor
        attention, _weights = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + attention
        output: torch.Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        shortcut: torch.Tensor = self.mlp_shortcut(hidden_states)
        return shortcut + output


class RepeatCache:
    """The key-value cache as one repeat of a shared layer sees it: every repeat has keys and values of its own."""

    def __init__(self, cache: Any, num_repeats: int, repeat: int) -> None:
        self.cache = cache
        self.num_repeats = num_repeats
        self.repeat = repeat

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values at the place of this repeat; ``layer_idx`` counts the layers that have weights."""
        return self.cache.update(key, value, layer_idx * self.num_repeats + self.repeat, *args, **kwargs)


class RepeatedDecoderLayer(GradientCheckpointingLayer):
    """Decoder layer applied several times in a row with the same weights.

    Source: MobileLLM (arXiv:2402.14905), section 3.3: immediate block-wise weight sharing.
    """

    def __init__(self, layer: Any, num_repeats: int) -> None:
        super().__init__()
        self.num_repeats = num_repeats
        for name, part in layer.named_children():
            setattr(self, name, part)

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> torch.Tensor:
        """``hidden_states`` [batch, length, hidden] -> the same shape, after all repeats."""
        for repeat in range(self.num_repeats):
            cache = past_key_values
            if cache is not None:
                cache = RepeatCache(cache, self.num_repeats, repeat)
            attention: torch.Tensor
            attention, _weights = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states), past_key_values=cache, **kwargs
            )
            hidden_states = hidden_states + attention
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def _resize(
    parent: Any,
    name: str,
    *,
    in_features: int | None = None,
    out_features: int | None = None,
    bias: bool | None = None,
) -> None:
    """Replace a linear map by an uninitialised one of another size."""
    old: nn.Linear = getattr(parent, name)
    new = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear,
        old.in_features if in_features is None else in_features,
        old.out_features if out_features is None else out_features,
        bias=(old.bias is not None) if bias is None else bias,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    setattr(parent, name, new)


def _fit_layer(layer: Any, config: PreTrainedConfig, output_size: int) -> Any:
    """Give one stock decoder layer the widths and biases that its layer configuration states."""
    attention, mlp = layer.self_attn, layer.mlp
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.num_key_value_heads * config.head_dim
    _resize(attention, "q_proj", out_features=query_size)
    _resize(attention, "k_proj", out_features=key_size)
    _resize(attention, "v_proj", out_features=key_size)
    _resize(attention, "o_proj", in_features=query_size, bias=config.o_proj_bias)
    _resize(mlp, "gate_proj", out_features=config.intermediate_size)
    _resize(mlp, "up_proj", out_features=config.intermediate_size)
    _resize(mlp, "down_proj", in_features=config.intermediate_size, bias=config.down_proj_bias)
    mlp.intermediate_size = config.intermediate_size
    if config.residual_size is not None:
        layer = SlicedDecoderLayer(layer, config, output_size)
    if query_size == 0:
        layer.self_attn = HeadlessMixer(attention)
    return layer if config.layer_repeats == 1 else RepeatedDecoderLayer(layer, config.layer_repeats)


LAYER_CLASSES = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, SlicedDecoderLayer,
                 RepeatedDecoderLayer)  # fmt: skip


class PrunedConfigMixin(PreTrainedConfig):
    """What a pruned model's configuration says beyond its dense model's.

    Attributes:
        o_proj_bias: whether attention output projections have a bias.
        down_proj_bias: whether MLP output projections have a bias.
        residual_size: width of the sliced residual stream; None leaves it whole, with its weighted norms.
        head_size: width of the last layer's output, which the head reads; None is ``residual_size``.
        layer_repeats: times in a row that each layer is applied. ``num_hidden_layers`` and ``per_layer_config`` count
            every application, as caches do; the model has ``num_hidden_layers / layer_repeats`` layers with weights.
    """

    o_proj_bias: bool = False
    down_proj_bias: bool = False
    residual_size: int | None = None
    head_size: int | None = None
    layer_repeats: int = 1

    def validate_architecture(self) -> None:
        """Check that layers keep whole query groups, repeats are alike, and the residual stream only shrank.

        Raises:
            ValueError: naming the layer and its sizes.
        """
        dense = self.alike()
        group = dense.num_attention_heads // dense.num_key_value_heads
        for i, layer in enumerate(self.per_layer_config):
            if layer.num_attention_heads != group * layer.num_key_value_heads:
                raise ValueError(
                    f"layer {i} has {layer.num_attention_heads} query heads for {layer.num_key_value_heads} kv heads; "
                    f"every kv head of this model serves {group}"
                )
        self._validate_repeats()
        if self.residual_size is not None and not 0 < self.residual_size <= self.hidden_size:
            raise ValueError(f"residual_size {self.residual_size} is not in 1..{self.hidden_size}")

    def _validate_repeats(self) -> None:
        repeats = self.layer_repeats
        if repeats < 1 or self.num_hidden_layers % repeats:
            raise ValueError(f"{self.num_hidden_layers} layers cannot be blocks applied {repeats} times each")
        if repeats > 1 and self.residual_size is not None:
            raise ValueError("a layer that is repeated cannot change the basis of the residual stream")
        for i, layer in enumerate(self.per_layer_config):
            first = self.per_layer_config[i - i % repeats]
            if any(getattr(layer, name) != getattr(first, name) for name in LAYER_WIDTHS):
                raise ValueError(f"layers {i - i % repeats} and {i} share their weights but not their widths")

    def alike(self) -> PreTrainedConfig:
        """The configuration with every layer alike, from which stock classes build."""
        if not self.is_heterogeneous:
            return self
        config = copy.copy(self)
        config.per_layer_config = None
        return config


class PrunedModelMixin(PreTrainedModel):
    """A stock base model whose layers are fitted to ``per_layer_config``."""

    # A residual sum needs both its terms in one place: layers are placed on devices whole.
    _no_split_modules = [layer.__name__ for layer in LAYER_CLASSES]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": list(LAYER_CLASSES),
        "attentions": [LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention],
    }
    config: Any
    layers: Any

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.alike())
        config._attn_implementation = self.config._attn_implementation
        self.config = config
        last = config.num_hidden_layers // config.layer_repeats - 1
        self.layers = self.layers[: last + 1]
        for i, layer in enumerate(self.layers):
            output_size = (config.head_size if i == last else None) or config.residual_size
            self.layers[i] = _fit_layer(layer, config.per_layer_config[i * config.layer_repeats], output_size)
            # One configuration for all: set_attn_implementation changes it, and every layer must see that.
            self.layers[i].self_attn.config = config
        if config.residual_size is not None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.residual_size, self.padding_idx)
            self.norm = SlicedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


class PrunedForCausalLMMixin(PreTrainedModel):
    """A stock causal language model around a pruned base model."""

    config: Any
    pruned_model_class: type[PrunedModelMixin]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.alike())
        config._attn_implementation = self.config._attn_implementation
        self.config = config
        self.model = self.pruned_model_class(config)
        if config.residual_size is not None:
            self.lm_head = nn.Linear(config.head_size or config.residual_size, config.vocab_size, bias=False)
        self.post_init()


@strict
class PrunedLlamaConfig(PrunedConfigMixin, LlamaConfig):
    """Configuration of a pruned Llama."""

    model_type = "pruned_llama"


class PrunedLlamaModel(PrunedModelMixin, LlamaModel):
    """A pruned Llama without its head."""

    config_class = PrunedLlamaConfig


class PrunedLlamaForCausalLM(PrunedForCausalLMMixin, LlamaForCausalLM):
    """A pruned Llama."""

    config_class = PrunedLlamaConfig
    pruned_model_class = PrunedLlamaModel


@strict
class PrunedMistralConfig(PrunedConfigMixin, MistralConfig):
    """Configuration of a pruned Mistral."""

    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedModelMixin, MistralModel):
    """A pruned Mistral without its head."""

    config_class = PrunedMistralConfig


class PrunedMistralForCausalLM(PrunedForCausalLMMixin, MistralForCausalLM):
    """A pruned Mistral."""

    config_class = PrunedMistralConfig
    pruned_model_class = PrunedMistralModel


@strict
class PrunedQwen2Config(PrunedConfigMixin, Qwen2Config):
    """Configuration of a pruned Qwen2."""

    model_type = "pruned_qwen2"


class PrunedQwen2Model(PrunedModelMixin, Qwen2Model):
    """A pruned Qwen2 without its head."""

    config_class = PrunedQwen2Config


class PrunedQwen2ForCausalLM(PrunedForCausalLMMixin, Qwen2ForCausalLM):
    """A pruned Qwen2."""

    config_class = PrunedQwen2Config
    pruned_model_class = PrunedQwen2Model


@strict
class PrunedQwen3Config(PrunedConfigMixin, Qwen3Config):
    """Configuration of a pruned Qwen3."""

    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedModelMixin, Qwen3Model):
    """A pruned Qwen3 without its head."""

    config_class = PrunedQwen3Config


class PrunedQwen3ForCausalLM(PrunedForCausalLMMixin, Qwen3ForCausalLM):
    """A pruned Qwen3."""

    config_class = PrunedQwen3Config
    pruned_model_class = PrunedQwen3Model
