"""bfloat16 weights with a float32 stream between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.evaluation.precision import float32_stream
from harness.models import LoadedModel

TOKENS = torch.arange(1, 41).view(2, 20)


def states(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.base_model(TOKENS, use_cache=False).last_hidden_state


@pytest.mark.parametrize("shape", ["grouped-query", "biased", "qwen2", "qwen3"])
def test_the_stream_is_float32_and_nearer_to_a_float32_model(make_tiny: Callable[..., LoadedModel], shape: str) -> None:
    rounded = make_tiny(shape, torch.bfloat16).model
    exact = states(make_tiny(shape, torch.bfloat16).model.float())  # the same rounded weights
    plain = states(rounded)
    with float32_stream(rounded), torch.no_grad():
        mixed = states(rounded)
        assert rounded(TOKENS).logits.dtype == torch.bfloat16
    assert (plain.dtype, mixed.dtype) == (torch.bfloat16, torch.float32)
    assert (mixed - exact).abs().mean() < (plain.float() - exact).abs().mean()
    assert torch.equal(states(rounded), plain)  # all is put back
    assert rounded.dtype == torch.bfloat16


def test_other_precisions_are_left_alone(make_tiny: Callable[..., LoadedModel]) -> None:
    model = make_tiny("tied", torch.float32).model
    before = states(model)
    with float32_stream(model):
        assert torch.equal(states(model), before)
