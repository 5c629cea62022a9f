"""Who may work on what: processes of this machine, and of others that share the folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import leases
from harness.leases import Leases

TAKE = """
import sys, time
from pathlib import Path
from harness.leases import Leases
with Leases(Path(sys.argv[1])).take("track 1") as held:
    print(held, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def another_process(folder: Path, seconds: float = 0.0) -> subprocess.Popen[str]:
    """Takes the lease if it can, says whether it did, and keeps it for some seconds."""
    return subprocess.Popen([sys.executable, "-c", TAKE, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_lease_keeps_others_out_until_it_is_given_back(tmp_path: Path) -> None:
    mine = Leases(tmp_path)
    with mine.take("track 1") as held, mine.take("track/1") as another:
        assert (held, another) == (True, True)
        assert said(another_process(tmp_path)) == "False"
    assert said(another_process(tmp_path)) == "True"


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path) -> None:
    holder = another_process(tmp_path, 60)
    assert said(holder) == "True"
    with Leases(tmp_path).take("track 1") as held:
        assert not held
    holder.kill()
    holder.wait()
    with Leases(tmp_path).take("track 1") as held:
        assert held


@pytest.mark.parametrize("clock", [0, -86400, 86400])
def test_what_a_dead_machine_held_is_free_after_a_while_whatever_its_clock_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: float
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    first = Leases(tmp_path)
    with first.take("track 1"):
        (file,) = tmp_path.glob("*.lease")
        record = file.read_text()
    # As a machine that lost its power would have left it.
    file.write_text(re.sub(r"host=.*", "host=elsewhere", record))
    os.utime(file, (time.time() + clock,) * 2)
    waiting = Leases(tmp_path)
    with waiting.take("track 1") as held:
        assert not held
    time.sleep(0.3)
    with waiting.take("track 1") as held:
        assert not held
    time.sleep(0.3)
    with waiting.take("track 1") as held:
        assert held


def test_a_lease_is_renewed_while_its_holder_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    waiting = Leases(tmp_path)
    with Leases(tmp_path).take("track 1") as held:
        assert held
        for _ in range(4):
            time.sleep(0.3)
            with waiting.take("track 1") as taken:
                assert not taken
