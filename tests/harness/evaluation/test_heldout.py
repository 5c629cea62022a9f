"""Perplexity and divergence equal per-token loops, by the conventions their docstrings state."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from harness.corpora import Corpus
from harness.errors import UserError
from harness.evaluation import reference as reference_module
from harness.evaluation.forest_pass import NonFiniteOutputError
from harness.evaluation.heldout import measure_heldout
from harness.evaluation.heldout_text import HeldOutText
from harness.evaluation.reference import Dense, DenseReference, dense_reference
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


def text_of(tokenizer: PreTrainedTokenizerFast, num_tokens: int, corpus: Corpus = TEXT) -> HeldOutText:
    return HeldOutText.of(corpus, tokenizer, num_tokens, length=8)


@pytest.mark.parametrize(("num_tokens", "batch_tokens"), [(40, 16), (43, 1), (41, 1000)])
def test_it_equals_a_loop_over_tokens(
    tiny: LoadedModel, letters: PreTrainedTokenizerFast, num_tokens: int, batch_tokens: int
) -> None:
    text = text_of(letters, num_tokens)
    losses = looped(tiny.model, text.tokens, 8)
    found = measure_heldout(tiny.model, text, batch_tokens=batch_tokens)
    mean = sum(losses) / len(losses)
    num_words = len(letters.decode(text.tokens).split())
    assert found.num_scored == len(losses)
    assert found.ppl_token == pytest.approx(math.exp(mean), rel=1e-9)
    assert found.ppl_word == pytest.approx(math.exp(mean * num_tokens / num_words), rel=1e-9)
    assert found.kl_dense is None


def test_passages_are_joined_by_blank_lines(letters: PreTrainedTokenizerFast) -> None:
    text = text_of(letters, 4, Corpus("two", ("ab", "cd")))
    assert letters.convert_ids_to_tokens(text.tokens.tolist())[:2] == ["a", "b"]


def test_the_standard_error_is_that_of_the_mean_over_equal_windows(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model, text = make_tiny("tied").model, text_of(letters, 40)
    losses = torch.tensor(looped(model, text.tokens, 8)).view(5, 7).mean(dim=1)
    found = measure_heldout(model, text, batch_tokens=64)
    assert found.loss.stderr == pytest.approx(float(losses.std(unbiased=True)) / 5**0.5, rel=1e-5)


def test_too_little_text_is_refused(letters: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"'text' has \d+ tokens, not 5,000; ask for fewer"):
        text_of(letters, 5000)


def test_a_broken_layer_is_named(make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast) -> None:
    model = make_tiny("tied").model
    model.model.layers[2].input_layernorm.weight[0] = float("inf")
    with pytest.raises(NonFiniteOutputError, match=r"'model\.layers\.2\.input_layernorm'"):
        measure_heldout(model, text_of(letters, 16), batch_tokens=64)


def test_a_head_that_is_not_linear_works_too_but_has_no_divergence(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model, text = make_tiny("multi-head").model, text_of(letters, 32)
    reference = dense_reference(Dense(make_tiny("multi-head").model, "w"), text, 16)
    assert isinstance(reference, DenseReference)
    plain = measure_heldout(model, text, batch_tokens=64, reference=reference)
    model.lm_head = nn.Sequential(model.lm_head)
    wrapped = measure_heldout(model, text, batch_tokens=64, reference=reference)
    assert wrapped.ppl_token == pytest.approx(plain.ppl_token, rel=1e-5)
    assert (plain.kl_dense is None, wrapped.kl_dense is None) == (False, True)
    assert dense_reference(Dense(model, "w"), text, 16) == "its head is a Sequential"


@pytest.mark.parametrize(("num_tokens", "batch_tokens"), [(40, 16), (43, 1)])
def test_the_divergence_equals_a_loop_over_tokens_and_vocabulary(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, num_tokens: int, batch_tokens: int
) -> None:
    dense, pruned, text = make_tiny("grouped-query").model, make_tiny("biased").model, text_of(letters, num_tokens)
    reference = dense_reference(Dense(dense, "w"), text, 24)
    assert isinstance(reference, DenseReference)
    found = measure_heldout(pruned, text, batch_tokens=batch_tokens, reference=reference)
    expected = []
    for start in range(0, num_tokens, 8):
        window = text.tokens[start : start + 8][None]
        p, q = (model(window).logits[0, :-1].log_softmax(-1) for model in (dense, pruned))
        expected.append(functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    assert found.kl_dense is not None
    assert found.kl_dense.value == pytest.approx(float(torch.cat(expected).mean()), rel=1e-9)
    if num_tokens == 40:
        by_window = torch.stack(expected).mean(dim=1)
        assert found.kl_dense.stderr == pytest.approx(float(by_window.std(unbiased=True)) / 5**0.5, rel=1e-5)


def test_the_dense_model_diverges_from_itself_by_nothing(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    text = text_of(letters, 40)
    dense, again = (make_tiny("tied", torch.float32).model for _ in range(2))
    reference = dense_reference(Dense(dense, "w"), text, 16)
    assert isinstance(reference, DenseReference)
    itself = measure_heldout(dense, text, batch_tokens=64, reference=reference).kl_dense
    # Computed anew, in batches of another size.
    copy = measure_heldout(again, text, batch_tokens=64, reference=reference).kl_dense
    assert itself is not None
    assert copy is not None
    assert (itself.value, itself.stderr) == (0.0, 0.0)
    assert abs(copy.value) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_states_serve_the_next_process_and_are_those_of_this_model_and_text_alone(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, tmp_path: Path, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, pruned, text = make_tiny("tied", dtype).model, make_tiny("biased", dtype).model, text_of(letters, 40)

    def divergence(weights: str, cache: Path | None = tmp_path, text: HeldOutText = text) -> float:
        reference = dense_reference(Dense(model, weights), text, 16, cache)
        assert isinstance(reference, DenseReference)
        found = measure_heldout(pruned, text, batch_tokens=64, reference=reference).kl_dense
        assert found is not None
        return found.value

    kept = divergence("w")
    assert kept == divergence("w", None)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as context:
        context.setattr(reference_module, "last_states", lambda *_: pytest.fail("computed again"))
        assert divergence("w") == kept
    divergence("other weights")
    divergence("w", text=text_of(letters, 48))
    assert len(list(tmp_path.iterdir())) == 3
    file.write_bytes(file.read_bytes()[:200])  # cut short
    assert divergence("w") == kept


def test_a_broken_dense_model_is_found_out_and_keeps_no_file(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_tiny("tied").model
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteOutputError, match="the dense model gives NaN"):
        dense_reference(Dense(model, "w"), text_of(letters, 16), 64, tmp_path)
    assert list(tmp_path.iterdir()) == []
