"""A course of training that survives being killed: checkpoints written whole or not at all, and read back."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from pydantic import JsonValue
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.durable import disk_errors, remove, sync_folder, write_synced
from harness.errors import UserError
from harness.records import TrainingSpec
from harness.training.data import PackedText
from harness.training.trainer import StepLog, Trainer

OnStep = Callable[[StepLog, Trainer], None]

_WEIGHTS, _MOMENTS, _PLACE = "weights.safetensors", "optimizer.safetensors", "place.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a course was when it was written down."""

    step: int
    place: Mapping[str, JsonValue]
    """What the method that trains must know to go on."""
    weights: Mapping[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    log: tuple[StepLog, ...]
    heldout: tuple[tuple[int, float], ...] = ()


@dataclass
class Session:
    """One course of training: its settings, its text, its log and its checkpoints."""

    spec: TrainingSpec
    text: PackedText
    teacher: Any = None
    """Dense model to distil from."""
    accelerator: Any = None
    """accelerate's, where several processes train together."""
    sharded: bool = False
    """Whether each of them holds a part of the model while it trains."""
    folder: Path | None = None
    """Where checkpoints go; None writes none."""
    key: str = ""
    """What is trained, beside the settings: a checkpoint of something else is refused."""
    minutes: float = 10.0
    """Between checkpoints."""
    on_step: OnStep | None = None
    log: list[StepLog] = field(default_factory=list)
    """Every step of the course, those before an interruption included."""
    heldout: list[tuple[int, float]] = field(default_factory=list)
    """Tokens read and the loss on held-out text then; whoever hears of the steps may fill it."""
    _resumed: int = field(default=0, init=False)
    _last_written: float = field(default_factory=time.monotonic, init=False)

    @property
    def seconds(self) -> float:
        """Spent in all steps of the course."""
        return sum(entry.seconds for entry in self.log)

    @property
    def seconds_here(self) -> float:
        """Spent in the steps since the course was last taken up."""
        return sum(entry.seconds for entry in self.log[self._resumed :])

    @property
    def tokens(self) -> int:
        """Read so far."""
        return self.log[-1].tokens if self.log else 0

    def checkpoint(self) -> Checkpoint | None:
        """The last one that was written; None where there is none.

        Raises:
            UserError: it belongs to another course.
        """
        folders = sorted(self.folder.glob("[0-9]*")) if self.folder is not None else []
        if not folders:
            return None
        try:
            told = json.loads((folders[-1] / _PLACE).read_text())
            course = told["course"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint {folders[-1]} is damaged; delete it to go on from the one before"
            ) from error
        if course != self._course():
            raise UserError(
                f"the checkpoint in {self.folder} is of another course (other settings, text or model); give the "
                "settings it was made with, another folder, or delete it"
            )
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(folders[-1] / _MOMENTS).items():
            kind, _, parameter = name.partition("/")
            moments.setdefault(kind, {})[parameter] = tensor
        log = tuple(StepLog(**entry) for entry in told["log"])
        heldout = tuple((tokens, loss) for tokens, loss in told["heldout"])
        return Checkpoint(told["step"], told["place"], load_file(folders[-1] / _WEIGHTS), moments, log, heldout)

    def trainer(self, model: Any, checkpoint: Checkpoint | None = None) -> Trainer:
        """A trainer of the model, which it changes in place.

        Args:
            model: to train.
            checkpoint: whose weights, moments and step it takes up; None starts from the model as it is.
        """
        trainer = Trainer(
            model,
            self.text,
            self.spec,
            teacher=self.teacher,
            accelerator=self.accelerator,
            sharded=self.sharded,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint.step, checkpoint.weights, checkpoint.moments)
            self.log, self.heldout = list(checkpoint.log), list(checkpoint.heldout)
            self._resumed = len(self.log)
        return trainer

    def agreed(self, value: JsonValue) -> JsonValue:
        """The first process's value in all of them; every process must ask."""
        agreed: list[JsonValue] = broadcast_object_list([value])
        return agreed[0]

    def advance(self, trainer: Trainer, until: int, place: Mapping[str, JsonValue]) -> None:
        """Take steps until ``until`` have been taken in all, with a checkpoint every few minutes.

        Args:
            trainer: of this session.
            until: at most its ``total_steps``.
            place: for the checkpoints.

        Raises:
            TrainingDivergedError: a loss is not finite; the last checkpoint stays.
        """

        def on_step(log: StepLog) -> None:
            self.log.append(log)
            if self.on_step is not None:
                self.on_step(log, trainer)
            if self._is_due():
                self.write(trainer, place)

        trainer.advance(until, on_step)

    def _is_due(self) -> bool:
        """Whether a checkpoint is; a sharded one takes all processes, whose clocks may disagree."""
        due = time.monotonic() - self._last_written > 60 * self.minutes
        return bool(self.agreed(due)) if self.sharded else due

    def write(self, trainer: Trainer, place: Mapping[str, JsonValue]) -> None:
        """Write a checkpoint, then delete the one before it.

        Raises:
            UserError: the disk refuses it; the one before stays.
        """
        self._last_written = time.monotonic()
        if self.folder is None:
            return
        weights = trainer.learning_state()
        moments = {
            f"{kind}/{name}": tensor
            for kind, of_kind in trainer.optimizer_state().items()
            for name, tensor in of_kind.items()
        }
        log = [asdict(entry) for entry in self.log]
        told = {
            "course": self._course(), "step": trainer.step, "place": dict(place), "log": log, "heldout": self.heldout
        }  # fmt: skip
        if self.accelerator is None or self.accelerator.is_main_process:
            _write(self.folder, told, {_WEIGHTS: weights, _MOMENTS: moments})

    def finish(self) -> None:
        """Delete the checkpoints of a course whose outcome is safe."""
        if self.folder is not None:
            remove(self.folder)

    def _course(self) -> str:
        told = json.dumps([self.spec.model_dump(mode="json"), self.text.sha256, self.key], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def _write(folder: Path, told: dict[str, Any], tensors: Mapping[str, dict[str, Tensor]]) -> None:
    """The next checkpoint of a folder: file name -> tensors by name; those before it are deleted once it is there."""
    fresh = folder / f".{uuid.uuid4().hex[:8]}"
    before = sorted(folder.glob("[0-9]*"))
    with disk_errors(folder):
        fresh.mkdir(parents=True)
        try:
            for file, by_name in tensors.items():
                save_file({name: tensor.contiguous() for name, tensor in by_name.items()}, fresh / file)
            write_synced(fresh / _PLACE, json.dumps(told).encode())
            number = int(before[-1].name) + 1 if before else 0
            fresh.rename(folder / f"{number:06}")
            sync_folder(folder)
        finally:
            remove(fresh)
    for older in before:
        remove(older)
