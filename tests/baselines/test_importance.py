"""Scoring maths: by hand, and against a loop over units."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baselines.importance import (
    TAYLOR,
    Criterion,
    Grouping,
    channel_scores,
    combine_members,
    fold_query_channels,
    kv_head_scores,
    unit_scores,
)
from harness.models import LoadedModel
from harness.structure import CoupledGroup

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
GRADIENT = torch.tensor([[2.0, 1.0], [-1.0, 4.0]])
SQUARED = torch.tensor([[4.0, 0.5], [1.0, 8.0]])
CRITERIA = ("l1", "l2", "param_first", "param_second", "param_mix", "vectorize")


@pytest.mark.parametrize(
    ("criterion", "rows", "columns"),
    [
        ("l1", [3.0, 3.5], [4.0, 2.5]),
        ("l2", [5.0, 9.25], [10.0, 4.25]),
        ("param_first", [4.0, 5.0], [5.0, 4.0]),
        ("param_second", [6.0, 11.0], [13.0, 4.0]),
        ("param_mix", [0.0 + 3.0, 7.5 + 1.0], [0.0 + 7.5, 3.0 + 1.0]),
        ("vectorize", [0.0, 1.0], [1.0, 0.0]),
    ],
)
def test_channel_scores_by_hand(criterion: Criterion, rows: list[float], columns: list[float]) -> None:
    assert channel_scores(WEIGHT, criterion, 0, GRADIENT, SQUARED).tolist() == rows
    assert channel_scores(WEIGHT, criterion, 1, GRADIENT, SQUARED).tolist() == columns


def test_scores_of_bfloat16_weights_are_float32_sums() -> None:
    weight, gradient = torch.full((1, 4096), 1.0, dtype=torch.bfloat16), torch.full((1, 4096), 1.0)
    (score,) = channel_scores(weight, "param_first", 0, gradient)
    assert (score.dtype, float(score)) == (torch.float32, 4096.0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_inputs_are_left_as_they_were(criterion: Criterion) -> None:
    inputs = WEIGHT.clone(), GRADIENT.clone(), SQUARED.clone()
    channel_scores(inputs[0], criterion, 0, inputs[1], inputs[2])
    assert all(torch.equal(a, b) for a, b in zip(inputs, (WEIGHT, GRADIENT, SQUARED), strict=True))


@pytest.mark.parametrize(
    ("grouping", "expected"), [("sum", [6.0]), ("mean", [2.0]), ("max", [4.0]), ("first", [1.0]), ("product", [4.0])]
)
def test_matrices_combine_by_hand(grouping: Grouping, expected: list[float]) -> None:
    assert combine_members(torch.tensor([[1.0], [1.0], [4.0]]), grouping).tolist() == expected


def test_query_channels_count_for_the_kv_head_they_leave_with() -> None:
    query = torch.tensor([1.0, 2.0, 4.0, 8.0])  # four query heads of one channel, two kv heads
    assert fold_query_channels(query, 1, 2).tolist() == [1.0 + 2.0, 4.0 + 8.0]
    assert fold_query_channels(query, 1, 2, "upstream").tolist() == [1.0 + 4.0, 2.0 + 8.0]


def test_without_grouped_queries_both_folds_are_the_identity() -> None:
    query = torch.arange(6.0)
    assert torch.equal(fold_query_channels(query, 2, 1), query)
    assert torch.equal(fold_query_channels(query, 2, 1, "upstream"), query)


def test_kv_head_takes_the_sum_of_its_channels_after_matrices_combine() -> None:
    key, value = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    query, output = torch.tensor([1.0, 0.0, 3.0, 1.0]), torch.zeros(4)
    shape = {"head_dim": 2, "query_group_size": 2}
    assert kv_head_scores(key, query, value, output, **shape, grouping="max").tolist() == [4.0 + 5.0]
    assert kv_head_scores(key, query, value, output, **shape, grouping="sum").tolist() == [16.0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_unit_scores_equal_a_loop_over_units(tiny: LoadedModel, criterion: Criterion) -> None:
    generator = torch.Generator().manual_seed(3)
    gradients, squares = {}, {}
    for group in tiny.structure.groups:
        for member in group.members:
            shape = tiny.model.get_submodule(member.module).weight.shape
            gradients[member.module] = torch.randn(shape, generator=generator, dtype=torch.float64)
            squares[member.module] = torch.rand(shape, generator=generator, dtype=torch.float64)
    for group in tiny.structure.groups:
        by_module = {
            m.module: channel_scores(
                tiny.model.get_submodule(m.module).weight, criterion, m.dim, gradients[m.module], squares[m.module]
            )
            for m in group.members
        }
        found = unit_scores(
            group,
            by_module,
            criterion=criterion,
            head_dim=tiny.structure.head_dim,
            query_group_size=tiny.structure.query_group_size,
        )
        expected = [naive_score(tiny, group, unit, criterion, gradients, squares) for unit in range(group.num_units)]
        assert found.tolist() == pytest.approx(expected, rel=1e-10)


def naive_score(
    loaded: LoadedModel,
    group: CoupledGroup,
    unit: int,
    criterion: Criterion,
    gradients: dict[str, Tensor],
    squares: dict[str, Tensor],
) -> float:
    """One unit's score, row by row and column by column."""
    total = 0.0
    for member in group.members:
        weight = loaded.model.get_submodule(member.module).weight
        for channel in range(unit * member.block, (unit + 1) * member.block):
            w, g, a = (
                t.select(member.dim, channel) for t in (weight, gradients[member.module], squares[member.module])
            )
            total += {
                "l1": w.abs().sum(),
                "l2": (w * w).sum(),
                "param_first": (w * g).abs().sum(),
                "param_second": (w * a * w).abs().sum(),
                "param_mix": (w * g - 0.5 * w * a * w).abs().sum(),
                "vectorize": (w * g).sum().abs(),
            }[criterion].item()
    return total if criterion in TAYLOR else total / len(group.members)
