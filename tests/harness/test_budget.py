"""Targets, knobs and the last stretch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.budget import ParameterTarget, close_gap, solve_knob, unreachable
from harness.models import LoadedModel
from harness.records import ParamCounts
from harness.structure import removed_params

COUNTS = ParamCounts(total=1000, embedding=200, attention=300, mlp=480, extra=20)
MakeTiny = Callable[..., LoadedModel]


def test_target_counts_on_its_basis() -> None:
    assert ParameterTarget(0.25, "total", COUNTS).params == 750
    assert ParameterTarget(0.25, "non-embedding", COUNTS).params == 600
    assert ParameterTarget(0.25, "non-embedding", COUNTS).to_remove == 200


def test_target_is_met_from_above_only() -> None:
    target = ParameterTarget(0.2, "total", ParamCounts(total=10_000, embedding=0, attention=0, mlp=10_000, extra=0))

    def at(total: int) -> ParamCounts:
        return ParamCounts(total=total, embedding=0, attention=0, mlp=total, extra=0)

    assert target.is_met_by(at(8000), 0.0005)
    assert target.is_met_by(at(8005), 0.0005)
    assert not target.is_met_by(at(8006), 0.0005)
    assert not target.is_met_by(at(7999), 0.0005)


@given(st.floats(0, 0.99), st.integers(1, 10**10))
def test_target_never_asks_to_remove_more_than_its_share(sparsity: float, total: int) -> None:
    counts = ParamCounts(total=total, embedding=0, attention=0, mlp=total, extra=0)
    target = ParameterTarget(sparsity, "total", counts)
    assert target.to_remove <= total * sparsity + 1e-6 * max(total * 1e-9, 1)


def test_unreachable_says_the_largest_sparsity() -> None:
    assert "largest sparsity it reaches is 0.437" in str(
        unreachable("flap", ParameterTarget(0.5, "total", COUNTS), 437)
    )


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(to_remove=st.integers(0, 60_000), seed=st.integers(0, 5))
def test_solved_and_closed_plans_end_within_a_channel_of_the_target(
    make_tiny: MakeTiny, to_remove: int, seed: int
) -> None:
    structure = make_tiny("grouped-query").structure
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.num_units, generator=generator) for g in structure.groups}

    def plan_at(ratio: float) -> dict[str, torch.Tensor]:
        return {
            g.name: scores[g.name].argsort()[int(ratio * (g.num_units - 1)) :].sort().values for g in structure.groups
        }

    _, plan = solve_knob(plan_at, structure, to_remove)
    closed = close_gap(plan, structure, {g.name: scores[g.name] for g in structure.mlp}, to_remove)
    removed = removed_params(structure, closed)
    assert removed <= to_remove
    at_the_floor = all(closed[g.name].numel() == 1 for g in structure.mlp)
    assert at_the_floor or to_remove - removed < structure.mlp[0].unit_params


def test_last_stretch_takes_the_lowest_channels_of_all_layers(make_tiny: MakeTiny) -> None:
    structure = make_tiny("grouped-query").structure
    priority = {g.name: torch.arange(80.0) + 100 * g.layer for g in structure.mlp}
    closed = close_gap({}, structure, priority, to_remove=3 * structure.mlp[0].unit_params)
    assert closed["layers.0.mlp"].tolist() == list(range(3, 80))
    assert "layers.1.mlp" not in closed
