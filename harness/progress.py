"""What a comparison shows while it runs: what is under way, how far it is, how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from harness.records import RunSpec
from harness.track import Event

# Where in a run each phase begins, as a share of its time; evaluation reports its own progress up to the next.
PHASE_START = {"loading": 0.0, "pruning": 0.05, "training": 0.1, "evaluating": 0.4, "timing": 0.95}


class ComparisonProgress:
    """A progress bar on a terminal; elsewhere one line per finished run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.specs: dict[str, RunSpec] = {}
        self.num_finished = 0
        self.num_missing = 0
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("runs", total=None)

    def __enter__(self) -> ComparisonProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def plan(self, specs: Sequence[RunSpec], missing: Sequence[RunSpec]) -> None:
        """Say what there is to do."""
        self.specs = {spec.run_id: spec for spec in specs}
        self.num_missing = len(missing)
        self.bar.update(self.task, total=max(len(missing), 1), completed=0 if missing else 1)
        done = len(specs) - len(missing)
        kept = f", {done} of them done before" if done else ""
        self.console.print(f"{len(specs)} runs{kept}")

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self.console.print(sentence, highlight=False, markup=False)

    def event(self, event: Event) -> None:
        """Show one event of a track."""
        spec = self.specs[event.run_id]
        label = f"{spec.model.name} {spec.method} {spec.sparsity:.0%}"
        if event.kind == "finished":
            self.num_finished += 1
            self._advance(0.0, label)
            seconds = time.monotonic() - self.started
            self.console.print(
                f"[{seconds:6.0f} s] {self.num_finished:3}/{self.num_missing} {label}: {event.text}", highlight=False
            )
        elif event.kind == "phase":
            self._advance(PHASE_START[event.text], f"{label}: {event.text}")
        elif event.kind == "progress" and event.total:
            begin, end = ("training", "evaluating") if event.text == "training" else ("evaluating", "timing")
            length = PHASE_START[end] - PHASE_START[begin]
            self._advance(PHASE_START[begin] + length * event.done / event.total, f"{label}: {begin}")

    def _advance(self, share: float, description: str) -> None:
        self.bar.update(self.task, completed=round(self.num_finished + share, 2), description=description)
