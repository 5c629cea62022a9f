"""The gradient pass against plain autograd, loops over samples, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gradients import Moments, gradient_pass, unit_gradient_scores
from baselines.importance import channel_scores
from harness.models import LoadedModel

Gathered = dict[str, tuple[Tensor | None, Tensor | None]]


@pytest.fixture
def tiny(any_tiny: LoadedModel) -> LoadedModel:
    """Layers that are applied twice are scored and pruned too."""
    return any_tiny


def prunable(loaded: LoadedModel, first_layer: int = 0) -> list[str]:
    groups = [group for group in loaded.structure.groups if group.layer >= first_layer]
    return [member.module for group in groups for member in group.members]


def gathered(
    loaded: LoadedModel, tokens: Tensor, moments: Moments = "gradient", first_layer: int = 0, **options: Any
) -> tuple[float, Gathered]:
    found: Gathered = {}

    def keep(module: str, weight: Tensor, gradient: Tensor | None, squared: Tensor | None) -> None:
        assert module not in found, "handed out twice"
        assert torch.equal(weight, loaded.model.get_submodule(module).weight)
        found[module] = (gradient, squared)

    loss = gradient_pass(loaded.model, tokens, prunable(loaded, first_layer), keep, moments=moments, **options)
    return loss, found


def autograd(loaded: LoadedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean loss, by transformers' own loss."""
    weights = {name: loaded.model.get_submodule(name).weight for name in prunable(loaded)}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loaded.model(tokens, labels=tokens).loss, list(weights.values()))
    loaded.model.requires_grad_(False)
    return dict(zip(weights, gradients, strict=True))


def assert_close(found: Gathered, expected: dict[str, Tensor], which: int = 0, rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # transformers casts logits to float32, so its own gradients carry float32's rounding.
        torch.testing.assert_close(found[name][which], value, rtol=rtol, atol=1e-6 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("micro_batch_tokens", [1, 32, 50, 1024])
def test_gradients_equal_autograd_whatever_the_micro_batch(
    tiny: LoadedModel, calibration: Tensor, micro_batch_tokens: int
) -> None:
    loss, found = gathered(tiny, calibration, micro_batch_tokens=micro_batch_tokens)
    assert_close(found, autograd(tiny, calibration))
    assert loss == pytest.approx(float(tiny.model(calibration, labels=calibration).loss), rel=1e-6)


def test_micro_batches_add_up_to_the_whole_batch_in_float64(tiny: LoadedModel, calibration: Tensor) -> None:
    _, whole = gathered(tiny, calibration)
    _, parts = gathered(tiny, calibration, micro_batch_tokens=32)
    for name, (gradient, _) in whole.items():
        torch.testing.assert_close(parts[name][0], gradient, rtol=1e-10, atol=1e-14)


def test_mean_over_sums_the_gradients_of_mini_batches(tiny: LoadedModel, calibration: Tensor) -> None:
    expected = {name: torch.zeros_like(g) for name, g in autograd(tiny, calibration).items()}
    for start in range(0, 6, 4):  # the second mini-batch is short, and its mean is over what it has
        for name, gradient in autograd(tiny, calibration[start : start + 4]).items():
            expected[name] += gradient
    for tokens in (16, 1024):
        assert_close(gathered(tiny, calibration, mean_over=4, micro_batch_tokens=tokens)[1], expected)


@pytest.mark.parametrize("micro_batch_tokens", [16, 48, 1024])
def test_squared_gradients_are_the_mean_over_samples(
    tiny: LoadedModel, calibration: Tensor, micro_batch_tokens: int
) -> None:
    samples = [autograd(tiny, calibration[i : i + 1]) for i in range(6)]
    expected = {name: torch.stack([s[name].square() for s in samples]).mean(0) for name in samples[0]}
    _, both = gathered(tiny, calibration, "both", micro_batch_tokens=micro_batch_tokens)
    assert_close(both, expected, which=1)
    assert_close(both, autograd(tiny, calibration))
    _, squared = gathered(tiny, calibration, "squared", micro_batch_tokens=micro_batch_tokens)
    assert_close(squared, expected, which=1)
    assert all(gradient is None for gradient, _ in squared.values())


def test_backward_stops_at_the_first_layer_that_is_scored(tiny: LoadedModel, calibration: Tensor) -> None:
    needing: list[tuple[int, bool]] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: needing.append((i, out.requires_grad)))
        for i, layer in enumerate(tiny.model.model.layers)
    ]
    _, found = gathered(tiny, calibration, first_layer=1)
    for handle in handles:
        handle.remove()
    assert needing == [(0, False), (1, True), (2, True)]
    whole = autograd(tiny, calibration)
    assert_close(found, {name: whole[name] for name in prunable(tiny, 1)})


def test_the_model_is_left_as_it_was_even_after_a_failure(tiny: LoadedModel, calibration: Tensor) -> None:
    tiny.model.model.norm.weight.requires_grad_(True)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        gradient_pass(tiny.model, calibration, prunable(tiny), fail, on_layer=lambda *_: None)
    assert [name for name, p in tiny.model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in tiny.model.parameters())
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_the_observer_sees_each_layers_input_and_output(tiny: LoadedModel, calibration: Tensor) -> None:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 1: [], 2: []}
    gathered(tiny, calibration, micro_batch_tokens=48, on_layer=lambda i, x, y: seen[i].append((x, y)))
    base = tiny.model.model
    stream = base(calibration, output_hidden_states=True).hidden_states
    for i, parts in seen.items():
        assert len(parts) == 2, "six samples of 16 tokens in micro-batches of three"
        torch.testing.assert_close(torch.cat([x for x, _ in parts]), stream[i])
        if i < 2:  # transformers reports the last layer's output after the final norm
            torch.testing.assert_close(torch.cat([y for _, y in parts]), stream[i + 1])
    torch.testing.assert_close(base.norm(torch.cat([y for _, y in seen[2]])), stream[3])


@pytest.mark.parametrize("module", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_taylor_scores_equal_finite_differences_of_the_loss(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor, module: str
) -> None:
    loaded = make_tiny("grouped-query")
    name = f"model.layers.1.{module}"
    dim = 1 if module.endswith(("o_proj", "down_proj")) else 0
    _, found = gathered(loaded, calibration)
    linear = loaded.model.get_submodule(name)
    first = channel_scores(linear.weight, "param_first", dim, found[name][0])
    vector = channel_scores(linear.weight, "vectorize", dim, found[name][0])
    for channel in (0, 5):
        channel_weights = linear.weight.select(dim, channel)
        one_by_one = [abs(removal_slope(loaded, calibration, channel_weights[i : i + 1])) for i in range(48)]
        assert float(first[channel]) == pytest.approx(sum(one_by_one), rel=1e-3)
        assert float(vector[channel]) == pytest.approx(
            abs(removal_slope(loaded, calibration, channel_weights)), rel=1e-3, abs=1e-5
        )


def removal_slope(loaded: LoadedModel, tokens: Tensor, weights: Tensor, step: float = 0.05) -> float:
    """Loss change per fraction of ``weights`` (a view) taken away, by central differences.

    The step is large because transformers' norms round a float64 model's stream to float32.
    """
    before = weights.clone()
    losses = []
    for sign in (-1, 1):
        weights.copy_(before * (1 + sign * step))
        losses.append(float64_loss(loaded, tokens))
        weights.copy_(before)
    return (losses[0] - losses[1]) / (2 * step)


def float64_loss(loaded: LoadedModel, tokens: Tensor) -> float:
    logits = loaded.model(tokens).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits.double(), tokens[:, 1:].flatten()))


def test_bfloat16_passes_give_float32_scores_close_to_the_exact_ones(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor
) -> None:
    loaded = make_tiny("grouped-query", torch.float32)
    groups = loaded.structure.groups
    for criterion in ("param_first", "param_second"):
        exact, rough = (
            unit_gradient_scores(
                loaded.model, loaded.structure, groups, calibration, criterion, bfloat16=rounded, micro_batch_tokens=32
            )
            for rounded in (False, True)
        )
        for group in groups:
            assert rough[group.name].dtype == torch.float32
            error = (rough[group.name] - exact[group.name]).norm() / exact[group.name].norm()
            assert 0 < float(error) < 0.05
