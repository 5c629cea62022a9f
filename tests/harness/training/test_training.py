"""The training loop's parts against torch's own, and its promises: the same course whatever the micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from harness.models import LoadedModel, remove_units
from harness.records import TrainingSpec
from harness.training import PackedText, StepLog, Trainer, TrainingDivergedError
from harness.training.schedule import round_ends, shares, warmup_stable_decay

MakeTiny = Callable[..., LoadedModel]
SPEC: dict[str, Any] = {"tokens": 640, "context_length": 16, "batch_tokens": 64, "learning_rate": 1e-2}


def text(num_tokens: int = 800) -> PackedText:
    return PackedText(np.random.default_rng(0).integers(0, 96, num_tokens).astype(np.uint32), 16)


def course(loaded: LoadedModel, until: int | None = None, **changes: Any) -> list[StepLog]:
    trainer, log = Trainer(loaded.model, text(), TrainingSpec(**(SPEC | changes))), []
    trainer.advance(until or trainer.total_steps, log.append)
    return log


def test_the_rate_rises_stays_and_falls_to_the_minimum() -> None:
    rates = [warmup_stable_decay(step, 40, 1.0, 0.1) for step in range(40)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[35] == 1.0
    assert rates[36:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


def test_later_rounds_get_more_tokens() -> None:
    assert shares(4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert shares(2, "constant") == [0.5, 0.5]
    assert sum(shares(5, "cosine")) == pytest.approx(1)
    assert round_ends(10, 4) == [1, 3, 6, 10]
    assert round_ends(4, 4) == [1, 2, 3, 4]


def test_every_pass_reads_every_window_once_in_another_order() -> None:
    whole = text()
    first, second = (whole.batch(start, whole.num_windows, seed=1).tokens_BT for start in (0, whole.num_windows))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert not torch.equal(first, second)
    assert torch.equal(whole.batch(5, 3, seed=1).tokens_BT, first[5:8])
    assert not whole.batch(0, 2, seed=1).scored_BT[:, 0].any()


def test_the_loss_falls_and_micro_batches_change_nothing(make_tiny: MakeTiny) -> None:
    small, large = (course(make_tiny("tied"), micro_batch_tokens=size) for size in (16, 64))
    assert small[-1].loss < small[0].loss - 0.3
    assert [log.loss for log in small] == pytest.approx([log.loss for log in large], rel=1e-9)
    assert [log.tokens for log in small[:2]] == [64, 128]


def test_distilling_pulls_towards_the_teacher(make_tiny: MakeTiny) -> None:
    teacher, student = make_tiny("tied").model, make_tiny("grouped-query").model
    tokens = text().batch(0, 4, seed=0).tokens_BT

    def divergence() -> float:
        with torch.no_grad():
            ours, theirs = (m(tokens).logits.log_softmax(-1) for m in (student, teacher))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    before = divergence()
    trainer = Trainer(student, text(), TrainingSpec(**SPEC, distillation=1.0, temperature=2.0), teacher=teacher)
    trainer.advance(trainer.total_steps)
    assert divergence() < 0.8 * before


def test_a_model_that_is_its_own_teacher_learns_nothing_from_it(make_tiny: MakeTiny) -> None:
    model, same = make_tiny("tied").model, make_tiny("tied").model
    log: list[StepLog] = []
    Trainer(model, text(), TrainingSpec(**SPEC, distillation=1.0), teacher=same).advance(1, log.append)
    assert log[0].gradient_norm < 1e-9


def test_checkpointing_and_a_pause_change_nothing(make_tiny: MakeTiny) -> None:
    whole = course(make_tiny("grouped-query"))
    assert [log.loss for log in course(make_tiny("grouped-query"), gradient_checkpointing=True)] == pytest.approx(
        [log.loss for log in whole], rel=1e-9
    )
    trainer, log = Trainer(make_tiny("grouped-query").model, text(), TrainingSpec(**SPEC)), []
    trainer.advance(4, log.append)
    trainer.advance(trainer.total_steps, log.append)
    assert [entry.loss for entry in log] == [entry.loss for entry in whole]


@pytest.mark.parametrize("carry", [True, False])
def test_pruning_takes_the_moments_of_kept_units_along(carry: bool, make_tiny: MakeTiny) -> None:
    loaded = make_tiny("grouped-query")
    trainer = Trainer(loaded.model, text(), TrainingSpec(**SPEC))
    trainer.advance(3)
    name = "model.layers.0.mlp.down_proj.weight"
    before = trainer.optimizer_state()["exp_avg"][name].clone()
    kept = torch.tensor([0, 5, 79])
    plan = {"layers.0.mlp": kept}
    trainer.replace_model(remove_units(loaded.model, loaded.structure, plan), loaded.structure, plan, carry=carry)
    state = trainer.optimizer_state()
    if carry:
        assert torch.equal(state["exp_avg"][name], before[:, kept])
        assert float(state["step"][name]) == 3
    else:
        assert not state["exp_avg"]
    trainer.advance(6)
    assert trainer.optimizer_state()["exp_avg"][name].shape == (48, 3)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_model(make_tiny: MakeTiny) -> None:
    loaded = make_tiny("tied")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TrainingDivergedError, match=r"the loss of step 0 is nan at learning rate .* windows 0\.\.3"):
        course(loaded)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
