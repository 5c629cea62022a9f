"""What is run together, and what is told of it on the way. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from harness.records import RunSpec

CACHE = "cache"
"""Folder of a results folder for what its runs share; safe to delete."""

ATTENDED = "--attended"
"""Argument of a track's process: end when standard input closes, that is, when whoever started it is gone."""


class Track(BaseModel):
    """Runs that share a pass, and where and how to make them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    specs: tuple[RunSpec, ...]
    """By rising sparsity; alike in everything else."""
    out: Path
    """The results folder."""
    device: str = "cpu"
    batch_tokens: int = 4096
    """Tokens scored at once."""
    num_threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    stream: bool = False
    """Leave layers in their files and read them when they run."""

    @property
    def track_id(self) -> str:
        """Readable and unique: the first run's id."""
        return self.specs[0].run_id


class Event(BaseModel):
    """One line of a track's progress."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """``phase`` (text says which), ``progress`` (done of total), ``finished`` (a record is written), ``user_error``."""
    run_id: str
    text: str = ""
    done: int = 0
    total: int = 0


Emit = Callable[[Event], None]
