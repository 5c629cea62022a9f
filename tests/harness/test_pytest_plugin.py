"""The fixture, in a test of somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference"

TESTS = """
import pytest

def test_passes(no_regression):
    assert no_regression({reference!r}, {reference!r}, tolerance=1.0).exit_code == 0

def test_cannot_tell_is_a_failure(no_regression):
    no_regression({reference!r}, {reference!r}, tolerance=0.1)

def test_cannot_tell_may_be_allowed(no_regression):
    assert no_regression({reference!r}, {reference!r}, tolerance=0.1, allow_cannot_tell=True).verdict == "cannot tell"
"""


def test_the_fixture_fails_where_the_check_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "test_accuracy.py").write_text(TESTS.format(reference=str(REFERENCE)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "harness.pytest_plugin", "-p", "no:cacheprovider", "-q", "."],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    assert "cannot tell: 13 runs compared with the reference (13 cannot tell)" in done.stdout


def test_pytest_finds_the_plugin_by_itself_where_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"harness.pytest_plugin": "harness.pytest_plugin"}
