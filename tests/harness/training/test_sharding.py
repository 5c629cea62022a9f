"""A model spread over two processes while it trains: the numbers of one, half of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.models import LoadedModel

SCRIPT = str(Path(__file__).with_name("sharded_course.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("shape", ["tied", "shared-layers"])
def test_two_processes_hold_half_each_and_train_prune_and_resume_as_one(
    shape: str, make_tiny: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    make_tiny(shape).model.save_pretrained(tmp_path / "model")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        command = [sys.executable, *launcher, SCRIPT, str(tmp_path / "model"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-9)
    assert two["parameters_here"] == pytest.approx(one["parameters_here"] / 2, rel=0.1)
    expected = load_file(tmp_path / "one.safetensors")
    for name, weight in load_file(tmp_path / "two.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-9)
