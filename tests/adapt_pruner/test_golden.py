"""Against figures measured on the published implementation, step by step, on the embedded model."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapt_pruner import AdaptPruner
from adapt_pruner.course import Position, Step
from adapt_pruner.layer_importance import normalise
from harness.budget import ParameterTarget
from harness.models import load_model
from harness.records import ModelRef

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS: dict[str, dict[str, str]] = {
    "c1_adapt_a002_t80": {},
    "c5_adapt_a002_t80_l2": {"importance": "l2"},
    "c6_adapt_a002_t80_manhattan": {"layer_importance": "manhattan"},
}
C1, C5, C6 = SETTINGS
NEAR = 1e-4
"""Relative distance from the cut within which float32 may order units either way."""

FIRST_STEPS = [pytest.param(C1, 2, id="c1"), pytest.param(C5, 2, id="c5"), pytest.param(C6, 1, id="c6")]
WHOLE_COURSES = [
    pytest.param(C1, marks=pytest.mark.slow, id="c1"),
    pytest.param(C5, marks=pytest.mark.slow, id="c5"),
    pytest.param(C6, marks=pytest.mark.slow, id="c6"),
]


@dataclass(frozen=True)
class Walk:
    """Our course at the published settings, and the units that came near a cut on it."""

    position: Position
    first: Step
    near_cut: dict[str, set[int]]
    """Group name -> units, in the dense model's numbering."""


@cache
def published(case: str) -> dict[str, Any]:
    with gzip.open(GOLDEN / "adapt_pruner.json.gz", "rt") as file:
        return next(entry for entry in json.load(file)["cases"] if entry["name"] == case)


def tokens(name: str) -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / name)).long()


@cache
def walk(case: str, max_steps: int | None = None) -> Walk:
    loaded = load_model(ModelRef(name="smollm2-135m"))
    method = AdaptPruner(**AdaptPruner.published, **SETTINGS[case])  # type: ignore[arg-type]
    target = ParameterTarget(sparsity=0.2, basis="total", dense=loaded.params)
    calibration = tokens("calibration_tokens.npy")[:16, :64]
    position = Position.start(loaded.model, loaded.structure)
    steps: list[Step] = []
    near: dict[str, set[int]] = {}
    while position.removed < target.to_remove and len(steps) != max_steps:
        step = method.look(position, calibration, 0, target)
        add_near(near, position, step)
        position = position.after(step.plan, step)
        steps.append(step)
    return Walk(position, steps[0], near)


def add_near(near: dict[str, set[int]], position: Position, step: Step) -> None:
    for name, kept in step.plan.items():
        group = position.structure.by_name[name]
        before = position.kept.get(name, torch.arange(group.num_units))
        scores = step.scores[name].double()
        cut = scores[kept].min()
        close = (scores - cut).abs() <= NEAR * cut
        if close.sum() > 1:
            near.setdefault(name, set()).update(before[close].tolist())


def kept_units(found: Walk, name: str) -> set[int]:
    whole = torch.arange(found.position.dense.by_name[name].num_units)
    return set(found.position.kept.get(name, whole).tolist())


def assert_steps_agree(case: str, found: Walk) -> None:
    theirs = published(case)
    trace: tuple[Any, ...] = found.position.trace
    for i, ours in enumerate(trace):
        raw = theirs["layer_importance_raw_all_iterations"][i]
        assert ours["layer_importance"] == pytest.approx(raw, rel=1e-4)
        assert ours["sparsity"] == pytest.approx(theirs["target_sparsity_all_iterations"][i], rel=1e-4, abs=1e-8)
        assert ours["num_key_value_heads"] == theirs["kv_heads_all_iterations"][i]
        assert ours["intermediate_size"] == theirs["ffn_width_all_iterations"][i]
        assert ours["params"] == theirs["params_after_iteration"][i]


@pytest.mark.parametrize(("case", "num_steps"), FIRST_STEPS)
def test_the_first_steps_are_the_published_ones(case: str, num_steps: int) -> None:
    assert_steps_agree(case, walk(case, num_steps))


@pytest.mark.parametrize(("case", "num_steps"), FIRST_STEPS)
def test_the_first_scores_are_the_published_ones(case: str, num_steps: int) -> None:
    theirs, first = published(case), walk(case, num_steps).first
    raw = torch.tensor(first.told["layer_importance"], dtype=torch.float64)
    assert normalise(raw).tolist() == pytest.approx(theirs["layer_importance_iter1_normalised"], rel=1e-4, abs=1e-7)
    for layer in range(30):
        heads, channels = first.scores[f"layers.{layer}.attention"], first.scores[f"layers.{layer}.mlp"]
        assert heads.tolist() == pytest.approx(theirs["iter1_kv_head_importance"][layer], rel=1e-4)
        assert channels.double().sum().item() == pytest.approx(theirs["iter1_ffn_importance_sum"][layer], rel=1e-4)
        assert channels[:8].tolist() == pytest.approx(theirs["iter1_ffn_importance_first8"][layer], rel=1e-4)


@pytest.mark.parametrize("case", WHOLE_COURSES)
def test_the_whole_course_is_the_published_one(case: str) -> None:
    found = walk(case)
    assert len(found.position.trace) == published(case)["iterations"]
    assert_steps_agree(case, found)


@pytest.mark.parametrize("case", WHOLE_COURSES)
def test_the_kept_units_are_the_published_ones_but_for_near_ties(case: str) -> None:
    found, theirs = walk(case), published(case)
    for layer in range(30):
        assert kept_units(found, f"layers.{layer}.attention") == set(theirs["kept_kv_head_indices"][layer])
        name = f"layers.{layer}.mlp"
        ours, kept = kept_units(found, name), set(range(1536)) - set(theirs["removed_mlp_channels"][layer])
        assert len(ours & kept) >= 0.995 * len(kept)
        assert ours ^ kept <= found.near_cut.get(name, set())


@pytest.mark.parametrize("case", WHOLE_COURSES)
def test_the_heldout_loss_is_the_published_one(case: str) -> None:
    heldout, model = tokens("heldout_tokens.npy"), walk(case).position.model
    with torch.no_grad():
        losses = [model(batch, labels=batch).loss.item() for batch in (heldout[:8], heldout[8:16])]
    assert sum(losses) / 2 == pytest.approx(published(case)["eval_nll_after"], abs=2e-3)
