"""A model's tensors under GGUF's names, in llama.cpp's row order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from harness.export.architecture import Architecture

OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(model: Any, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """GGUF name and tensor of everything that is written, one at a time; a tied head is left out.

    A layer that is applied several times in a row is written as often: GGUF knows no sharing.

    Args:
        model: causal language model laid out like Llama.
        architecture: ``architecture_of(model)``.
    """
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and architecture.tied:
            continue
        if name in OUTER:
            yield OUTER[name], tensor
            continue
        _model, _layers, index, rest = name.split(".", 3)
        module, _, leaf = rest.rpartition(".")
        written = _layer_tensor(tensor, module, leaf, architecture)
        for repeat in range(architecture.layer_repeats):
            yield f"blk.{int(index) * architecture.layer_repeats + repeat}.{INNER[module]}.{leaf}", written
    if architecture.rope_factors is not None:
        yield "rope_freqs.weight", architecture.rope_factors


def rope_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a q or k projection (or its bias) [heads * head_dim, ...] for llama.cpp's rotary embedding.

    transformers turns row i of a head together with row i + head_dim / 2, llama.cpp's ``llama`` and ``deci`` turn rows
    2i and 2i + 1: row i goes to 2i, row i + head_dim / 2 to 2i + 1.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _layer_tensor(tensor: Tensor, module: str, leaf: str, architecture: Architecture) -> Tensor:
    head_dim = architecture.head_dim
    if 0 in tensor.shape:  # one unit of zeros where none is left
        unit = head_dim if module.startswith("self_attn") else 1
        return tensor.new_zeros([size or unit for size in tensor.shape])
    if module in ("self_attn.q_proj", "self_attn.k_proj"):
        assert leaf in ("weight", "bias")
        return rope_rows(tensor, head_dim)
    return tensor
