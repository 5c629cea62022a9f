"""Methods broken in ways that still prune to size and run: the check of a real comparison notices every one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import baselines.flap
import baselines.gradients
import baselines.importance
import baselines.slicegpt_rotation
from harness.records import CalibrationSpec, EvaluationSpec, ModelRef, RunSpec
from harness.registry import build_method
from harness.regression import Limits, regress
from harness.report.scores import COMMONSENSE
from harness.runner import run_track
from harness.store import Store
from harness.track import Track

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

METHODS = ("adapt-pruner", "flap", "llm-pruner", "slicegpt")
# Seventy answers tell a collapse from a tie and no more; the loss on 2048 tokens tells much smaller damage.
LIMITS = Limits(tolerance=25.0, max_loss_increase=0.05)

Patch = pytest.MonkeyPatch


def make(method: str, out: Path, sparsity: float = 0.2, **options: Any) -> Store:
    """One run of a method on the embedded model."""
    changed = {"samples_per_step": 4} if method == "adapt-pruner" else {}
    spec = RunSpec(
        model=ModelRef(name="smollm2-135m"),
        method=method,
        method_params=build_method(method, changed).model_dump(mode="json"),
        sparsity=sparsity,
        calibration=CalibrationSpec(num_samples=16, num_tokens=128),
        evaluation=EvaluationSpec(tasks=COMMONSENSE, limit=10, heldout_tokens=2048),
    )
    run_track(Track(specs=(spec,), out=out, **options), lambda _event: None)
    store = Store(out)
    assert store.load(spec.run_id).status == "ok", store.load(spec.run_id).traceback
    return store


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Store]:
    """The run of a method as it is, made once."""
    made: dict[tuple[str, float], Store] = {}

    def of(method: str, sparsity: float = 0.2) -> Store:
        if (method, sparsity) not in made:
            made[method, sparsity] = make(method, tmp_path_factory.mktemp(method), sparsity)
        return made[method, sparsity]

    return of


def head_scores_of_the_next_kv_group(patch: Patch) -> None:
    fold = baselines.importance.fold_query_channels

    def wrong(query_C: Tensor, head_dim: int, *rest: Any) -> Tensor:
        return fold(query_C, head_dim, *rest).roll(head_dim)

    patch.setattr(baselines.importance, "fold_query_channels", wrong)


def the_highest_scored_units_leave(patch: Patch) -> None:
    scores = baselines.gradients.channel_scores
    patch.setattr(baselines.gradients, "channel_scores", lambda *args, **kw: -scores(*args, **kw))


def nothing_replaces_what_was_removed(patch: Patch) -> None:
    lost = baselines.flap._lost_mean
    patch.setattr(baselines.flap, "_lost_mean", lambda *args: torch.zeros_like(lost(*args)))


def one_layer_keeps_its_least_axes(patch: Patch) -> None:
    axes, calls = baselines.slicegpt_rotation.principal_axes, []

    def wrong(moments: Tensor, damping: float) -> Any:
        calls.append(1)
        return axes(-moments if len(calls) == 30 else moments, damping)

    patch.setattr(baselines.slicegpt_rotation, "principal_axes", wrong)


BROKEN = [
    ("adapt-pruner", 0.2, the_highest_scored_units_leave),
    ("llm-pruner", 0.4, head_scores_of_the_next_kv_group),  # at 20% no head leaves
    ("llm-pruner", 0.2, the_highest_scored_units_leave),
    ("flap", 0.2, nothing_replaces_what_was_removed),
    ("slicegpt", 0.2, one_layer_keeps_its_least_axes),
]


@pytest.mark.parametrize(("method", "sparsity", "broken"), BROKEN, ids=[f"{m}: {b.__name__}" for m, _, b in BROKEN])
def test_a_broken_method_fails(
    method: str,
    sparsity: float,
    broken: Callable[[Patch], None],
    reference: Callable[..., Store],
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    before = reference(method, sparsity)
    broken(monkeypatch)
    found = regress(before, make(method, tmp_path, sparsity), LIMITS)
    print(f"{method}, {broken.__name__}: " + "; ".join(check.text for run in found.runs for check in run.checks))
    assert found.verdict == "fail"
    (run,) = found.runs
    before_size, after_size = run.pair.reference.params_after, run.pair.candidate.params_after
    assert before_size is not None
    assert after_size is not None
    assert after_size.total == pytest.approx(before_size.total, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_other_batches_pass(method: str, reference: Callable[..., Store], tmp_path: Path) -> None:
    found = regress(reference(method), make(method, tmp_path, batch_tokens=777), LIMITS)
    assert found.verdict == "pass"
