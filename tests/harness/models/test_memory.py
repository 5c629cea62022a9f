"""What `harness prune --stream` takes of a large checkpoint's size, in the exact shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
METHODS = {"random", "magnitude", "flap", "llm-pruner", "slicegpt", "adapt-pruner"}
LESS = ["--samples", "2", "--set", "adapt-pruner.samples_per_step=1"]


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize(("shape", "flags"), [("llama-3.2-1b", []), ("llama-3.1-8b", LESS)])
def test_no_method_takes_a_quarter_more_than_the_weights(shape: str, flags: list[str]) -> None:
    program = str(ROOT / "benchmarks" / "memory.py")
    command = [sys.executable, program, "--shape", shape, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == METHODS
    for method, took in found.items():
        assert took["peak_bytes"] < 1.25 * took["weight_bytes"], method
