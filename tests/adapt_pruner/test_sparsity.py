"""The update of the layers' shares and the widths they stand for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt_pruner.sparsity import MAX_SPARSITY, SparsityState, channels_kept, heads_kept

shares = st.floats(0, MAX_SPARSITY)
importances = st.floats(-1, 1)
layers = st.lists(st.tuples(shares, importances), min_size=1, max_size=30)


def test_a_step_moves_shares_as_worked_out_by_hand() -> None:
    state = SparsityState((0.0, 0.1, 0.5, 0.98), steps=3)
    moved = state.adapted([1.0, 0.5, -1.0, -0.5], max_steps=50, amplitude=0.02)
    assert moved.per_layer == pytest.approx((0.0, 0.11, 0.54, 0.99))  # 0.98 + 0.03 is more than a layer may lose
    assert moved.steps == 4


def test_a_share_may_fall_but_not_below_zero() -> None:
    state = SparsityState((0.5, 0.01))
    assert state.adapted([1.0, 1.0], max_steps=50, amplitude=0.1).per_layer == pytest.approx((0.42, 0.0))


@given(layers, st.integers(1, 100), st.floats(0, 1))
def test_shares_stay_between_zero_and_the_most_a_layer_may_lose(
    given_layers: list[tuple[float, float]], max_steps: int, amplitude: float
) -> None:
    per_layer, importance = zip(*given_layers, strict=True)
    moved = SparsityState(per_layer).adapted(importance, max_steps, amplitude)
    assert all(0 <= s <= MAX_SPARSITY for s in moved.per_layer)


@given(st.lists(importances, min_size=2, max_size=30), st.integers(2, 100), st.floats(0, 1))
def test_the_mean_share_rises_by_one_step_or_more_below_the_cap(
    importance: list[float], max_steps: int, amplitude: float
) -> None:
    centred = [i - sum(importance) / len(importance) for i in importance]
    moved = SparsityState((0.0,) * len(centred)).adapted(centred, max_steps, amplitude)
    if max(moved.per_layer) < MAX_SPARSITY:
        assert sum(moved.per_layer) / len(centred) >= 1 / max_steps - 1e-9


@given(layers, st.integers(1, 100))
def test_no_share_falls_while_the_amplitude_is_at_most_one_step(
    given_layers: list[tuple[float, float]], max_steps: int
) -> None:
    per_layer, importance = zip(*given_layers, strict=True)
    moved = SparsityState(per_layer).adapted(importance, max_steps, amplitude=1 / max_steps)
    assert all(after >= before - 1e-12 for before, after in zip(per_layer, moved.per_layer, strict=True))


@given(shares, importances, importances, st.floats(0, 1))
def test_the_less_important_of_two_equal_layers_never_keeps_more(
    share: float, one: float, other: float, amplitude: float
) -> None:
    a, b = SparsityState((share, share)).adapted([one, other], 50, amplitude).per_layer
    assert (a - b) * (one - other) <= 0


def test_uniform_shares_are_the_step_over_all_steps() -> None:
    state = SparsityState.dense(2)
    for _ in range(7):
        state = state.uniform(50)
    assert state == SparsityState((0.14, 0.14), 7)


def test_uniform_shares_end_at_the_cap() -> None:
    assert SparsityState((0.9,), 9).uniform(10).per_layer == (MAX_SPARSITY,)


def test_of_three_heads_the_first_leaves_at_a_third_and_the_last_never() -> None:
    assert [heads_kept(3, 64, s) for s in (0, 0.328, 0.329, 0.661, 0.662, 0.99)] == [3, 3, 2, 2, 1, 1]


def test_widths_count_from_the_dense_model() -> None:
    assert channels_kept(1536, 0.0) == 1536
    assert channels_kept(1536, 0.01799172) == 1508  # 1508.36
    assert channels_kept(1536, 0.99) == 15


@given(st.integers(1, 64), st.sampled_from([1, 8, 64, 128]), shares)
def test_something_of_every_layer_stays(num_units: int, head_dim: int, share: float) -> None:
    assert 1 <= channels_kept(num_units, share) <= num_units
    assert 1 <= heads_kept(num_units, head_dim, share) <= num_units


@given(st.integers(1, 64), st.sampled_from([8, 64]), shares, shares)
def test_a_larger_share_never_keeps_more(num_units: int, head_dim: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert channels_kept(num_units, high) <= channels_kept(num_units, low)
    assert heads_kept(num_units, head_dim, high) <= heads_kept(num_units, head_dim, low)


@given(st.lists(shares, min_size=1), st.integers(0, 50))
def test_a_state_survives_json(per_layer: list[float], steps: int) -> None:
    state = SparsityState(tuple(per_layer), steps)
    assert SparsityState.from_json(json.loads(json.dumps(state.to_json()))) == state
