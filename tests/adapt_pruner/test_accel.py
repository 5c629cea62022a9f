"""Rounds of pruning and training: sizes, shares, resuming, and what the dense model is left as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapt_pruner import AdaptAccel, AdaptPruner
from adapt_pruner.recipes import forecast, load_recipe, recipe_names
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.errors import UserError
from harness.method import PrunedModel
from harness.models import LoadedModel
from harness.models.catalog import CATALOG
from harness.records import TrainingSpec
from harness.structure import count_parameters
from harness.training import PackedText, Session, StepLog, Trainer

MakeTiny = Callable[..., LoadedModel]
TEXT = PackedText(np.random.default_rng(0).integers(0, 96, 800).astype(np.uint32), 16)
SPEC = TrainingSpec(tokens=640, context_length=16, batch_tokens=64, learning_rate=1e-3)


def run(
    loaded: LoadedModel, calibration: Tensor, session: Session, sparsity: float = 0.3, **settings: Any
) -> PrunedModel:
    target = ParameterTarget(sparsity, "total", loaded.params)
    return AdaptAccel(**settings).prune_and_train(loaded, calibration, target, 0, session)


@pytest.mark.parametrize("rounds", [1, 3])
def test_every_round_ends_at_its_share_of_the_way_and_trains(
    any_tiny: LoadedModel, calibration: Tensor, rounds: int
) -> None:
    before = {name: p.clone() for name, p in any_tiny.model.named_parameters()}
    session = Session(SPEC, TEXT)
    answer = run(any_tiny, calibration, session, 0.2, rounds=rounds)
    target = ParameterTarget(0.2, "total", any_tiny.params)
    assert 0 <= target.excess(count_parameters(answer.model.named_parameters())) < any_tiny.structure.mlp[0].unit_params
    assert [log.step for log in session.log] == list(range(10))
    for name, parameter in any_tiny.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad


def test_fewer_samples_than_a_step_draws_are_all_drawn_unless_so_many_were_asked_for(
    make_tiny: MakeTiny, calibration: Tensor
) -> None:
    loaded = make_tiny("grouped-query")
    drawn = [run(loaded, calibration, Session(SPEC, TEXT), samples_per_step=n).kept for n in (8, 6)]
    assert AdaptAccel().samples_per_step == 8 > len(calibration) == 6
    assert all(torch.equal(units, drawn[1][name]) for name, units in drawn[0].items())
    with pytest.raises(UserError, match=r"adapt-accel.samples_per_step is 7, but there are 6"):
        run(loaded, calibration, Session(SPEC, TEXT), samples_per_step=7)


def test_sizes_fall_in_equal_steps_and_the_published_shares_of_tokens(make_tiny: MakeTiny, calibration: Tensor) -> None:
    loaded, sizes = make_tiny("grouped-query"), []

    def on_step(_log: StepLog, trainer: Trainer) -> None:
        sizes.append(count_parameters(trainer.model.named_parameters()).total)

    run(loaded, calibration, Session(SPEC, TEXT, on_step=on_step), rounds=4)
    targets = [ParameterTarget(0.3 * i / 4, "total", loaded.params).params for i in (1, 2, 3, 4)]
    expected = [targets[0]] + 2 * [targets[1]] + 3 * [targets[2]] + 4 * [targets[3]]
    channel = loaded.structure.mlp[0].unit_params
    assert all(0 <= size - target < channel for size, target in zip(sizes, expected, strict=True))


def test_one_round_without_training_is_adapt_pruner(make_tiny: MakeTiny, calibration: Tensor) -> None:
    loaded = make_tiny("grouped-query")
    targets = [ParameterTarget(0.3, "total", loaded.params)]
    (accel,) = AdaptAccel(rounds=1, last_heads="keep").prune(loaded, calibration, targets, 0)
    (pruner,) = AdaptPruner().prune(loaded, calibration, targets, 0)
    assert accel.kept is not None
    assert pruner.kept is not None
    assert all(torch.equal(accel.kept[name], pruner.kept[name]) for name in pruner.kept)


def test_small_rounds_still_take_heads(make_tiny: MakeTiny, calibration: Tensor) -> None:
    loaded = make_tiny("multi-head")
    (answer,) = AdaptAccel(rounds=12).prune(loaded, calibration, [ParameterTarget(0.45, "total", loaded.params)], 0)
    assert answer.kept is not None
    assert any("attention" in name for name in answer.kept)


@pytest.mark.parametrize("interrupted_at", [0, 3, 4, 9])
def test_a_course_that_is_taken_up_again_ends_as_if_it_had_not_stopped(
    make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path, interrupted_at: int
) -> None:
    undisturbed = Session(SPEC, TEXT)
    expected = run(make_tiny("grouped-query"), calibration, undisturbed, rounds=3)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(log: StepLog, _trainer: Trainer) -> None:
        if log.step == interrupted_at:
            raise Killed

    with pytest.raises(Killed):
        run(make_tiny("grouped-query"), calibration, Session(SPEC, TEXT, folder=tmp_path / "c", on_step=kill), rounds=3)
    resumed = Session(SPEC, TEXT, folder=tmp_path / "c")
    answer = run(make_tiny("grouped-query"), calibration, resumed, rounds=3)
    assert [log.loss for log in resumed.log] == [log.loss for log in undisturbed.log]
    for one, other in zip(answer.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert answer.trace == expected.trace


def test_what_cannot_be_is_refused(make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path) -> None:
    loaded = make_tiny("grouped-query")
    rounded = ParameterTarget(0.2, "total", loaded.params, round_to=8)
    with pytest.raises(UnreachableSparsityError, match="cannot round widths"):
        AdaptAccel().prune_and_train(loaded, calibration, rounded, 0, Session(SPEC, TEXT))
    run(loaded, calibration, Session(SPEC, TEXT, folder=tmp_path / "c"), rounds=2)
    other = SPEC.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(UserError, match="of another course"):
        run(loaded, calibration, Session(other, TEXT, folder=tmp_path / "c"), rounds=2)


@pytest.mark.parametrize("name", recipe_names())
def test_the_papers_recipes_can_be_foretold_without_weights(name: str) -> None:
    from harness.accel import forecast_of, plan_of

    recipe = load_recipe(name)
    assert recipe.model in CATALOG
    told = forecast_of(plan_of(recipe, [], {}, 0))
    assert told.dense.total == CATALOG[recipe.model].num_params
    assert len(told.rounds) == recipe.rounds
    assert told.rounds[-1].params == recipe.target_params
    assert sum(r.steps for r in told.rounds) == recipe.tokens // 131072
    falling = [r.intermediate_size for r in told.rounds]
    assert falling == sorted(falling, reverse=True)


def test_more_rounds_than_steps_are_refused(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("grouped-query")
    with pytest.raises(UserError, match="too few for 11 rounds"):
        list(forecast(AdaptAccel(rounds=11), loaded.structure, ParameterTarget(0.2, "total", loaded.params), SPEC))


def test_processes_that_see_other_gradients_go_on_with_the_units_of_the_first(
    make_tiny: MakeTiny, run_script: Callable[..., None], tmp_path: Path
) -> None:
    make_tiny("grouped-query").model.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("disagreeing_course.py")
    run_script(script, tmp_path / "model", tmp_path / "first", "0")
    run_script(script, tmp_path / "model", tmp_path / "second", "1")
    run_script(script, tmp_path / "model", tmp_path / "both", processes=2)
    names = ("first-0", "second-1", "both-0", "both-1")
    first, second, *both = (json.loads((tmp_path / name).read_text()) for name in names)
    assert second["kept"] != first["kept"]
    for told in both:
        assert told["kept"] == first["kept"]
        assert told["losses"] == pytest.approx(first["losses"], rel=1e-9)
