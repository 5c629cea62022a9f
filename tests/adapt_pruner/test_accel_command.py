"""`harness accel` from the command line: killed and resumed, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from harness.cli import app

RUN = [
    "--target-sparsity", "0.02", "--rounds", "2", "--tokens", "1280", "--train", "context_length=32",
    "--train", "batch_tokens=128", "--train", "learning_rate=0.003", "--set", "samples_per_step=4",
]  # fmt: skip


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return ["-m", "harness", "accel", "--model", str(checkpoint), *RUN, "--out", str(out), *more]


def log(out: Path) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads((out / "training.json").read_text())["steps"]
    return steps


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model."""
    out = tmp_path_factory.mktemp("accel") / "model"
    subprocess.run([sys.executable, *command(checkpoint, out)], check=True, capture_output=True)
    return out


def test_a_dry_run_needs_no_weights() -> None:
    done = CliRunner().invoke(app, ["accel", "--recipe", "mobilellm-350m-to-125m", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "345,355,200 parameters, to 124,600,000 in rounds" in done.output
    assert done.output.count("\n│") == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "needs one target; pass --target-sparsity"),
        (["--target-params", "500M", "--dry-run"], "is not below the 134,515,008 parameters"),
        (["--target-sparsity", "0.2", "--tokens", "8k", "--dry-run"], "too few for 4 rounds"),
        (["--target-params", "lots", "--dry-run"], "--target-params 'lots' is not a number"),
        (["--target-sparsity", "0.2", "--train", "heldout_points=2", "--dry-run"], "is for harness compare"),
        (["--recipe", "mobilellm", "--dry-run"], "unknown recipe 'mobilellm'"),
        (["--target-sparsity", "0.2"], "pass --out FOLDER"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["accel", *arguments])
    assert message in str(done.exception)


@pytest.mark.slow
def test_the_model_loads_and_its_log_is_beside_it(undisturbed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(undisturbed)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    assert [step["tokens"] for step in log(undisturbed)] == [128 * (i + 1) for i in range(10)]
    assert "learning_rate: 0.003" in (undisturbed / "README.md").read_text()
    assert not undisturbed.with_name("model.checkpoints").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    told = command(checkpoint, out, "--checkpoint-minutes", "0")
    kills = 0
    for seen in (1, 3):
        process = subprocess.Popen([sys.executable, *told], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and _last_checkpoint(out) < seen:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not out.exists()
    assert kills == 2
    subprocess.run([sys.executable, *told], check=True, capture_output=True)
    assert [step["loss"] for step in log(out)] == pytest.approx([step["loss"] for step in log(undisturbed)], rel=1e-6)
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, undisturbed))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_the_loss_curve_of_one(
    checkpoint: Path, undisturbed: Path, tmp_path: Path, sharded: bool
) -> None:
    out = tmp_path / "model"
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    # What the launcher's --use_fsdp sets; beside --cpu it does not take that flag.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_FSDP": "true"} if sharded else {})}
    done = subprocess.run(
        [*launch, *command(checkpoint, out)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("training.json holds") == 1
    assert [step["loss"] for step in log(out)] == pytest.approx([step["loss"] for step in log(undisturbed)], abs=1e-3)


def _last_checkpoint(out: Path) -> int:
    folders = list(out.with_name(f"{out.name}.checkpoints").glob("[0-9]*"))
    return max((int(folder.name) for folder in folders), default=-1)
