"""Training pruned models of every kind back, in full or by low-rank updates, and going on after a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.budget import ParameterTarget
from harness.models import LoadedModel
from harness.records import TrainingSpec
from harness.registry import build_method
from harness.structure import count_parameters
from harness.training import PackedText, Session, StepLog, Trainer, recover

MakeTiny = Callable[..., LoadedModel]
TEXT = PackedText(np.random.default_rng(0).integers(0, 96, 800).astype(np.uint32), 16)


def spec(mode: Any, **changes: Any) -> TrainingSpec:
    values = {"tokens": 640, "context_length": 16, "batch_tokens": 64, "learning_rate": 3e-3} | changes
    return TrainingSpec(mode=mode, **values)


def pruned(loaded: LoadedModel, calibration: Tensor, method: str) -> Any:
    (answer,) = build_method(method).prune(loaded, calibration, [ParameterTarget(0.15, "total", loaded.params)], 0)
    return answer.model


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("method", ["flap", "slicegpt", "llm-pruner", "adapt-pruner"])
def test_training_lowers_the_loss_and_leaves_size_and_dense_model_alone(
    make_tiny: MakeTiny, calibration: Tensor, method: str, mode: str
) -> None:
    loaded = make_tiny("biased")
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    model = pruned(loaded, calibration, method)
    params, names = count_parameters(model.named_parameters()), [name for name, _ in model.named_parameters()]
    session = Session(spec(mode, tokens=4 * 800), TEXT)
    recover(model, session)
    assert session.log[-1].loss < session.log[0].loss
    assert count_parameters(model.named_parameters()) == params
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(p.requires_grad for p in model.parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_low_rank_updates_leave_everything_but_linear_maps_alone(make_tiny: MakeTiny, calibration: Tensor) -> None:
    model = pruned(make_tiny("biased"), calibration, "flap")
    before = {name: p.clone() for name, p in model.named_parameters()}
    recover(model, Session(spec("lora"), TEXT))
    for name, parameter in model.named_parameters():
        learns = name.endswith("proj.weight")
        assert torch.equal(parameter, before[name]) == (not learns), name


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_stopped_training_goes_on_where_it_was_written_down(
    make_tiny: MakeTiny, calibration: Tensor, tmp_path: Path, mode: str
) -> None:
    whole = Session(spec(mode), TEXT)
    recover(expected := pruned(make_tiny("tied"), calibration, "flap"), whole)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(log: StepLog, trainer: Trainer) -> None:
        if log.step == 5:
            stopped.write(trainer, {})
        if log.step == 7:
            raise Killed

    stopped = Session(spec(mode), TEXT, folder=tmp_path / "c", on_step=kill)
    with pytest.raises(Killed):
        recover(pruned(make_tiny("tied"), calibration, "flap"), stopped)
    resumed = Session(spec(mode), TEXT, folder=tmp_path / "c")
    recover(found := pruned(make_tiny("tied"), calibration, "flap"), resumed)
    assert [log.loss for log in resumed.log] == [log.loss for log in whole.log]
    assert resumed.seconds_here < resumed.seconds
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    resumed.finish()
    assert not (tmp_path / "c").exists()


def test_only_the_last_checkpoint_is_kept_and_leftovers_are_not_read(make_tiny: MakeTiny, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    session = Session(spec("full"), TEXT, folder=folder)
    trainer = session.trainer(make_tiny("tied").model)
    for until in (1, 2, 3):
        session.advance(trainer, until, {})
        session.write(trainer, {"round": until})
    (folder / ".12345678").mkdir()
    assert [entry.name for entry in sorted(folder.glob("[0-9]*"))] == ["000002"]
    found = Session(spec("full"), TEXT, folder=folder).checkpoint()
    assert found is not None
    assert (found.step, found.place) == (3, {"round": 3})
