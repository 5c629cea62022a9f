"""The loop: where it ends, what it depends on, and what it refuses, on tiny float64 models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adapt_pruner import AdaptPruner
from adapt_pruner.course import Position
from adapt_pruner.layer_importance import LayerImportance
from baselines.importance import Criterion
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.errors import UserError
from harness.method import PrunedModel
from harness.models import LoadedModel, remove_units
from harness.structure import count_parameters


def targets_of(loaded: LoadedModel, *sparsities: float) -> list[ParameterTarget]:
    return [ParameterTarget(sparsity=s, basis="total", dense=loaded.params) for s in sparsities]


def pruned(
    method: AdaptPruner, loaded: LoadedModel, calibration: Tensor, *sparsities: float, seed: int = 0
) -> list[PrunedModel]:
    return list(method.prune(loaded, calibration, targets_of(loaded, *sparsities), seed))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


def assert_same(one: Any, other: Any) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def steps(answer: PrunedModel) -> Sequence[dict[str, Any]]:
    return answer.trace["steps"]  # type: ignore[return-value]


@pytest.mark.parametrize("last_heads", ["keep", "fit"])
@pytest.mark.parametrize("sparsity", [0.03, 0.2, 0.33])
def test_the_exact_stop_ends_within_one_channel_and_never_overshoots(
    tiny: LoadedModel, calibration: Tensor, sparsity: float, last_heads: Any
) -> None:
    (target,) = targets_of(tiny, sparsity)
    (answer,) = AdaptPruner(last_heads=last_heads).prune(tiny, calibration, [target], 0)
    excess = target.excess(count_parameters(answer.model.named_parameters()))
    assert 0 <= excess < tiny.structure.mlp[0].unit_params


@pytest.mark.parametrize("stop", ["exact", "published"])
def test_a_model_does_not_depend_on_other_targets(tiny: LoadedModel, calibration: Tensor, stop: Any) -> None:
    method = AdaptPruner(stop=stop)
    alone = pruned(method, tiny, calibration, 0.35)[-1]
    after_others = pruned(method, tiny, calibration, 0.1, 0.11, 0.3, 0.35)[-1]
    assert_same(alone.model, after_others.model)
    assert alone.trace == after_others.trace


def test_the_published_stop_overshoots_by_no_more_than_its_last_step(tiny: LoadedModel, calibration: Tensor) -> None:
    (target,) = targets_of(tiny, 0.2)
    (answer,) = AdaptPruner(stop="published").prune(tiny, calibration, [target], 0)
    counts = [step["params"] for step in steps(answer)]
    assert counts[-1] <= target.params < counts[-2]
    assert counts[-1] == count_parameters(answer.model.named_parameters()).total


@pytest.mark.parametrize("importance", ["param_first", "param_second", "param_mix", "vectorize", "l1", "l2"])
def test_the_same_seed_gives_the_same_weights_under_every_criterion(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor, importance: Criterion
) -> None:
    method = AdaptPruner(importance=importance, samples_per_step=3)
    loaded = make_tiny("grouped-query")
    one, other = (pruned(method, loaded, calibration, 0.2, seed=5)[0] for _ in range(2))
    assert_same(one.model, other.model)
    assert one.trace == other.trace


def test_sequences_are_drawn_anew_at_each_step_and_for_each_seed(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor
) -> None:
    method = AdaptPruner(samples_per_step=2, amplitude=0)
    loaded = make_tiny("grouped-query")
    losses = {
        seed: [step["loss"] for step in steps(pruned(method, loaded, calibration, 0.1, seed=seed)[0])]
        for seed in (0, 1)
    }
    assert losses[0][0] != losses[1][0]
    whole = [step["loss"] for step in steps(pruned(AdaptPruner(amplitude=0), loaded, calibration, 0.1)[0])]
    spread = [max(values) - min(values) for values in (losses[0], whole)]
    assert spread[0] > spread[1]


def test_the_dense_model_is_left_as_it_was(tiny: LoadedModel, calibration: Tensor) -> None:
    before = weights(tiny.model)
    pruned(AdaptPruner(), tiny, calibration, 0.2)
    after = dict(tiny.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in tiny.model.parameters())
    assert not tiny.model.model.layers[0]._forward_hooks


def test_what_is_left_is_the_dense_model_cut_once(tiny: LoadedModel, calibration: Tensor) -> None:
    method = AdaptPruner(amplitude=0.04)
    (target,) = targets_of(tiny, 0.3)
    position = Position.start(tiny.model, tiny.structure)
    while position.removed < target.to_remove:
        step = method.look(position, calibration, 0, target)
        position = position.after(step.plan, step)
    assert_same(position.model, remove_units(tiny.model, tiny.structure, position.kept))


def test_the_first_step_removes_nothing_from_the_most_important_layer(tiny: LoadedModel, calibration: Tensor) -> None:
    # With A = 1/T the layer of normalised importance 1 stays at share 0 as long as it leads.
    method = AdaptPruner(max_steps=10, amplitude=0.1)
    step = method.look(Position.start(tiny.model, tiny.structure), calibration, 0, targets_of(tiny, 0.2)[0])
    importance: list[float] = step.told["layer_importance"]  # type: ignore[assignment]
    most = importance.index(max(importance))
    least = importance.index(min(importance))
    if max(importance) + min(importance) > 2 * sum(importance) / 3:  # the largest magnitude is the leader's
        assert step.state.per_layer[most] == pytest.approx(0)
    assert step.state.per_layer[least] > 0.1
    assert f"layers.{least}.mlp" in step.plan


def test_uniform_steps_ask_no_layer_for_its_importance(tiny: LoadedModel, calibration: Tensor) -> None:
    (answer,) = pruned(AdaptPruner(adaptive=False, stop="published"), tiny, calibration, 0.2)
    for t, step in enumerate(steps(answer), start=1):
        assert step["layer_importance"] is None
        assert step["sparsity"] == [pytest.approx(t / 50)] * 3
        assert step["intermediate_size"] == [int(80 * (1 - t / 50))] * 3


def test_the_trace_tells_each_step_in_json(make_tiny: Callable[..., LoadedModel], calibration: Tensor) -> None:
    loaded = make_tiny("grouped-query")
    (answer,) = pruned(AdaptPruner(), loaded, calibration, 0.1)
    assert json.loads(json.dumps(answer.trace)) == answer.trace
    assert answer.knob["steps"] == len(steps(answer))
    with torch.no_grad():
        dense_loss = loaded.model(calibration, labels=calibration).loss.item()
    first = steps(answer)[0]
    assert first["loss"] == pytest.approx(dense_loss, rel=1e-6)  # transformers takes the loss in float32
    layers = LayerImportance(3)
    handles = [
        layer.register_forward_hook(lambda _m, args, out, i=i: layers.observe(i, args[0], out))
        for i, layer in enumerate(loaded.model.model.layers)
    ]
    with torch.no_grad():
        loaded.model(calibration)
    for handle in handles:
        handle.remove()
    assert first["layer_importance"] == pytest.approx(layers.raw().tolist(), rel=1e-12)


def test_a_target_no_course_can_reach_fails_before_any_pass(tiny: LoadedModel) -> None:
    nothing_to_run = torch.empty(0, 16, dtype=torch.int64)
    with pytest.raises(UnreachableSparsityError, match=r"adapt-pruner cannot remove 95.0%.* it reaches is 0\.\d+"):
        pruned(AdaptPruner(), tiny, nothing_to_run, 0.95)


def test_a_target_beyond_the_last_step_says_how_far_the_course_came(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor
) -> None:
    loaded = make_tiny("grouped-query")
    answers = AdaptPruner(max_steps=2, amplitude=0.5).prune(loaded, calibration, targets_of(loaded, 0.05, 0.69), 0)
    assert next(answers).knob["steps"] == 1
    with pytest.raises(UnreachableSparsityError, match=r"cannot remove 69.0%.* it reaches is 0.[456]"):
        next(answers)


def test_more_samples_a_step_than_there_are_is_the_users_error(tiny: LoadedModel, calibration: Tensor) -> None:
    with pytest.raises(UserError, match="samples_per_step is 7, but there are 6"):
        pruned(AdaptPruner(samples_per_step=7), tiny, calibration, 0.1)


def test_a_position_carries_shares_over_rounds_so_that_heads_leave(
    make_tiny: Callable[..., LoadedModel], calibration: Tensor
) -> None:
    loaded = make_tiny("tied")  # 3 kv heads: none leaves below a share of a third, which no single round reaches
    method = AdaptPruner(last_heads="fit", amplitude=0)
    position = Position.start(loaded.model, loaded.structure)
    for target in targets_of(loaded, 0.1, 0.2, 0.3, 0.4):
        step = method.look(position, calibration, 0, target)
        while position.removed + _removed(position, step) <= target.to_remove:
            position = position.after(step.plan, step)
            step = method.look(position, calibration, 0, target)
        position = method.end_at(target, position, step, calibration, 0)
        assert target.excess(count_parameters(position.model.named_parameters())) in range(144)
    assert any(group.num_units < 3 for group in position.structure.attention)
    assert position.state.steps == len(position.trace)


def _removed(position: Position, step: Any) -> int:
    from harness.structure import removed_params

    return removed_params(position.structure, step.plan)
