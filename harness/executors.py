"""Where tracks run: each in a fresh process of this machine, so that no method inherits another's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from harness.cost import CostRequest, CostUnknownError, ScoringCost
from harness.durable import disk_errors, write_file
from harness.errors import UserError
from harness.records import RunRecord, RunSpec
from harness.store import Store, Version
from harness.track import ATTENDED, Event, Track

# What libraries print is in the track's log; they have nothing to say on the terminal.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTHONWARNINGS": "ignore",
}

USER_ERROR = 2
"""Exit code of a process that met something the user must mend."""


class LocalExecutor:
    """Runs tracks one after the other, each in a process of its own."""

    num_workers = 1

    def cost(self, request: CostRequest) -> ScoringCost:
        """What scoring will cost on this machine.

        Raises:
            UserError: something the user must mend.
            CostUnknownError: it cannot be estimated for this model.
        """
        assert request.cache is not None
        request_file = request.cache / "cost-request.json"
        write_file(request_file, request.model_dump_json(indent=1).encode())
        done = subprocess.run(
            [sys.executable, "-m", "harness.evaluation.cost", str(request_file)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **QUIET},
        )
        lines = done.stderr.strip().splitlines() or ["no message"]
        if done.returncode == USER_ERROR:
            raise UserError(lines[-1])
        if done.returncode:
            raise CostUnknownError(lines[-1])
        return ScoringCost.model_validate_json(done.stdout.strip().splitlines()[-1])

    def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
        """Run a track to its end; whatever happens to the process, every run of it has a record afterwards.

        Raises:
            UserError: the track met something the user must mend.
        """
        folder = track.out / "tracks"
        track_file = folder / f"{track.track_id}.json"
        log_file = folder / f"{track.track_id}.log"
        store = Store(track.out)
        before = store.versions(spec.run_id for spec in track.specs)
        write_file(track_file, track.model_dump_json(indent=2).encode())
        with disk_errors(folder):
            log = log_file.open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.runner", str(track_file), ATTENDED],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env={**os.environ, **QUIET},
            )
            try:
                finished, message = _relay(process, on_event)
            finally:
                process.terminate()
                process.wait()
        if message is not None:
            raise UserError(message)
        if process.returncode != 0:
            left = {spec.run_id: spec for spec in track.specs if spec.run_id not in finished}
            for event in untold(store, {run_id: before[run_id] for run_id in left}):
                on_event(event)
                del left[event.run_id]
            _record_as_failed(store, left.values(), process.returncode, log_file)

    def stop(self) -> None:
        """Nothing runs in other threads."""


def untold(store: Store, before: Mapping[str, Version | None]) -> Iterator[Event]:
    """That runs are ``finished`` which were written after those versions, by a process that died before it said so."""
    for run_id in store.written_since(before):
        yield Event(kind="finished", run_id=run_id, text=store.load(run_id).status)


def _relay(process: subprocess.Popen[str], on_event: Callable[[Event], None]) -> tuple[set[str], str | None]:
    """Pass the process's events on until it ends; the runs it finished and the message of its ``user_error``."""
    finished: set[str] = set()
    message = None
    assert process.stdout is not None
    for line in process.stdout:
        if not line.endswith("\n"):  # killed in the middle of it
            break
        event = Event.model_validate_json(line)
        if event.kind == "user_error":
            message = event.text
        else:
            on_event(event)
            if event.kind == "finished":
                finished.add(event.run_id)
    process.wait()
    return finished, message


def _record_as_failed(store: Store, specs: Iterable[RunSpec], returncode: int, log_file: Path) -> None:
    """A process that was killed writes no records: say so in its place."""
    last_lines = "\n".join(log_file.read_text(errors="replace").splitlines()[-40:])
    for spec in specs:
        reason = f"its process ended with code {returncode}" + (
            " (killed, most likely for want of memory)" if returncode == -9 else ""
        )
        store.write(RunRecord(spec=spec, status="failed", reason=reason, traceback=last_lines), None)
