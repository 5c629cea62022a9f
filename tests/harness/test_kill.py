"""A comparison killed with -9 fifty times: records absent or whole, and in the end the undisturbed table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from harness.store import Store

KILLS = 50
ARGUMENTS = [
    "--methods", "dense,flap,magnitude,random", "--sparsities", "0.01,0.02", "--tasks", "arc_easy,winogrande",
    "--limit", "2", "--heldout-tokens", "64", "--no-efficiency", "--calibration-samples", "4",
    "--calibration-length", "32",
]  # fmt: skip
NUM_RUNS = 7


def start(checkpoint: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "harness.cli", "compare", "--models", str(checkpoint), *ARGUMENTS]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command, "--out", str(out)], start_new_session=True, **pipes)


def table(out: Path) -> pd.DataFrame:
    """The leaderboard without what differs from time to time."""
    frame = pd.read_csv(out / "latest" / "leaderboard.csv")
    return frame[[name for name in frame if not name.endswith(("_seconds", "_bytes"))]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_lose_nothing(checkpoint: Path, tmp_path: Path) -> None:
    undisturbed = start(checkpoint, tmp_path / "undisturbed")
    began = time.monotonic()
    assert undisturbed.wait() == 0, undisturbed.stdout.read().decode() if undisturbed.stdout else ""
    duration = time.monotonic() - began
    moments, kills, folders, resumed = random.Random(0), 0, 0, 0
    while kills < KILLS:
        folders += 1
        out = tmp_path / f"killed-{folders}"
        known: set[str] = set()
        while True:
            process = start(checkpoint, out)
            try:
                # Most kills come while tracks run, some while it starts or writes the table.
                process.wait(timeout=moments.uniform(0.0, 1.1 * duration))
                break
            except subprocess.TimeoutExpired:
                # By turns the command alone, whose track's process must then end by itself, and all at once.
                if kills % 2:
                    os.kill(process.pid, signal.SIGKILL)
                else:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
            whole = {record.spec.run_id for record in Store(out).records() if record.status == "ok"}
            assert known <= whole, "a finished run was lost"
            resumed += bool(whole)
            known = whole
            if kills == KILLS:
                process = start(checkpoint, out)
                process.wait()
                break
        assert process.returncode == 0, process.stdout.read().decode() if process.stdout else ""
        assert len(Store(out).run_ids()) == NUM_RUNS
        pd.testing.assert_frame_equal(table(out), table(tmp_path / "undisturbed"))
        assert not [path.name for path in (out / "runs").glob(".*") if time.time() - path.stat().st_mtime > 3600]
    print(
        f"{kills} kills over {folders} comparisons of {duration:.0f} s each, {resumed} after finished runs: same tables"
    )
