"""Makes transformers' Auto classes know the pruned model types in this process."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from harness.models import modeling_pruned as pruned

# Stock configuration -> configuration and model of its pruned form.
PRUNED_CLASSES: dict[type[Any], tuple[type[Any], type[Any]]] = {
    LlamaConfig: (pruned.PrunedLlamaConfig, pruned.PrunedLlamaForCausalLM),
    MistralConfig: (pruned.PrunedMistralConfig, pruned.PrunedMistralForCausalLM),
    Qwen2Config: (pruned.PrunedQwen2Config, pruned.PrunedQwen2ForCausalLM),
    Qwen3Config: (pruned.PrunedQwen3Config, pruned.PrunedQwen3ForCausalLM),
}

for _config_class, _model_class in PRUNED_CLASSES.values():
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)
