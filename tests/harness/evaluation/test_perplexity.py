"""Perplexity equals a per-token loop, by the convention its docstring states."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from harness.corpora import Corpus
from harness.errors import UserError
from harness.evaluation.forest_pass import NonFiniteOutputError
from harness.evaluation.perplexity import heldout_tokens, measure_perplexity
from harness.models import LoadedModel

TEXT = Corpus("text", ("The cat sat on the mat.", "It was a fine, warm mat; the cat purred.", "Nobody came."))


def looped(model: nn.Module, tokens: torch.Tensor, length: int) -> list[float]:
    """Losses of all tokens but the first of each window, one forward pass per token."""
    losses = []
    for start in range(0, len(tokens), length):
        window = tokens[start : start + length]
        for i in range(1, len(window)):
            logits = model(window[:i][None]).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[window[i]]))
    return losses


@pytest.mark.parametrize(("num_tokens", "batch_tokens"), [(40, 16), (43, 1), (41, 1000)])
def test_it_equals_a_loop_over_tokens(
    tiny: LoadedModel, letters: PreTrainedTokenizerFast, num_tokens: int, batch_tokens: int
) -> None:
    tokens = heldout_tokens(TEXT, letters, num_tokens)
    losses = looped(tiny.model, tokens, 8)
    found = measure_perplexity(tiny.model, letters, TEXT, num_tokens=num_tokens, length=8, batch_tokens=batch_tokens)
    mean = sum(losses) / len(losses)
    num_words = len(letters.decode(tokens).split())
    assert found.num_scored == len(losses)
    assert found.token == pytest.approx(math.exp(mean), rel=1e-9)
    assert found.word == pytest.approx(math.exp(mean * num_tokens / num_words), rel=1e-9)


def test_passages_are_joined_by_blank_lines(letters: PreTrainedTokenizerFast) -> None:
    tokens = heldout_tokens(Corpus("two", ("ab", "cd")), letters, 4)
    assert letters.convert_ids_to_tokens(tokens.tolist())[:2] == ["a", "b"]


def test_the_standard_error_is_that_of_the_mean_over_equal_windows(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model = make_tiny("tied").model
    losses = torch.tensor(looped(model, heldout_tokens(TEXT, letters, 40), 8)).view(5, 7).mean(dim=1)
    found = measure_perplexity(model, letters, TEXT, num_tokens=40, length=8, batch_tokens=64)
    assert found.loss_stderr == pytest.approx(float(losses.std(unbiased=True)) / 5**0.5, rel=1e-5)


def test_too_little_text_is_refused(make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"'text' has \d+ tokens, not 5,000; ask for fewer"):
        measure_perplexity(make_tiny("tied").model, letters, TEXT, num_tokens=5000, length=8, batch_tokens=64)


def test_a_broken_layer_is_named(make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast) -> None:
    model = make_tiny("tied").model
    model.model.layers[2].input_layernorm.weight[0] = float("inf")
    with pytest.raises(NonFiniteOutputError, match=r"'model\.layers\.2\.input_layernorm'"):
        measure_perplexity(model, letters, TEXT, num_tokens=16, length=8, batch_tokens=64)


def test_a_head_that_is_not_linear_works_too(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model = make_tiny("multi-head").model
    plain = measure_perplexity(model, letters, TEXT, num_tokens=32, length=8, batch_tokens=64)
    model.lm_head = nn.Sequential(model.lm_head)
    wrapped = measure_perplexity(model, letters, TEXT, num_tokens=32, length=8, batch_tokens=64)
    assert wrapped.token == pytest.approx(plain.token, rel=1e-5)
