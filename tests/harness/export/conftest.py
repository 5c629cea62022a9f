"""An independent reading of GGUF files: llama.cpp's llama and deci networks in plain torch, and tiny tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def read_metadata(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor, dequantised, in float64."""
    return {
        t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).double().reshape(*reversed(t.shape.tolist()))
        for t in GGUFReader(path).tensors
    }


def run_gguf(path: Path, tokens_T: Tensor) -> Tensor:
    """Logits [T, vocabulary] of a file, computed from nothing but the file, in float64."""
    meta, tensors = read_metadata(path), read_tensors(path)
    arch = meta["general.architecture"]

    def number(key: str, layer: int) -> int:
        value = meta[f"{arch}.{key}"]
        return int(value[layer] if arch == "deci" else value)

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + meta[f"{arch}.attention.layer_norm_rms_epsilon"]).rsqrt()
        return x * scale * tensors[f"{name}.weight"]

    size = meta[f"{arch}.attention.key_length"]
    assert size == meta[f"{arch}.attention.value_length"] == meta[f"{arch}.rope.dimension_count"]
    frequencies = meta[f"{arch}.rope.freq_base"] ** (-torch.arange(0, size, 2).double() / size)
    frequencies = frequencies / tensors.get("rope_freqs.weight", torch.ones(size // 2).double())
    angles = torch.arange(len(tokens_T)).double()[:, None, None] * frequencies

    def turn(x: Tensor) -> Tensor:
        """Neighbouring numbers of a head are one complex number."""
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    x = tensors["token_embd.weight"][tokens_T]
    future = torch.ones(len(tokens_T), len(tokens_T)).triu(1).bool()
    for i in range(meta[f"{arch}.block_count"]):
        heads, kv_heads = number("attention.head_count", i), number("attention.head_count_kv", i)
        assert tensors[f"blk.{i}.ffn_up.weight"].shape[0] == number("feed_forward_length", i) > 0
        y = norm(f"blk.{i}.attn_norm", x)
        q = turn(linear(f"blk.{i}.attn_q", y).unflatten(-1, (heads, size)))
        k = turn(linear(f"blk.{i}.attn_k", y).unflatten(-1, (kv_heads, size)))
        v = linear(f"blk.{i}.attn_v", y).unflatten(-1, (kv_heads, size))
        k, v = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + linear(f"blk.{i}.attn_output", torch.einsum("hts,shd->thd", weights, v).flatten(1))
        y = norm(f"blk.{i}.ffn_norm", x)
        gated = torch.nn.functional.silu(linear(f"blk.{i}.ffn_gate", y)) * linear(f"blk.{i}.ffn_up", y)
        x = x + linear(f"blk.{i}.ffn_down", gated)
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return norm("output_norm", x) @ head.T


def byte_level_tokenizer(pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    """A few words' worth of byte-level BPE with a beginning and an end token."""
    characters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'ĠĊ"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("Ġ", "an"), ("i", "n")]
    vocabulary = {token: i for i, token in enumerate([*characters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """The same in sentencepiece's manner, with byte tokens for what has none."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = [*"▁abcdefghijklmnopqrstuvwxyz"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n"), ("▁a", "n")]
    vocabulary = {token: i for i, token in enumerate([*pieces, *(a + b for a, b in merges), *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


@pytest.fixture(scope="session")
def gguf() -> Any:
    """Readers of GGUF files: ``gguf.metadata(path)``, ``gguf.tensors(path)``, ``gguf.run(path, tokens)``."""

    class Readers:
        metadata = staticmethod(read_metadata)
        tensors = staticmethod(read_tensors)
        run = staticmethod(run_gguf)

    return Readers


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``tiny_tokenizer("bytes")``, optionally with a pre-tokenizer, or ``tiny_tokenizer("sentencepiece")``."""

    def make(kind: str = "bytes", pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
        return byte_level_tokenizer(pre_tokenizer) if kind == "bytes" else sentencepiece_tokenizer()

    return make
