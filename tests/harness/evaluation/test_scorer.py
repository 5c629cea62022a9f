"""The scorer equals stock HFLM on every kind of model and request, and says where it does not take the fast path."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

from harness.budget import ParameterTarget
from harness.errors import UserError
from harness.evaluation.forest_pass import NonFiniteOutputError
from harness.evaluation.quiet import quiet
from harness.evaluation.scorer import Request, Score, TrieScorer
from harness.models import LoadedModel, remove_units
from harness.registry import build_method
from harness.structure import describe

Stock = Callable[[PreTrainedModel, Sequence[Request]], list[Score]]


def request(context: list[int], continuation: list[int]) -> Request:
    return (("", ""), context, continuation)


def questions(seed: int = 0, num_questions: int = 6, num_choices: int = 4) -> list[Request]:
    """Questions behind a long shared beginning, with choices that share theirs, some of one token."""
    draw = random.Random(seed)
    ids = lambda n: [draw.randrange(96) for _ in range(n)]  # noqa: E731
    beginning = ids(40)
    requests = []
    for number in range(num_questions):
        context = beginning + ids(draw.randrange(3, 9))
        opening = ids(2)
        requests += [
            request(context, [choice] if number % 3 == 0 else opening + ids(draw.randrange(1, 6)))
            for choice in range(num_choices)
        ]
    return requests


def scorer(model: PreTrainedModel, letters: PreTrainedTokenizerFast, **options: Any) -> TrieScorer:
    with quiet():
        return TrieScorer(model, letters, **{"batch_tokens": 64, **options})


def assert_equal(found: Sequence[Score], expected: Sequence[Score], tolerance: float = 1e-8) -> None:
    np.testing.assert_allclose([ll for ll, _ in found], [ll for ll, _ in expected], atol=tolerance, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_scores_equal_stock_lm_eval_on_every_architecture(
    tiny: LoadedModel, letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    lm = scorer(tiny.model, letters)
    assert lm.why_not_fast is None
    assert_equal(lm._loglikelihood_tokens(questions()), stock(tiny.model, questions()))
    assert lm.notes == ()


def test_layers_may_differ_in_heads_and_widths_and_have_no_head_at_all(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    model = make_tiny("biased").model
    nothing = torch.tensor([], dtype=torch.int64)
    plan = {
        "layers.0.attention": torch.tensor([1]),
        "layers.1.attention": nothing,
        "layers.2.mlp": torch.arange(0, 80, 3),
    }
    pruned = remove_units(model, describe(model), plan)
    assert_equal(scorer(pruned, letters)._loglikelihood_tokens(questions()), stock(pruned, questions()))


def test_the_residual_width_may_change_from_layer_to_layer(
    make_tiny: Callable[..., LoadedModel], calibration: torch.Tensor, letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    loaded = make_tiny("grouped-query")
    target = ParameterTarget(0.2, "total", loaded.params)
    sliced = next(build_method("slicegpt", {}).prune(loaded, calibration, [target], 0)).model
    assert sliced.get_output_embeddings().in_features < loaded.model.config.hidden_size
    lm = scorer(sliced, letters)
    assert lm.why_not_fast is None
    assert_equal(lm._loglikelihood_tokens(questions()), stock(sliced, questions()))


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_every_application_of_a_shared_layer_carries_its_own_keys_and_values(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock, batch_tokens: int
) -> None:
    model = make_tiny("shared-layers").model
    assert_equal(scorer(model, letters, batch_tokens=batch_tokens)._loglikelihood_tokens(questions()),
                 stock(model, questions()))  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [1, 7, 50, 10_000])
def test_the_size_of_a_batch_changes_nothing(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock, batch_tokens: int
) -> None:
    model = make_tiny("grouped-query").model
    lm = scorer(model, letters, batch_tokens=batch_tokens)
    assert_equal(lm._loglikelihood_tokens(questions()), stock(model, questions()))


@given(st.integers(0, 10_000), st.integers(1, 200))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_requests_changes_nothing(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, seed: int, batch_tokens: int
) -> None:
    model = make_tiny("tied").model
    requests = questions(seed)
    order = random.Random(seed).sample(range(len(requests)), len(requests))
    in_order = scorer(model, letters)._loglikelihood_tokens(requests)
    shuffled = scorer(model, letters, batch_tokens=batch_tokens)._loglikelihood_tokens([requests[i] for i in order])
    assert_equal(shuffled, [in_order[i] for i in order])


def test_what_is_shared_is_run_once(make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    lm = scorer(make_tiny("tied").model, letters, progress=lambda done, total: seen.append((done, total)))
    context = list(range(1, 31))
    lm._loglikelihood_tokens([request(context, [choice]) for choice in range(40, 44)])
    lm._loglikelihood_tokens([request(context, [50, 51]), request(context, [50, 52]), request([*context, 7], [8])])
    # Four one-token choices are one row of 30; then 30 + the token 50, and 30's other child, 7.
    assert seen == [(30, 30), (32, 32)]


def test_a_choice_of_one_token_and_one_of_two_hundred(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    requests = [request([3, 4], [5]), request([3, 4], [i % 96 for i in range(200)]), request([9], [1, 2])]
    model = make_tiny("qwen3").model
    assert_equal(scorer(model, letters)._loglikelihood_tokens(requests), stock(model, requests))


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(
    make_tiny: Callable[..., LoadedModel],
    letters: PreTrainedTokenizerFast,
    stock: Stock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_tiny("multi-head").model
    monkeypatch.setattr(model.config, "max_position_embeddings", 12)
    requests = [request(list(range(20)), [21, 22]), request(list(range(11)), [30, 31]), request([1], [2])]
    lm = scorer(model, letters)
    assert_equal(lm._loglikelihood_tokens(requests), stock(model, requests))
    assert lm.notes == (
        "1 contexts were longer than the 12 tokens the model takes and lost their beginning, as lm-eval does it",
    )


def test_a_continuation_longer_than_the_model_takes_is_refused(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="a continuation of 13 tokens is longer than the 12 the model takes"):
        scorer(make_tiny("tied").model, letters, max_length=12)._loglikelihood_tokens([request([1], [2] * 13)])


def test_an_empty_continuation_is_certain_and_noted(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    lm = scorer(make_tiny("tied").model, letters)
    assert lm._loglikelihood_tokens([request([1, 2], [])]) == [(0.0, True)]
    assert lm.notes == ("1 continuations were empty and count as certain (log-likelihood 0)",)


TEXTS = [
    ("Question: who?\nAnswer:", " me"),
    ("Question: who? ", "me"),
    ("unhappi", "ness of it"),  # the tokenizer merges across this boundary
    ("", " from nothing"),
    ("   ", "after blanks"),
    ("ein Häuschen", " im Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}nen"),
    ("<|im_start|>user", " said"),  # begins with the BOS text
]


def test_texts_become_the_tokens_that_lm_eval_makes_of_them(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = [
        Instance("loglikelihood", {}, text, i) for i, text in enumerate(TEXTS) if text[0].strip() or not text[0]
    ]
    lm = scorer(smollm2.model, smollm2.tokenizer)
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda requests, **_: list(requests))
    assert lm.loglikelihood(instances) == TemplateLM.loglikelihood(lm, instances, disable_tqdm=True)


def test_whole_texts_score_as_in_stock_lm_eval(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny("qwen2").model
    instances = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(["A text. " * 9, "Short."])]
    lm = scorer(model, letters, max_length=20)
    found = lm.loglikelihood_rolling(instances)
    assert capfd.readouterr() == ("", "")
    with quiet():
        expected = HFLM(pretrained=model, tokenizer=letters, max_length=20).loglikelihood_rolling(instances, True)
    assert found == pytest.approx(expected, abs=1e-8)


def test_bfloat16_models_score_close_to_float32_ones(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    exact = scorer(make_tiny("grouped-query", torch.float32).model, letters)._loglikelihood_tokens(questions())
    lm = scorer(make_tiny("grouped-query", torch.bfloat16).model, letters)
    rough = lm._loglikelihood_tokens(questions())
    assert lm.why_not_fast is None
    np.testing.assert_allclose([ll for ll, _ in rough], [ll for ll, _ in exact], rtol=0.05, atol=0.3)


def test_models_with_one_tokenizer_share_the_encoding(
    make_tiny: Callable[..., LoadedModel],
    letters: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [("shared by", f" {i}") for i in range(3)]
    instances = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
    alone = scorer(make_tiny("tied").model, letters)
    first = scorer(make_tiny("tied").model, letters, cache=tmp_path)
    assert first.loglikelihood(instances) == alone.loglikelihood(instances)
    second = scorer(make_tiny("biased").model, letters, cache=tmp_path)
    monkeypatch.setattr(second, "_encode", lambda _: pytest.fail("encoded again"))
    assert second.encoded(texts) == alone._encode(texts)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        second.encoded(texts[:2])


def test_tokens_of_another_tokenizer_or_from_a_damaged_file_are_not_taken(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, texts = make_tiny("tied").model, [("a", "b"), ("a", "c"), ("", "d")]
    expected = scorer(model, letters, cache=tmp_path).encoded(texts)
    other = copy.deepcopy(letters)
    other.add_tokens(["ab"])
    assert scorer(model, other, cache=tmp_path).encoded(texts) != expected
    assert len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    assert scorer(model, letters, cache=tmp_path).encoded(texts) == expected


def test_a_broken_layer_is_named(make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast) -> None:
    model = make_tiny("grouped-query").model
    model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteOutputError, match=r"'model\.layers\.1\.mlp\.down_proj' is not finite"):
        scorer(model, letters)._loglikelihood_tokens(questions())


def test_an_untied_head_stays_as_it_is_though_the_config_says_tied(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model = make_tiny("tied").model
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2, requires_grad=False)
    before = model(torch.arange(5)[None]).logits
    scorer(model, letters)
    assert torch.equal(model(torch.arange(5)[None]).logits, before)
    assert "tie_weights" not in vars(model)


def test_the_attention_of_the_model_is_put_back(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast
) -> None:
    model = make_tiny("mistral").model
    before = model.config._attn_implementation
    scorer(model, letters)._loglikelihood_tokens(questions())
    assert model.config._attn_implementation == before


def test_requests_longer_than_a_sliding_window_go_lm_evals_own_way_and_are_noted(
    letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    config = MistralConfig(
        vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    requests = [*questions()[:4], request([1, 2, 3], [4]), request([1, 2, 3], [5])]
    lm = scorer(model, letters)
    assert_equal(lm._loglikelihood_tokens(requests), stock(model, requests))
    assert lm.notes == ("4 requests were scored by lm-eval's own runner: longer than the attention window of 20",)


def test_a_head_that_is_not_linear_goes_lm_evals_own_way_and_is_noted(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    class Doubled(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * self.head(hidden)

    model = make_tiny("multi-head").model
    model.lm_head = Doubled(model.lm_head)
    lm = scorer(model, letters)
    assert_equal(lm._loglikelihood_tokens(questions()), stock(model, questions()))
    assert lm.notes == ("24 requests were scored by lm-eval's own runner: its head is a Doubled",)


def test_attention_that_is_not_plain_causal_is_found_out(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock
) -> None:
    model = make_tiny("multi-head").model
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    def looks_at_the_length(**inputs: Any) -> Any:
        out, weights = forward(attention, **inputs)
        return out * inputs["hidden_states"].shape[1], weights

    attention.forward = looks_at_the_length
    lm = scorer(model, letters)
    assert lm.why_not_fast == "its attention is not plain causal attention"
    assert_equal(lm._loglikelihood_tokens(questions()), stock(model, questions()))


def test_layers_may_lie_on_several_devices_and_on_the_disk(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock, tmp_path: Path
) -> None:
    # No second device here computes, so accelerate's hooks are at work between the processor and the disk: a layer's
    # weights are there only while it runs.
    whole = make_tiny("grouped-query", torch.float32).model
    whole.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map={**places, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    lm = scorer(spread, letters)
    assert lm.why_not_fast is None
    assert_equal(lm._loglikelihood_tokens(questions()), stock(whole, questions()), tolerance=1e-4)


def test_an_offloaded_head_goes_lm_evals_own_way_and_is_noted(
    make_tiny: Callable[..., LoadedModel], letters: PreTrainedTokenizerFast, stock: Stock, tmp_path: Path
) -> None:
    whole = make_tiny("grouped-query", torch.float32).model
    whole.save_pretrained(tmp_path / "model")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.float32,
        device_map={"model": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    ).eval()
    lm = scorer(spread, letters)
    assert_equal(lm._loglikelihood_tokens(questions()), stock(whole, questions()), tolerance=1e-4)
    assert lm.notes == ("24 requests were scored by lm-eval's own runner: its head is offloaded",)
