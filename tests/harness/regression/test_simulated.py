"""Whole checks on simulated answers: noise does not fail, drops do, and the documents said to be needed are enough."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from harness import statistics
from harness.report.scores import COMMONSENSE

BENCHMARK = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "regression.py"))
simulated = BENCHMARK["simulated"]
RUNS = 13


def verdicts(pairs: list[object], tolerance: float) -> list[str]:
    """Of runs, each checked on its own."""
    return [verdict for (verdict,) in BENCHMARK["verdicts"](pairs, tolerance, 1)]


@pytest.mark.parametrize("differing", [0.02, 0.10])
def test_noise_alone_fails_a_check_of_13_runs_one_time_in_20_at_most(differing: float) -> None:
    """At one in twenty, 40 checks have more than four that fail once in twenty times."""
    generator = np.random.default_rng(1)
    pairs = [simulated(generator, 40, differing) for _ in range(40 * RUNS)]
    assert sum("fail" in check for check in BENCHMARK["verdicts"](pairs, 1.0, RUNS)) <= 4


def test_noise_alone_passes_19_runs_in_20_where_there_are_documents_enough() -> None:
    """Half a percent of 1,400 answers differs."""
    generator = np.random.default_rng(2)
    told = verdicts([simulated(generator, 200, 0.005) for _ in range(200)], 1.0)
    assert told.count("pass") >= 190


def test_power_is_what_is_said_of_the_documents_needed() -> None:
    """With as many documents as are said to be needed, 80% of noisy runs pass (2.8 standard errors of 400 runs)."""
    generator = np.random.default_rng(3)
    truth = {task: np.repeat([1.0, -1.0, 0.0], [3, 3, 94]) for task in COMMONSENSE}
    needed = statistics.documents_needed(truth, 0.02)
    per_task = round(needed / len(COMMONSENSE))
    told = verdicts([simulated(generator, per_task, 0.06) for _ in range(400)], 2.0)
    assert told.count("pass") / 400 == pytest.approx(0.80, abs=0.056)


@pytest.mark.parametrize(("per_task", "noise"), [(40, 0.0), (40, 0.05), (100, 0.02)])
def test_a_drop_as_large_as_allowed_passes_one_in_20_at_most(per_task: int, noise: float) -> None:
    """The size of the non-inferiority test, few answers differing and many (2.8 standard errors of 400 runs)."""
    generator = np.random.default_rng(4)
    told = verdicts([simulated(generator, per_task, noise, drop=0.02) for _ in range(400)], 2.0)
    assert told.count("pass") / 400 <= 0.05 + 0.031


def test_a_drop_of_ten_points_fails_even_on_280_documents() -> None:
    generator = np.random.default_rng(5)
    (told,) = BENCHMARK["verdicts"]([simulated(generator, 40, 0.03, drop=0.10) for _ in range(RUNS)], 1.0, RUNS)
    assert told == ["fail"] * RUNS
