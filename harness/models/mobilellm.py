"""MobileLLM checkpoints as the hub has them, read onto the Llama architecture without their modelling file.

They declare ``model_type: mobilellm``. Beyond Llama's, their configuration knows ``share_embedding`` (the head is the
embedding; no head is stored, whatever ``tie_word_embeddings`` says) and ``layer_sharing`` (each of the
``num_hidden_layers`` stored blocks is applied twice in a row: the LS variants).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from harness.models.assemble import assemble, pruned_form, without_weights
from harness.models.checkpoint import check_weights, parameter_shapes, stored_tensors

MODEL_TYPE = "mobilellm"

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "share_embedding": True,
    "layer_sharing": False,
}
"""What a key means that ``config.json`` leaves out, where that is not Llama's default."""

NOT_LLAMA = ("model_type", "architectures", "auto_map", "share_embedding", "layer_sharing", "tie_word_embeddings",
             "torch_dtype", "dtype", "transformers_version")  # fmt: skip


def llama_config(values: Mapping[str, Any]) -> LlamaConfig:
    """The Llama configuration of a MobileLLM one; ``layer_repeats`` is 2 where layers are shared.

    Args:
        values: content of ``config.json``.

    Raises:
        ValueError: sizes that do not fit together.
    """
    known = {**DEFAULTS, **values}
    llama = {key: value for key, value in known.items() if key not in NOT_LLAMA}
    repeats = 2 if known["layer_sharing"] else 1
    # Every application of a block keeps keys and values of its own, so caches must count each of them.
    llama["num_hidden_layers"] = known["num_hidden_layers"] * repeats
    return LlamaConfig(**llama, tie_word_embeddings=bool(known["share_embedding"]), layer_repeats=repeats)


def load_mobilellm(folder: Path, values: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder in the hub's layout.

    Args:
        folder: holds safetensors weights.
        values: content of its ``config.json``.
        dtype: of the weights in memory.

    Raises:
        UserError: the weights are not those that the configuration describes.
    """
    config = llama_config(values)
    shapes = parameter_shapes(without_weights(pruned_form(config)))
    check_weights(folder, shapes)
    state = {name: tensor.read().to(dtype) for name, tensor in stored_tensors(folder).items() if name in shapes}
    return assemble(config, state)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The checkpoint's sentencepiece tokenizer, id for id what the published slow one gives.

    transformers' own LlamaTokenizer adds no space before a text that begins with one, and rebuilds itself that way when
    it is loaded; so the same vocabulary and merges go into a plain fast tokenizer, which keeps what it is given.
    """
    llama = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
    backend = llama.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    backend.post_processor = TemplateProcessing(
        single=f"{llama.bos_token} $A",
        pair=f"{llama.bos_token} $A {llama.bos_token} $B",
        special_tokens=[(llama.bos_token, llama.bos_token_id)],
    )
    special = {name: getattr(llama, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=llama.model_max_length, **special
    )
