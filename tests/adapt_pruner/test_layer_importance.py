"""Layer importance: by hand, by a loop over tokens, and through both ways of running the model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from adapt_pruner.course import observe_layers
from adapt_pruner.layer_importance import DistanceSign, LayerImportance, LayerMetric, compare, normalise
from baselines.gradients import unit_gradient_scores
from harness.models import LoadedModel

METRICS: tuple[LayerMetric, ...] = ("cosine", "manhattan", "euclidean")

finite = st.floats(-1e3, 1e3, allow_nan=False)


def by_token_loop(loaded: LoadedModel, calibration: Tensor, metric: LayerMetric) -> list[float]:
    """Sequence by sequence, token by token, in plain Python, from the layers' own inputs and outputs."""
    streams: list[tuple[int, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _m, args, out, i=i: streams.append((i, args[0].clone(), out.clone())))
        for i, layer in enumerate(loaded.model.model.layers)
    ]
    with torch.no_grad():
        for sequence in calibration:
            loaded.model.model(sequence[None])
    for handle in handles:
        handle.remove()
    values: dict[int, list[float]] = {}
    for layer, before_BTH, after_BTH in streams:
        for x, y in zip(before_BTH[0].tolist(), after_BTH[0].tolist(), strict=True):
            if metric == "cosine":
                dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
                value = -dot / math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))
            elif metric == "manhattan":
                value = math.fsum(abs(b - a) for a, b in zip(x, y, strict=True))
            else:
                value = math.sqrt(math.fsum((b - a) ** 2 for a, b in zip(x, y, strict=True)))
            values.setdefault(layer, []).append(value)
    return [math.fsum(values[i]) / len(values[i]) for i in sorted(values)]


@pytest.mark.parametrize("metric", METRICS)
def test_importance_equals_a_loop_over_tokens(tiny: LoadedModel, calibration: Tensor, metric: LayerMetric) -> None:
    layers = LayerImportance(3, metric)
    observe_layers(tiny.model, calibration, layers)
    assert layers.raw().tolist() == pytest.approx(by_token_loop(tiny, calibration, metric), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_the_gradient_pass_shows_the_same_streams(tiny: LoadedModel, calibration: Tensor, metric: LayerMetric) -> None:
    alone, beside = LayerImportance(3, metric), LayerImportance(3, metric)
    observe_layers(tiny.model, calibration, alone)
    unit_gradient_scores(
        tiny.model,
        tiny.structure,
        tiny.structure.groups,
        calibration,
        "param_first",
        micro_batch_tokens=32,
        on_layer=beside.observe,
    )
    torch.testing.assert_close(beside.raw(), alone.raw(), rtol=1e-12, atol=0)


def test_tokens_compare_as_worked_out_by_hand() -> None:
    before_BTH = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    after_BTH = torch.tensor([[[3.0, 4.0], [4.0, 4.0]]])
    assert compare(before_BTH, after_BTH, "cosine").tolist() == [[pytest.approx(1), pytest.approx(math.sqrt(0.5))]]
    assert compare(before_BTH, after_BTH, "manhattan").tolist() == [[0, 7]]
    assert compare(before_BTH, after_BTH, "euclidean").tolist() == [[0, 5]]


def test_bfloat16_streams_are_compared_in_float32() -> None:
    before_BTH = torch.ones(1, 1, 1000, dtype=torch.bfloat16)
    after_BTH = before_BTH * 2
    assert compare(before_BTH, after_BTH, "manhattan").item() == 1000  # a bfloat16 sum would stop at 256
    assert compare(before_BTH, after_BTH, "cosine").dtype == torch.float32


@pytest.mark.parametrize(
    ("metric", "sign", "more_change_is_more_important"),
    [
        ("cosine", "sensible", True),
        ("cosine", "published", True),
        ("manhattan", "sensible", True),
        ("manhattan", "published", False),
        ("euclidean", "sensible", True),
        ("euclidean", "published", False),
    ],
)
def test_a_layer_that_changes_more_is_more_important_but_for_the_published_distances(
    metric: LayerMetric, sign: DistanceSign, more_change_is_more_important: bool
) -> None:
    layers = LayerImportance(2, metric, sign)
    stream = torch.tensor([[[1.0, 0.0]]])
    layers.observe(0, stream, torch.tensor([[[1.0, 0.1]]]))
    layers.observe(1, stream, torch.tensor([[[1.0, 9.0]]]))
    little, much = layers.raw().tolist()
    assert (much > little) is more_change_is_more_important


def test_every_token_weighs_the_same_whatever_its_batch() -> None:
    before_BTH, after_BTH = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1)).double()
    whole, parts = LayerImportance(1, "euclidean"), LayerImportance(1, "euclidean")
    whole.observe(0, before_BTH, after_BTH)
    parts.observe(0, before_BTH[:1], after_BTH[:1])
    parts.observe(0, before_BTH[1:], after_BTH[1:])
    assert parts.raw().item() == pytest.approx(whole.raw().item(), rel=1e-14)


@given(st.lists(finite, min_size=2, max_size=40))
@example([0.0, 5e-324])
def test_normalised_importance_has_mean_zero_and_largest_magnitude_one(values: list[float]) -> None:
    normalised = normalise(torch.tensor(values, dtype=torch.float64))
    assert normalised.mean().item() == pytest.approx(0, abs=1e-2)
    assert normalised.abs().max().item() in (0, pytest.approx(1))


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=40), st.floats(0.1, 10), finite)
def test_normalised_importance_forgets_scale_and_offset(values: list[int], scale: float, offset: float) -> None:
    raw = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(normalise(raw * scale + offset), normalise(raw), rtol=1e-6, atol=1e-6)


def test_layers_that_do_not_differ_are_equally_important() -> None:
    assert normalise(torch.full((30,), 0.1, dtype=torch.float64)).tolist() == [0] * 30
    assert normalise(torch.tensor([-0.7], dtype=torch.float64)).tolist() == [0]


def test_normalised_importance_as_worked_out_by_hand() -> None:
    assert normalise(torch.tensor([1.0, 2.0, 6.0]).double()).tolist() == pytest.approx([-2 / 3, -1 / 3, 1])
