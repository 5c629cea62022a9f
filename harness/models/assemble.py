"""A model from weights alone: the tensors' shapes say what the configuration must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from harness.errors import UserError
from harness.models.registration import PRUNED_CLASSES


def assemble(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The causal language model that holds exactly the tensors of ``state``.

    Where every layer is alike and nothing was added, it is a stock transformers model, else a pruned one.

    Args:
        config: of the model the tensors come from (stock or pruned), for everything that shapes do not say.
        state: parameters by name, tied ones once; adopted, not copied. Without ``lm_head.weight`` the head is tied.
    """
    config = _config_for(config, state)
    model = without_weights(config)
    _replace_rotary_buffers(model, config)
    parameters = {name: torch.nn.Parameter(tensor.detach()) for name, tensor in state.items()}
    if config.tie_word_embeddings:
        parameters["lm_head.weight"] = parameters["model.embed_tokens.weight"]
    model.load_state_dict(parameters, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes, and nothing allocated."""
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = model_class(config)(config)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def pruned_form(config: PreTrainedConfig) -> PreTrainedConfig:
    """The pruned configuration that says the same as a stock one."""
    pruned_config, _ = PRUNED_CLASSES[stock_config_class(config)]
    values = config.to_dict()
    values.pop("model_type", None)
    biased = {"o_proj_bias": bool(values.get("attention_bias")), "down_proj_bias": bool(values.get("mlp_bias"))}
    return pruned_config(**{**biased, **values})


def stock_config_class(config: PreTrainedConfig) -> type[Any]:
    """The stock configuration class whose pruned form can hold this model's weights.

    Raises:
        UserError: there is none.
    """
    for stock, (pruned_config, _) in PRUNED_CLASSES.items():
        if type(config) in (stock, pruned_config):
            return stock
    names = ", ".join(c.model_type for c in PRUNED_CLASSES)
    raise UserError(f"models of type {config.model_type!r} cannot be rebuilt at other widths; supported: {names}")


def _config_for(config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedConfig:
    stock = stock_config_class(config)
    values = (config.alike() if hasattr(config, "alike") else config).to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "o_proj_bias", "down_proj_bias",
                "residual_size", "head_size"):  # fmt: skip
        values.pop(key, None)
    repeats = values.pop("layer_repeats", 1)
    # Said outright: hidden_size / heads is no longer head_dim once heads have left.
    values["head_dim"] = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    values["tie_word_embeddings"] = "lm_head.weight" not in state
    group_size = values["num_attention_heads"] // values["num_key_value_heads"]
    applied = range(values["num_hidden_layers"])
    widths = [_layer_widths(state, i // repeats, values["head_dim"], group_size) for i in applied]
    added = _added(state) | {"layer_repeats": repeats}
    plain = _plain_config(stock, values, widths) if _is_stock(values, state, added) else None
    if plain is not None:
        return plain
    return PRUNED_CLASSES[stock][0](**values, **added, per_layer_config=dict(enumerate(widths)))


def _plain_config(stock: type[Any], values: dict[str, Any], widths: list[dict[str, int]]) -> PreTrainedConfig | None:
    """The stock configuration for layers that are all alike; None where they are not, or where it refuses them."""
    width = widths[0]
    if any(other != width for other in widths) or 0 in width.values():
        return None
    try:
        return stock(**{**values, **width})
    except (ValueError, StrictDataclassError):  # LlamaConfig wants hidden_size to be a multiple of the number of heads
        return None


def _added(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a pruned configuration says beyond widths."""
    sliced = "model.layers.0.attn_shortcut.weight" in state
    return {
        "o_proj_bias": "model.layers.0.self_attn.o_proj.bias" in state,
        "down_proj_bias": "model.layers.0.mlp.down_proj.bias" in state,
        "residual_size": state["model.embed_tokens.weight"].shape[1] if sliced else None,
        "head_size": state["lm_head.weight"].shape[1] if sliced else None,
    }


def _is_stock(values: dict[str, Any], state: Mapping[str, Tensor], added: dict[str, Any]) -> bool:
    """Whether the stock class has exactly these biases and a whole residual stream."""
    query_bias = "model.layers.0.self_attn.q_proj.bias" in state
    # Llama's and Qwen3's attention_bias covers all four projections; Qwen2 has biases on q, k and v alone, always.
    stock_o_bias = query_bias and bool(values.get("attention_bias"))
    return (
        added["residual_size"] is None
        and added["layer_repeats"] == 1
        and added["o_proj_bias"] == stock_o_bias
        and added["down_proj_bias"] == bool(values.get("mlp_bias"))
    )


def _layer_widths(state: Mapping[str, Tensor], layer: int, head_dim: int, group_size: int) -> dict[str, int]:
    prefix = f"model.layers.{layer}"
    query_size = state[f"{prefix}.self_attn.o_proj.weight"].shape[1]
    return {
        "num_attention_heads": query_size // head_dim,
        "num_key_value_heads": query_size // head_dim // group_size,
        "intermediate_size": state[f"{prefix}.mlp.down_proj.weight"].shape[1],
    }


def model_class(config: PreTrainedConfig) -> type[Any]:
    """The causal language model class of a configuration, stock or pruned.

    Raises:
        UserError: transformers has none.
    """
    from transformers import AutoModelForCausalLM

    for pruned_config, pruned_model in PRUNED_CLASSES.values():
        if type(config) is pruned_config:
            return pruned_model
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"models of type {config.model_type!r} are no causal language models; pass one that is")
    stock: type[Any] = AutoModelForCausalLM._model_mapping[type(config)]
    return stock


def _replace_rotary_buffers(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    # Rotary frequencies are no parameters: they are computed from the configuration, which the meta device skipped.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config.alike() if hasattr(config, "alike") else config)
