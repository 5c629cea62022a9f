"""The real model's multi-head twin and the held-out loss that the golden figures were measured with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.models import LoadedModel, assemble

FOLDER = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_tokens() -> Callable[[str, int, int], Tensor]:
    """First rows and columns of the fixed token ids: ``golden_tokens("calibration", 10, 64)``."""

    def read(name: str, rows: int, columns: int) -> Tensor:
        return torch.from_numpy(np.load(FOLDER / f"{name}_tokens.npy")[:rows, :columns]).long()

    return read


@pytest.fixture(scope="session")
def heldout_loss(golden_tokens: Callable[[str, int, int], Tensor]) -> Callable[[Any], float]:
    """Mean loss over two batches of eight held-out sequences of 256 tokens."""
    batches = golden_tokens("heldout", 16, 256).split(8)

    @torch.inference_mode()
    def loss(model: Any) -> float:
        return float(np.mean([float(model(rows, labels=rows).loss) for rows in batches]))

    return loss


@pytest.fixture(scope="session")
def multi_head_twin() -> Callable[[LoadedModel], LoadedModel]:
    """The same function with every kv head repeated for each of its query heads."""

    def expand(loaded: LoadedModel) -> LoadedModel:
        config = copy.deepcopy(loaded.model.config)
        repeats, size = loaded.structure.query_group_size, loaded.structure.head_dim
        config.num_key_value_heads = config.num_attention_heads
        state = {
            name: weight.unflatten(0, (-1, size)).repeat_interleave(repeats, 0).flatten(0, 1)
            if "k_proj" in name or "v_proj" in name
            else weight
            for name, weight in loaded.model.named_parameters()
        }
        return LoadedModel(assemble(config, state), loaded.tokenizer, "multi-head twin")

    return expand
