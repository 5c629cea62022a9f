"""Plans from scores and a ratio, and the ratio that meets a target."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines.ratio import (
    Scores,
    global_plan,
    keep_highest,
    keep_ratio,
    meet_target,
    uniform_plan,
    uniform_priority,
)
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.models import LoadedModel
from harness.structure import ModelStructure, check_plan, removed_params

RATIOS = st.floats(0, 1)
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_scores(structure: ModelStructure, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.num_units, generator=generator) for group in structure.groups}


@pytest.fixture
def loaded(make_tiny: Callable[..., LoadedModel]) -> LoadedModel:
    """Three layers of 3 kv heads of 8 and 80 channels."""
    return make_tiny("tied")


def test_the_highest_scores_stay_in_the_order_of_the_units() -> None:
    assert keep_highest(torch.tensor([3.0, 1.0, 5.0, 4.0]), 2).tolist() == [2, 3]
    assert keep_highest(torch.tensor([1.0, 1.0, 1.0]), 1).tolist() == [2]
    assert keep_highest(torch.tensor([1.0]), 0).tolist() == []


@pytest.mark.parametrize(
    ("ratio", "heads", "channels"),
    [(0.0, 3, 80), (0.25, 3, 60), (0.29, 3, 56), (0.3, 2, 56), (0.62, 2, 30), (0.63, 1, 29), (1.0, 1, 1)],
)
def test_heads_leave_whole_and_one_unit_always_stays(
    loaded: LoadedModel, ratio: float, heads: int, channels: int
) -> None:
    # Of 24 key channels int(24 x 0.71) = 17 stay at 0.29: seven are due, a head is eight.
    plan = uniform_plan(random_scores(loaded.structure, 0), loaded.structure, ratio)
    assert [kept.numel() for kept in plan.values()] == [heads, channels] * 3


def test_the_lowest_scores_leave(loaded: LoadedModel) -> None:
    group = loaded.structure.mlp[0]
    scores = torch.arange(80.0).flip(0)
    assert keep_ratio(group, scores, 0.5, 8).tolist() == list(range(40))


@QUICK
@given(seed=st.integers(0, 1000), low=RATIOS, high=RATIOS)
@pytest.mark.parametrize("planner", [uniform_plan, global_plan])
def test_more_never_keeps_more(
    loaded: LoadedModel,
    planner: Callable[[Scores, ModelStructure, float], dict[str, Tensor]],
    seed: int,
    low: float,
    high: float,
) -> None:
    low, high = sorted((low, high))
    scores = random_scores(loaded.structure, seed)
    more, less = planner(scores, loaded.structure, low), planner(scores, loaded.structure, high)
    for plan in (more, less):
        check_plan(loaded.structure, plan)
        assert all(kept.numel() > 0 for kept in plan.values())
    assert all(torch.isin(less[name], more[name]).all() for name in scores)


@QUICK
@given(seed=st.integers(0, 1000), ratio=RATIOS)
@pytest.mark.parametrize("planner", [uniform_plan, global_plan])
def test_permuting_units_permutes_the_plan(
    loaded: LoadedModel,
    planner: Callable[[Scores, ModelStructure, float], dict[str, Tensor]],
    seed: int,
    ratio: float,
) -> None:
    scores = random_scores(loaded.structure, seed)
    generator = torch.Generator().manual_seed(seed)
    order = {name: torch.randperm(values.numel(), generator=generator) for name, values in scores.items()}
    plan = planner(scores, loaded.structure, ratio)
    permuted = planner({name: values[order[name]] for name, values in scores.items()}, loaded.structure, ratio)
    for name, kept in permuted.items():
        assert torch.equal(order[name][kept].sort().values, plan[name])


def test_globally_the_lowest_scores_of_all_layers_leave(loaded: LoadedModel) -> None:
    scores = {group.name: torch.full((group.num_units,), 10.0) for group in loaded.structure.groups}
    scores["layers.0.mlp"] = torch.arange(80.0) / 100
    scores["layers.2.attention"] = torch.tensor([0.205, 9.0, 9.0])
    # 312 channels in all; int(312 x 0.9) stay, 32 leave: channels 0..20 of layer 0, the head's 8, and three more.
    plan = global_plan(scores, loaded.structure, 0.1)
    assert plan["layers.0.mlp"].tolist() == list(range(24, 80))
    assert plan["layers.2.attention"].tolist() == [1, 2]
    assert all(plan[f"layers.{i}.mlp"].numel() == 80 for i in (1, 2))


@QUICK
@given(seed=st.integers(0, 1000), sparsity=st.floats(0.001, 0.5))
def test_a_target_is_met_within_a_channel_and_never_overshot(loaded: LoadedModel, seed: int, sparsity: float) -> None:
    structure = loaded.structure
    scores = random_scores(structure, seed)
    target = ParameterTarget(sparsity, "total", loaded.params)
    solved = meet_target(
        "test", partial(uniform_plan, scores, structure), structure, target, uniform_priority(scores, structure)
    )
    missing = target.to_remove - removed_params(structure, solved.plan)
    assert 0 <= missing < 3 * structure.hidden_size
    assert 0 <= solved.last_stretch_share <= 1
    heads, channels = (
        [solved.plan[group.name].numel() for group in groups] for groups in (structure.attention, structure.mlp)
    )
    assert max(heads) == min(heads)
    assert max(channels) - min(channels) <= 1


def test_an_unreachable_target_says_how_far_it_goes(loaded: LoadedModel) -> None:
    structure = loaded.structure
    scores = random_scores(structure, 0)
    most = removed_params(structure, uniform_plan(scores, structure, 1.0)) / loaded.params.total
    target = ParameterTarget(0.95, "total", loaded.params)
    with pytest.raises(UnreachableSparsityError, match=f"largest sparsity it reaches is {int(most * 1000) / 1000:.3f}"):
        meet_target(
            "test", partial(uniform_plan, scores, structure), structure, target, uniform_priority(scores, structure)
        )
