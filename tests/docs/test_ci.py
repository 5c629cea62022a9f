"""The page on CI and the action: their flags exist, and their shell does what it says."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness import cli
from harness.regression import Limits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()
REFERENCE = str(ROOT / "results" / "reference")
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
FLAGS = {"--" + name.replace("_", "-") for name in inspect.signature(cli.regress).parameters}


def test_every_flag_on_the_page_exists() -> None:
    elsewhere = {"--profile"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) - elsewhere <= FLAGS
    assert {"--" + name.replace("_", "-") for name in Limits.__slots__} <= set(re.findall(r"--[a-z-]+", PAGE))


def test_the_steps_on_the_page_give_the_action_inputs_that_it_has() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    step = yaml.safe_load(example)["jobs"]["accuracy"]["steps"][-1]
    assert set(step["with"]) <= set(ACTION["inputs"])
    required = {name for name, field in ACTION["inputs"].items() if field.get("required")}
    assert required <= set(step["with"])


def act(tmp_path: Path, options: str) -> subprocess.CompletedProcess[str]:
    """The step as GitHub runs it: bash, with the inputs in the environment, on the committed reference."""
    step = next(step for step in ACTION["runs"]["steps"] if step.get("id") == "regress")
    program = tmp_path / "harness" / "bin" / "harness"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness.cli "$@"\n')
    program.chmod(0o755)
    defaults = {name.upper(): str(field.get("default", "")) for name, field in ACTION["inputs"].items()}
    given = {"REFERENCE": REFERENCE, "CANDIDATE": REFERENCE, "TOLERANCE": "0.1", "OPTIONS": options}
    names = {"JUNIT": "junit.xml", "GITHUB_OUTPUT": "output", "GITHUB_STEP_SUMMARY": "summary"}
    files = {variable: str(tmp_path / name) for variable, name in names.items()}
    environment = {**os.environ, **defaults, **given, **files, "RUNNER_TEMP": str(tmp_path), "PYTHONPATH": str(ROOT)}
    (tmp_path / "regress.md").write_text("of an earlier step\n")
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        env=environment | {"GITHUB_ACTIONS": "true"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("options", "code"), [("", 3), ("--max-params-ratio 1\n--allow-cannot-tell\n", 0)])
def test_the_actions_shell_runs_the_check_and_keeps_its_exit_code(tmp_path: Path, options: str, code: int) -> None:
    done = act(tmp_path, options)
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "output").read_text() == f"exit-code={code}\n"
    assert (tmp_path / "summary").read_text().startswith("# Regression: ❔ cannot tell")
    assert (tmp_path / "junit.xml").read_text().startswith("<?xml")
    assert "::warning title=harness regress::cannot tell: 13 runs" in done.stdout


def test_the_action_tells_bad_input_and_no_earlier_summary(tmp_path: Path) -> None:
    done = act(tmp_path, "--max-params-ratio 1\n--max-loss-increase nonsense")
    assert done.returncode == 2, done.stdout + done.stderr
    assert not (tmp_path / "summary").exists()


def test_a_terminal_without_the_signs_gets_the_verdict(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.cli", "regress", "--reference", REFERENCE, "--candidate", REFERENCE]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"# Regression: ? pass" in done.stdout


def test_an_error_of_the_harness_is_no_verdict() -> None:
    program = "import harness.cli, harness.results; del harness.results.results_at; harness.cli.main()"
    command = [sys.executable, "-c", program, "regress", "--reference", REFERENCE, "--candidate", REFERENCE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == cli.INTERNAL_ERROR
    assert "Traceback" in done.stderr
    assert "this is an error of the harness itself, not a result" in done.stderr
