"""Which units one step removes, whole and in part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapt_pruner.sparsity import SparsityState
from adapt_pruner.step import partial_step, whole_step, widths_after
from harness.models import LoadedModel
from harness.structure import ModelStructure, check_plan, removed_params

HEAD = 48 * 8 * 8  # q 3 x 8 rows, k 8, v 8, o 3 x 8 columns of 48 numbers
CHANNEL = 48 * 3


@pytest.fixture
def structure(make_tiny: Callable[..., LoadedModel]) -> ModelStructure:
    """Three layers of 2 kv heads and 80 channels."""
    return make_tiny("grouped-query").structure


def scores_of(structure: ModelStructure, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.num_units, generator=generator) for group in structure.groups}


def test_at_share_zero_nothing_leaves(structure: ModelStructure) -> None:
    widths = widths_after(structure, SparsityState.dense(3))
    assert whole_step(structure, widths, scores_of(structure)) == {}


def test_the_lowest_scored_units_of_each_layer_leave(structure: ModelStructure) -> None:
    scores = scores_of(structure) | {"layers.1.attention": torch.tensor([0.7, 0.2])}
    widths = widths_after(structure, SparsityState((0.0, 0.5, 0.1)))
    plan = whole_step(structure, widths, scores)
    assert sorted(plan) == ["layers.1.attention", "layers.1.mlp", "layers.2.mlp"]
    assert plan["layers.1.attention"].tolist() == [0]
    for name, num_kept in (("layers.1.mlp", 40), ("layers.2.mlp", 72)):
        best = sorted(range(80), key=lambda unit: -float(scores[name][unit]))[:num_kept]
        assert plan[name].tolist() == sorted(best)
    check_plan(structure, plan)


def test_a_fallen_share_brings_nothing_back(structure: ModelStructure) -> None:
    widths = {group.name: group.num_units + 5 for group in structure.groups}
    assert whole_step(structure, widths, scores_of(structure)) == {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(shares=st.tuples(*[st.floats(0, 0.99)] * 3), part=st.floats(0, 1), keep=st.booleans(), seed=st.integers(0, 99))
def test_part_of_a_step_never_overshoots_and_removes_only_what_the_step_does(
    structure: ModelStructure, shares: tuple[float, ...], part: float, keep: bool, seed: int
) -> None:
    scores = scores_of(structure, seed)
    whole = whole_step(structure, widths_after(structure, SparsityState(shares)), scores)
    to_remove = int(removed_params(structure, whole) * part)
    plan = partial_step(structure, whole, scores, to_remove, keep_heads=keep)
    check_plan(structure, plan)
    missing = to_remove - removed_params(structure, plan)
    assert missing >= 0
    for name, kept in plan.items():
        assert set(whole[name].tolist()) <= set(kept.tolist())
    channels = [group.name for group in structure.mlp if group.name in whole]
    channels_used_up = all(name in plan and plan[name].equal(whole[name]) for name in channels)
    assert missing < CHANNEL or channels_used_up
    if keep:
        assert not any(name.endswith("attention") for name in plan)


def test_part_of_a_step_takes_the_lowest_channels_of_all_layers(structure: ModelStructure) -> None:
    scores = {group.name: torch.full((group.num_units,), 9.0) for group in structure.groups}
    scores["layers.0.mlp"][[7, 11]] = torch.tensor([0.5, 0.1])
    scores["layers.2.mlp"][3] = 0.3
    whole = whole_step(structure, widths_after(structure, SparsityState((0.02, 0.0, 0.01))), scores)
    assert 80 - whole["layers.0.mlp"].numel() == 2
    plan = partial_step(structure, whole, scores, 2 * CHANNEL + 5, keep_heads=True)
    assert set(range(80)) - set(plan["layers.0.mlp"].tolist()) == {11}
    assert set(range(80)) - set(plan["layers.2.mlp"].tolist()) == {3}


def test_heads_that_fit_leave_lowest_first(structure: ModelStructure) -> None:
    scores = scores_of(structure) | {
        f"layers.{i}.attention": torch.tensor([low, 9.0]) for i, low in enumerate((0.3, 0.1, 0.2))
    }
    whole = whole_step(structure, widths_after(structure, SparsityState((0.6,) * 3)), scores)
    plan = partial_step(structure, whole, scores, 2 * HEAD + 10 * CHANNEL, keep_heads=False)
    assert sorted(name for name in plan if name.endswith("attention")) == ["layers.1.attention", "layers.2.attention"]
    assert removed_params(structure, plan) == 2 * HEAD + 10 * CHANNEL
