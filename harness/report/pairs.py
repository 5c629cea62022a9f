"""Every pair of methods at one sparsity: paired differences and tests, Holm-corrected over the pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from harness import statistics
from harness.report.cells import signed_with_interval
from harness.report.rows import Row, contests
from harness.report.scores import SIGNIFICANT, Sample, commonsense_tasks, draw_samples
from harness.statistics import McNemar
from harness.store import Store


@dataclass(frozen=True, slots=True)
class PairTable:
    """All pairs of one contest."""

    title: str
    names: tuple[str, ...]
    """Methods by falling average."""
    frame: pd.DataFrame
    """One line per pair: ``first, second, difference, ci_low, ci_high, p_bootstrap, p_bootstrap_holm`` of the average
    (first less second), ``only_first, only_second, p_mcnemar, p_mcnemar_holm`` of the pooled answers; the latter are
    empty where a method has several seeds, as its answers to one question are then not one."""

    @property
    def legend(self) -> str:
        """How to read the matrix."""
        return (
            "Row less column, in points of the average, with its 95% interval; p of the paired bootstrap on the "
            "average / of McNemar's exact test on the pooled answers, each Holm-corrected over "
            f"{len(self.frame)} pairs; "
            f"* both below {SIGNIFICANT:.0%} (or the first, where the second does not apply)."
        )

    def matrix(self) -> list[list[str]]:
        """One row of text per method: its name, then its cell against every method after it."""
        cells = {(line["first"], line["second"]): _cell(line) for _, line in self.frame.iterrows()}
        return [[name, *(cells.get((name, other), "") for other in self.names[1:])] for name in self.names[:-1]]

    def to_markdown(self) -> str:
        """The matrix and its legend."""
        table = tabulate(self.matrix(), ["", *self.names[1:]], tablefmt="pipe", disable_numparse=True)
        return f"## {self.title}\n\n{table}\n\n{self.legend}\n"

    def to_rich(self) -> Group:
        """The same for the terminal."""
        table = Table("", *self.names[1:], box=box.SIMPLE_HEAD, pad_edge=False)
        for line in self.matrix():
            table.add_row(*map(Text, line))
        return Group(Text(self.title, style="bold"), table, Text(self.legend))


def pair_tables(store: Store, rows: Iterable[Row]) -> list[PairTable]:
    """A table for every contest with at least two methods that were scored.

    Raises:
        UserError: per-document scores are corrupt, or were taken on different documents.
    """
    tables = []
    for contest in contests(rows):
        samples = draw_samples(store, [row for row in contest if row.status == "ok" and not row.is_reference])
        scored = {row: sample for row, sample in samples.items() if commonsense_tasks(sample)}
        if len(scored) > 1:
            tables.append(_pair_table(scored))
    return tables


def _pair_table(samples: dict[Row, Sample]) -> PairTable:
    tasks = commonsense_tasks(next(iter(samples.values())))
    rows = sorted(samples, key=lambda row: -samples[row].per_seed(tasks).mean())
    names = {row: f"{row.spec.method} ({row.settings})" if row.settings else row.spec.method for row in rows}
    lines = []
    for first, second in combinations(rows, 2):
        difference = samples[first].less(samples[second], tasks)
        test = _mcnemar(samples[first], samples[second], tasks)
        lines.append(
            {
                "first": names[first],
                "second": names[second],
                "difference": difference.value,
                "ci_low": difference.interval.low,
                "ci_high": difference.interval.high,
                "p_bootstrap": difference.p_value,
                "only_first": test.only_first if test else None,
                "only_second": test.only_second if test else None,
                "p_mcnemar": test.p_value if test else np.nan,
            }
        )
    frame = pd.DataFrame(lines)
    for test_name in ("p_bootstrap", "p_mcnemar"):
        known = frame[test_name].notna()
        frame.loc[known, f"{test_name}_holm"] = statistics.holm(frame.loc[known, test_name].to_list())
    spec = rows[0].spec
    title = f"{spec.model.name} at {100 * spec.sparsity:.4g}% of {spec.basis}: pairs over {', '.join(tasks)}"
    return PairTable(title, tuple(names.values()), frame.astype({"only_first": "Int64", "only_second": "Int64"}))


def _mcnemar(first: Sample, second: Sample, tasks: Sequence[str]) -> McNemar | None:
    answers = [np.concatenate([sample.scores[task] for task in tasks], axis=1) for sample in (first, second)]
    if any(len(answers_SD) != 1 for answers_SD in answers):
        return None
    return statistics.mcnemar(answers[0][0], answers[1][0])


def _cell(line: Any) -> str:
    bootstrap, exact = line["p_bootstrap_holm"], line["p_mcnemar_holm"]
    significant = bootstrap < SIGNIFICANT and not exact >= SIGNIFICANT
    tests = f"p {_p(bootstrap)}" + ("" if np.isnan(exact) else f" / {_p(exact)}")
    difference = signed_with_interval(line["difference"], line["ci_low"], line["ci_high"])
    return f"{difference} {tests}{' *' if significant else ''}"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")
