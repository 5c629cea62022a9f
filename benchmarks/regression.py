"""How often `harness regress` passes noise, fails a real drop and cannot tell: simulated answers, no model.

    python benchmarks/regression.py

A reference answers 7 tasks; its candidate differs in a share of the answers. Under noise an answer is as likely to be
won as lost; a drop is a surplus of lost ones. Every line is many whole checks of 13 runs, corrected over all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from harness.regression.evidence import Evidence, Scores, corrected, weigh
from harness.regression.judge import VERDICTS, accuracy_checks
from harness.regression.limits import Limits
from harness.report.scores import COMMONSENSE
from harness.statistics import documents_needed

LINES = (
    (40, 0.0, 0.0, 1.0), (40, 0.005, 0.0, 1.0), (40, 0.005, 0.0, 2.5), (40, 0.03, 0.0, 2.5), (40, 0.10, 0.0, 2.5),
    (200, 0.005, 0.0, 1.0), (200, 0.03, 0.0, 1.0), (200, 0.03, 0.0, 2.0), (200, 0.10, 0.0, 2.0),
    (40, 0.03, 0.10, 2.5), (200, 0.03, 0.01, 1.0), (200, 0.03, 0.03, 1.0), (200, 0.03, 0.05, 1.0),
)  # fmt: skip
"""Documents per task, share of answers that differ by noise, true drop (fraction), tolerance (points)."""


def simulated(generator: np.random.Generator, per_task: int, differing: float, drop: float = 0.0) -> Scores:
    """One pair of runs: ``differing`` of the answers changed by noise, ``drop`` more lost (fractions of documents)."""
    reference, candidate = {}, {}
    for task in COMMONSENSE:
        draw = generator.random(per_task)
        won, lost = draw < differing / 2, (draw >= differing / 2) & (draw < differing + drop)
        right = (generator.random(per_task) < 0.4) & ~won | lost
        reference[task] = right.astype(float)
        candidate[task] = (right & ~lost | won).astype(float)
    return Scores(reference, candidate, None, (("simulated", str(per_task)),))


def verdicts(pairs: Sequence[Scores], tolerance: float, runs: int) -> list[list[str]]:
    """Of the runs of each check, ``runs`` of the pairs making one; the tolerance in points."""
    evidence = weigh(pairs, tolerance / 100)
    # One resampling serves all checks, each of which corrects for its own runs only.
    checks = [corrected(evidence[start : start + runs]) for start in range(0, len(evidence), runs)]
    return [[_verdict(one, Limits(tolerance)) for one in check] for check in checks]


def _verdict(evidence: Evidence | None, limits: Limits) -> str:
    assert evidence is not None
    told = [check.verdict for check in accuracy_checks(evidence, limits)]
    return next(verdict for verdict in VERDICTS if verdict in told)


def line(checks: int, runs: int, per_task: int, differing: float, drop: float, tolerance: float) -> str:
    """One line of the table."""
    generator = np.random.default_rng([per_task, round(1e4 * differing), round(1e4 * drop)])
    pairs = [simulated(generator, per_task, differing, drop) for _ in range(checks * runs)]
    told = verdicts(pairs, tolerance, runs)
    failing = np.mean(["fail" in check for check in told])
    flat = [verdict for check in told for verdict in check]
    passing, failed = (np.mean([verdict == one for verdict in flat]) for one in ("pass", "fail"))
    expected = (differing / 2, differing / 2 + drop)
    return (
        f"| {7 * per_task:,} | {differing:.1%} | {100 * drop:g} | {tolerance:g} | {failing:.1%} | {passing:.1%} | "
        f"{failed:.1%} | {_needed(*expected, tolerance):,} |"
    )


def _needed(won: float, lost: float, tolerance: float) -> int:
    """Documents that a run with exactly these shares of won and lost answers is told to need."""
    num = 10_000
    differences = np.repeat([1.0, -1.0, 0.0], [round(won * num), round(lost * num), num - round((won + lost) * num)])
    return documents_needed(dict.fromkeys(COMMONSENSE, differences), tolerance / 100)


def main() -> None:
    """Print the table of the page on CI."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", type=int, default=100)
    parser.add_argument("--runs", type=int, default=13)
    given = parser.parse_args()
    print("| documents | answers differ | true drop | tolerance | checks that fail | runs that pass | fail | needed |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for setting in LINES:
        print(line(given.checks, given.runs, *setting), flush=True)


if __name__ == "__main__":
    main()
