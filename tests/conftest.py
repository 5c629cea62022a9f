"""Tiny random models in every shape that matters, and the real embedded model, loaded once."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    logging,
)

from harness.models import LoadedModel, load_model
from harness.models.modeling_pruned import PrunedLlamaConfig
from harness.records import ModelRef

# Two workers of pytest-xdist share two cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
logging.set_verbosity_error()
logging.disable_progress_bar()

COMMON = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 8}
TINY: dict[str, Any] = {
    "grouped-query": LlamaConfig(**COMMON, num_attention_heads=6, num_key_value_heads=2),
    "multi-head": LlamaConfig(**COMMON, num_attention_heads=4, num_key_value_heads=4),
    "tied": LlamaConfig(**COMMON, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True),
    "biased": LlamaConfig(**COMMON, num_attention_heads=6, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**COMMON, num_attention_heads=6, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**COMMON, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, num_attention_heads=6, num_key_value_heads=2),
    "shared-layers": PrunedLlamaConfig(
        **(COMMON | {"num_hidden_layers": 6}),
        num_attention_heads=6,
        num_key_value_heads=2,
        layer_repeats=2,
        tie_word_embeddings=True,
    ),
}


def tiny_model(shape: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model whose weights are large enough for its units to differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TINY[shape])).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if "embed" in name else 0.15)
    return model.requires_grad_(False)


@pytest.fixture(params=sorted(TINY.keys() - {"shared-layers"}))
def tiny(request: pytest.FixtureRequest) -> LoadedModel:
    """Each tiny model whose layers are applied once, in float64, without a tokenizer."""
    return LoadedModel(model=tiny_model(request.param), tokenizer=None, weights_sha256=request.param)


@pytest.fixture(params=sorted(TINY))
def any_tiny(request: pytest.FixtureRequest) -> LoadedModel:
    """Each tiny model, that of layers applied twice included; a module's own ``tiny`` takes it where all are meant."""
    return LoadedModel(model=tiny_model(request.param), tokenizer=None, weights_sha256=request.param)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., LoadedModel]:
    """A tiny model by its shape: ``make_tiny("grouped-query", torch.float32)``."""

    def make(shape: str, dtype: torch.dtype = torch.float64) -> LoadedModel:
        return LoadedModel(model=tiny_model(shape, dtype), tokenizer=None, weights_sha256=shape)

    return make


@pytest.fixture
def run_script() -> Callable[..., None]:
    """Runs a file and its arguments in a process of its own, or in several that train together."""

    def run(script: Path, *arguments: object, processes: int = 1) -> None:
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(several if processes > 1 else []), str(script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def calibration() -> torch.Tensor:
    """Token ids for the tiny models, [6, 16]."""
    return torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, smollm2: LoadedModel) -> Path:
    """A random model with the embedded model's vocabulary, as a folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=48, intermediate_size=96, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real embedded model in float32."""
    return load_model(ModelRef(name="smollm2-135m"))
