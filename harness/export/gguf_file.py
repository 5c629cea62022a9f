"""Writes a model as one GGUF file, whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from harness.durable import disk_errors, remove
from harness.errors import UserError
from harness.export.architecture import Architecture, architecture_of
from harness.export.tensors import gguf_tensors
from harness.export.tokenizer import GgufVocabulary, gguf_vocabulary
from harness.models.saving import require_new

PRECISIONS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
"""Of the matrices; norms, biases and rotary factors are always float32."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    architecture: str
    """llama.cpp's name of it: ``llama`` or ``deci``."""
    num_bytes: int
    num_float16: int
    """Matrices that had to stay float16 in a Q8_0 file, their rows being no multiple of 32 long."""


def export_gguf(model: Any, tokenizer: Any, out: Path, *, name: str, precision: str = "float16") -> Exported:
    """Write a model and its tokenizer for llama.cpp.

    Args:
        model: stock or pruned causal language model, in any dtype.
        tokenizer: its own.
        out: the file; must not exist.
        name: the model's, for people.
        precision: a key of ``PRECISIONS``.

    Raises:
        UserError: llama.cpp cannot run this model or tokenizer, ``out`` exists, or the disk refuses.
    """
    require_new(out)
    architecture = architecture_of(model)
    vocabulary = gguf_vocabulary(tokenizer, architecture.vocab_size)
    fresh = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            num_float16 = _write(fresh, model, architecture, vocabulary, name, precision)
            fresh.replace(out)
        except BaseException:
            remove(fresh)
            raise
    return Exported(out, architecture.name, out.stat().st_size, num_float16)


def _write(
    path: Path, model: Any, architecture: Architecture, vocabulary: GgufVocabulary, name: str, precision: str
) -> int:
    wanted, file_type = PRECISIONS[precision]
    writer = GGUFWriter(path, architecture.name)
    writer.add_name(name)
    writer.add_file_type(file_type)
    if wanted is GGMLQuantizationType.Q8_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, architecture)
    _add_vocabulary(writer, vocabulary)
    kinds: list[GGMLQuantizationType] = []
    for tensor_name, tensor in gguf_tensors(model, architecture):
        kind = _kind(tensor, wanted)
        kinds.append(kind)
        num_bytes = _num_bytes(tensor, kind)
        writer.add_tensor_info(tensor_name, tuple(tensor.shape), np.dtype(np.float32), num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (tensor_name, tensor), kind in zip(gguf_tensors(model, architecture), kinds, strict=True):
            _append(writer, _encoded(tensor_name, tensor, kind))
    finally:
        writer.close()
    return kinds.count(GGMLQuantizationType.F16) if wanted is GGMLQuantizationType.Q8_0 else 0


def _append(writer: GGUFWriter, values: np.ndarray[Any, Any]) -> None:
    try:
        writer.write_tensor_data(values)
    except OSError as error:
        if error.errno is None:  # numpy says how much of an array was written, not why the rest was not: no room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _add_architecture(writer: GGUFWriter, architecture: Architecture) -> None:
    writer.add_block_count(len(architecture.num_heads))
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_rope_dimension_count(architecture.head_dim)
    # Said outright: llama.cpp would divide the hidden size by the heads of layer 0, some of which may have left.
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    per_layer: list[tuple[Callable[..., None], tuple[int, ...]]] = [
        (writer.add_head_count, architecture.num_heads),
        (writer.add_head_count_kv, architecture.num_kv_heads),
        (writer.add_feed_forward_length, architecture.feed_forward_lengths),
    ]
    for add, values in per_layer:
        add(values[0] if architecture.name == "llama" else list(values))


def _add_vocabulary(writer: GGUFWriter, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for special, i in vocabulary.special_ids.items():
        add_id[special](i)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _kind(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    block, _bytes = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F16


def _num_bytes(tensor: Tensor, kind: GGMLQuantizationType) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return tensor.numel() // int(block) * int(block_bytes)


def _encoded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind is GGMLQuantizationType.F32:
        return values
    with np.errstate(over="ignore"):
        encoded: np.ndarray[Any, Any] = gguf.quants.quantize(values, kind)
    if kind is GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise UserError(f"{name} has values that float16 cannot hold; export with --precision float32")
    return encoded
