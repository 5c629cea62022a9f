"""A track in this process: what a method must not do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.magnitude import Magnitude
from harness.errors import UserError
from harness.records import EvaluationSpec, ModelRef, RunSpec
from harness.registry import METHODS, method_class
from harness.runner import run_track
from harness.store import Store
from harness.track import Track
from harness.weights import fingerprint


def test_a_method_that_changes_the_dense_model_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faithful = Magnitude.prune

    def prune(self: Magnitude, loaded: Any, *rest: Any) -> Iterator[Any]:
        loaded.model.model.layers[0].mlp.down_proj.weight.data.mul_(1.01)
        yield from faithful(self, loaded, *rest)

    monkeypatch.setattr(Magnitude, "prune", prune)
    spec = RunSpec(
        model=ModelRef(name=str(checkpoint)),
        method="magnitude",
        sparsity=0.02,
        basis="non-embedding",
        calibration=None,
        evaluation=EvaluationSpec(tasks=("arc_easy",), limit=1, heldout_tokens=64),
    )
    run_track(Track(specs=(spec,), out=tmp_path), lambda _event: None)
    record = Store(tmp_path).load(spec.run_id)
    assert record.status == "failed"
    assert "magnitude changed the dense model" in str(record.reason)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fingerprint_tells_any_changed_weight(dtype: torch.dtype) -> None:
    weights = [torch.randn(8, 6, dtype=dtype).T, torch.randn(3, dtype=dtype)]
    before = fingerprint(weights)
    assert fingerprint([weight.clone() for weight in weights]) == before
    weights[0][2, 3] = torch.nextafter(weights[0][2, 3], torch.tensor(9.0, dtype=dtype))
    assert fingerprint(weights) != before


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere:Method", "cannot be imported"),
        ("harness.method:Nothing", "cannot be imported"),
        ("harness.method", "cannot be imported"),
        ("harness.store:Store", "is no PruningMethod"),
        ("harness.method:PruningMethod", "is no PruningMethod"),
    ],
)
def test_a_plugin_that_is_no_method_is_one_sentence(monkeypatch: pytest.MonkeyPatch, place: str, said: str) -> None:
    monkeypatch.setitem(METHODS, "plugin", place)
    with pytest.raises(UserError, match=said):
        method_class("plugin")
