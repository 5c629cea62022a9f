"""Adapt-Accel: rounds of pruning a little and training a little, on one learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from adapt_pruner.adaptive import AdaptiveSteps
from adapt_pruner.course import Position
from adapt_pruner.sparsity import SparsityState
from harness.budget import ParameterTarget, UnreachableSparsityError
from harness.method import InterleavedMethod, LoadedModel, PrunedModel
from harness.models import remove_units
from harness.structure import KeepPlan, left_of
from harness.training import Session, Trainer, own_parameters
from harness.training.schedule import Split, round_ends


class AdaptAccel(AdaptiveSteps, InterleavedMethod):
    """Adapt-Pruner in rounds with training between them.

    Round i of n takes the model down to dense - (dense - target) i / n parameters, then trains it on its share of the
    tokens. One learning-rate schedule spans all rounds. Shares of the layers count from the dense model through all
    rounds, and a round that ends inside a step leaves the rest of that step to the next.

    Source: Adapt-Pruner (arXiv:2502.03460), section 3.3.
    Differs:
        - AdamW's moments are carried across a pruning step, cut like the weights they belong to (``carry_moments``);
          the published scripts start a new optimizer in every round.
        - The published scripts count a layer's share from the start of the round, so that no kv head leaves where
          rounds are small.
        - Inside a step the heads that fit leave (``last_heads``): a step that takes a head from many layers at once
          is larger than a round, and would otherwise never be taken.
    """

    name: ClassVar[str] = "adapt-accel"
    paper: ClassVar[str] = "arXiv:2502.03460"

    samples_per_step: Annotated[int, Field(ge=1)] | None = 8
    """Calibration sequences of one step, drawn anew for each: looks at all of them would take much of the time that is
    there for training. None takes all, always."""
    rounds: Annotated[int, Field(ge=1)] = 4
    """n: how often the model is pruned; about 5% of its parameters a round in the paper."""
    split: Split = "linear"
    """How the rounds share the tokens: linear gives round i 2 i / (n (n + 1)) of them."""
    carry_moments: bool = True
    """Whether AdamW goes on with its moments after a pruning step, or starts anew."""
    last_heads: Literal["keep", "fit"] = "fit"
    """Of the kv heads that a step wants to remove past a round's end: all stay, or the lowest-scored that fit leave."""

    def prune(
        self, loaded: LoadedModel, calibration: Tensor, targets: Sequence[ParameterTarget], seed: int
    ) -> Iterator[PrunedModel]:
        """The rounds without training; see ``PruningMethod.prune``."""
        for target in targets:
            self._check(loaded, calibration, target)
            position = Position.start(loaded.model, loaded.structure)
            for goal in self.goals(target):
                position = self._pruned_to(goal, position, calibration, seed)
            yield _answer(position, self.rounds)

    def prune_and_train(
        self, loaded: LoadedModel, calibration: Tensor, target: ParameterTarget, seed: int, session: Session
    ) -> PrunedModel:
        """One smaller, trained model; see ``InterleavedMethod.prune_and_train``."""
        self._check(loaded, calibration, target)
        position, trainer, begun = self._resumed(loaded, session)
        if trainer is not None:
            position = self._train(session, trainer, position, begun)
            begun += 1
        for number, goal in list(enumerate(self.goals(target)))[begun:]:
            before = position
            position = _agreed(session, before, self._pruned_to(goal, before, calibration, seed))
            trainer = self._trained_on(position, before, trainer, session)
            session.write(trainer, _place(position, number))
            position = self._train(session, trainer, position, number)
        position.model.requires_grad_(False)
        return _answer(position, self.rounds)

    def _train(self, session: Session, trainer: Trainer, position: Position, number: int) -> Position:
        """The steps that are left of a round; the position with the trained model."""
        ends = round_ends(trainer.total_steps, self.rounds, self.split)
        session.advance(trainer, ends[number], _place(position, number))
        return replace(position, model=trainer.whole_model())

    def goals(self, target: ParameterTarget) -> list[ParameterTarget]:
        """What every round prunes to: equal steps in parameters, the last the target itself."""
        shares = [target.sparsity * (i + 1) / self.rounds for i in range(self.rounds - 1)]
        return [*(replace(target, sparsity=share) for share in shares), target]

    def _check(self, loaded: LoadedModel, calibration: Tensor, target: ParameterTarget) -> None:
        self.check_samples(calibration)
        self.check_reachable(loaded.structure, target)
        if target.is_rounded:
            raise UnreachableSparsityError(
                f"{self.name} cannot round widths: units that left cannot come back once training went on without them"
            )

    def _pruned_to(self, goal: ParameterTarget, position: Position, calibration: Tensor, seed: int) -> Position:
        """The position of a round's end."""
        while position.removed < goal.to_remove:
            step = self.look(position, calibration, seed, goal)
            if self.overshoots(position, step, goal):
                ended = self.end_at(goal, position, step, calibration, seed)
                # The step was not taken whole: the next round takes up the rest of it.
                return replace(ended, state=position.state)
            position = position.after(step.plan, step)
        return position

    def _trained_on(self, position: Position, before: Position, trainer: Trainer | None, session: Session) -> Trainer:
        own_parameters(position.model)
        if trainer is None:
            return session.trainer(position.model)
        plan = left_of(position.dense, before.kept, position.kept)
        trainer.replace_model(position.model, before.structure, plan, carry=self.carry_moments)
        return trainer

    def _resumed(self, loaded: LoadedModel, session: Session) -> tuple[Position, Trainer | None, int]:
        """Where the session's checkpoint stands, its trainer, and the round it is in; the start where there is none."""
        found = session.checkpoint()
        if found is None:
            return Position.start(loaded.model, loaded.structure), None, 0
        position, number = _position(loaded, found.place)
        own_parameters(position.model)
        return position, session.trainer(position.model, found), number


def _place(position: Position, number: int) -> dict[str, JsonValue]:
    """For the checkpoint: the round, and all of the position but the weights."""
    return {
        "round": number,
        "kept": {name: units.tolist() for name, units in position.kept.items()},
        "state": position.state.to_json(),
        "trace": list(position.trace),
    }


def _agreed(session: Session, before: Position, position: Position) -> Position:
    """The first process's position after a round's pruning: gradients on several GPUs may differ in the last digit, and
    with them the units that are kept."""
    if session.accelerator is None:
        return position
    place: Any = session.agreed(_place(position, 0))
    kept = _read_kept(place["kept"])
    position = replace(position, kept=kept, state=SparsityState.from_json(place["state"]))
    plan = left_of(position.dense, before.kept, kept)
    return replace(position, model=remove_units(before.model, before.structure, plan))


def _read_kept(written: Any) -> KeepPlan:
    return {name: torch.tensor(units, dtype=torch.int64) for name, units in written.items()}


def _position(loaded: LoadedModel, place: Mapping[str, Any]) -> tuple[Position, int]:
    """What ``_place`` wrote; the model has the dense one's weights."""
    kept = _read_kept(place["kept"])
    model = remove_units(loaded.model, loaded.structure, kept)
    state = SparsityState.from_json(place["state"])
    return Position(model, loaded.structure, kept, state, tuple(place["trace"])), place["round"]


def _answer(position: Position, rounds: int) -> PrunedModel:
    return PrunedModel(
        model=position.model,
        knob={"rounds": float(rounds), "steps": float(position.state.steps)},
        trace={"steps": list(position.trace)},
        kept=position.kept,
    )
