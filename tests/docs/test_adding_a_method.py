"""The page on adding a method, installed and run as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of the page, installed by pip into a folder of its own."""
    source = tmp_path_factory.mktemp("source")
    code, project = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL).group(1) for kind in ("python", "toml"))
    assert len(code.splitlines()) <= 60
    (source / "activation_norm.py").write_text(code)
    (source / "pyproject.toml").write_text(project)
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)
    return site


def run(plugin: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(plugin), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_plugin_is_listed_with_its_settings(plugin: Path) -> None:
    assert "activation-norm" in run(plugin, "-m", "harness.cli", "methods")
    shown = run(plugin, "-m", "harness.cli", "methods", "activation-norm")
    assert "How the activations of a channel add up" in shown


def test_the_plugin_passes_the_contract_tests(plugin: Path) -> None:
    tail = run(plugin, "-m", "pytest", "tests/contract", "-q", "-k", "activation-norm and grouped-query")
    passed = re.search(r"(\d+) passed", tail)
    assert passed is not None
    assert int(passed.group(1)) >= 8
    assert "failed" not in tail


def test_the_plugin_prunes_the_embedded_model_to_its_target(plugin: Path, tmp_path: Path) -> None:
    arguments = ["--method", "activation-norm", "--set", "norm=l1", "--sparsity", "0.1"]
    sizes = ["--calibration-samples", "2", "--calibration-length", "64"]
    shown = run(plugin, "-m", "harness.cli", "prune", *arguments, *sizes, "--out", str(tmp_path / "model"))
    counted, target = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]{9,}) (?:of|total)", shown.replace("\n", " "))
    )
    assert 0 <= counted - target < 3 * 576
