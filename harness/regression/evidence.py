"""Paired on the same documents: what every pair of runs says about accuracy, corrected over all of them.

Shape letters: R resamples, M pairs of runs, D documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness import statistics
from harness.errors import UserError
from harness.records import RunRecord
from harness.regression.matching import Pair
from harness.report.rows import REFERENCE_METHOD
from harness.report.scores import COMMONSENSE, DocumentScores, read_scores
from harness.statistics import Floats, Interval
from harness.store import Store

FAMILIES = 2
"""Averages and single tasks are two families of tests; each has half of the 5%."""
_AT_ONCE = 256
"""Pairs resampled at a time, which bounds the memory: the draws are the same for all."""

Strata = dict[str, Floats]


@dataclass(frozen=True, slots=True)
class TaskEvidence:
    """One task of one pair."""

    task: str
    num_documents: int
    reference: float
    candidate: float
    only_reference: int
    """Documents that only the reference got right."""
    only_candidate: int
    p_worse: float
    """McNemar's exact test, one-sided."""
    p_worse_holm: float = 1.0
    """Corrected over all tasks of all pairs, and for there being two families."""


@dataclass(frozen=True, slots=True)
class Advantage:
    """An average of paired differences and both of its one-sided tests."""

    value: float
    interval: Interval
    """90%: either end is a one-sided 95% limit."""
    p_worse: float
    """Of being below zero."""
    p_allowed: float
    """Of being above what is allowed to be lost."""
    num_documents: int
    num_needed: int | None
    """Documents for 80% power of the latter test where nothing is lost in truth; where nothing may be lost, if the
    value is the truth, and then None for a value of zero."""
    p_worse_holm: float = 1.0
    """Corrected over all pairs, and for there being two families."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one pair says about accuracy."""

    tasks: tuple[TaskEvidence, ...]
    averaged: tuple[str, ...]
    """Tasks of the average: the commonsense ones where any was scored, else all."""
    average: Advantage
    reference_average: float
    candidate_average: float
    recovery: Advantage | None
    """The candidate's average less the least share allowed of its dense model's; None where not asked for."""
    dense_average: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one pair, on the tasks whose documents are the same."""

    reference: Strata
    candidate: Strata
    dense: Strata | None
    documents: tuple[tuple[str, str], ...]
    """(task, hash of its documents); pairs alike in this are resampled together."""

    @property
    def averaged(self) -> tuple[str, ...]:
        """Tasks of the average."""
        return tuple(task for task in COMMONSENSE if task in self.reference) or tuple(self.reference)

    def difference(self) -> Strata:
        """Of the candidate from the reference."""
        return {task: self.candidate[task] - self.reference[task] for task in self.averaged}

    def surplus(self, share: float) -> Strata | None:
        """Over a share of what the dense model scores."""
        if self.dense is None:
            return None
        return {task: self.candidate[task] - share * self.dense[task] for task in self.averaged}


def read_evidence(
    reference: Store, candidate: Store, pairs: Sequence[Pair], tolerance: float, min_recovery: float | None
) -> tuple[list[Evidence | None], list[Pair]]:
    """Read the scores of every pair, test them, and correct the p-values over all.

    Args:
        reference: holds the reference runs.
        candidate: holds the candidate runs.
        pairs: both ``ok``.
        tolerance: drop of the average that is allowed, as a fraction.
        min_recovery: share of the dense average to keep, or None.

    Returns:
        Per pair its evidence, None without a task that both scored on the same documents; and the pairs, their
        differences now naming tasks whose documents are not the same.

    Raises:
        UserError: per-document scores are corrupt, or a recovery is asked for and there is no dense run.
    """
    reader = _Reader(reference, candidate, min_recovery is not None)
    read = [reader.read(pair) for pair in pairs]
    return weigh([scores for scores, _ in read], tolerance, min_recovery), [pair for _, pair in read]


def weigh(
    scores: Sequence[Scores | None], tolerance: float, min_recovery: float | None = None
) -> list[Evidence | None]:
    """Test every pair, and correct the p-values over all of them; None stays None.

    Args:
        scores: per pair.
        tolerance: drop of the average that is allowed, as a fraction.
        min_recovery: share of the dense average to keep, or None.
    """
    alike: dict[tuple[tuple[str, str], ...], list[tuple[int, Scores]]] = defaultdict(list)
    for position, one in enumerate(scores):
        if one is not None:
            alike[one.documents].append((position, one))
    evidence: list[Evidence | None] = [None] * len(scores)
    for group in alike.values():
        for start in range(0, len(group), _AT_ONCE):
            chunk = group[start : start + _AT_ONCE]
            found = _tested([one for _, one in chunk], tolerance, min_recovery)
            for (position, _), tested in zip(chunk, found, strict=True):
                evidence[position] = tested
    return corrected(evidence)


class _Reader:
    """Reads per-document scores of pairs, those of a dense run once."""

    def __init__(self, reference: Store, candidate: Store, with_dense: bool) -> None:
        self.reference = reference
        self.candidate = candidate
        self.with_dense = with_dense
        self._dense: dict[str, dict[str, DocumentScores]] = {}
        self._dense_runs = self._find_dense() if with_dense else {}

    def read(self, pair: Pair) -> tuple[Scores | None, Pair]:
        """The scores on documents that both have, None without any; and the pair, with what is not the same named."""
        ours, theirs = read_scores(self.reference, pair.reference), read_scores(self.candidate, pair.candidate)
        if not ours or not theirs:
            return None, pair
        shared = [task for task in ours if task in theirs and ours[task].documents == theirs[task].documents]
        other = [
            f"documents of {task}: other ones in the candidate"
            for task in ours
            if task in theirs and task not in shared
        ]
        pair = replace(pair, differences=tuple(dict.fromkeys([*pair.differences, *other])))
        if not shared:
            return None, pair
        dense = self._dense_scores(pair.candidate, theirs, shared)
        scores = Scores(
            reference={task: ours[task].scores for task in shared},
            candidate={task: theirs[task].scores for task in shared},
            dense=dense,
            documents=tuple((task, ours[task].documents) for task in shared),
        )
        return scores, pair

    def _dense_scores(
        self, record: RunRecord, scored: Mapping[str, DocumentScores], tasks: Sequence[str]
    ) -> Strata | None:
        if not self.with_dense or record.spec.method == REFERENCE_METHOD:
            return None
        dense = self._dense_runs.get(_model_key(record))
        if dense is None:
            raise UserError(
                f"--min-recovery needs the dense run of {record.spec.model.name} beside {record.spec.run_id} in "
                f"{self.candidate.shown}: add it with `harness compare --methods dense`"
            )
        run_id = dense.spec.run_id
        if run_id not in self._dense:
            self._dense[run_id] = read_scores(self.candidate, dense) or {}
        found = self._dense[run_id]
        if any(task not in found or found[task].documents != scored[task].documents for task in tasks):
            raise UserError(f"{run_id} and {record.spec.run_id} were scored on different documents; run them again")
        return {task: found[task].scores for task in tasks}

    def _find_dense(self) -> dict[str, RunRecord]:
        records = [
            self.candidate.load(run_id) for run_id in self.candidate.run_ids() if f"--{REFERENCE_METHOD}--" in run_id
        ]
        return {_model_key(r): r for r in records if r.spec.method == REFERENCE_METHOD and r.status == "ok"}


def _model_key(record: RunRecord) -> str:
    return record.spec.model_dump_json(include={"model", "dtype", "evaluation"})


def _tested(scores: Sequence[Scores], tolerance: float, min_recovery: float | None) -> list[Evidence]:
    """Evidence of pairs on the same documents."""
    differences = _advantages([one.difference() for one in scores], tolerance)
    share = min_recovery or 0.0
    surplus = {i: found for i, one in enumerate(scores) if (found := one.surplus(share)) is not None}
    recoveries = dict(zip(surplus, _advantages(list(surplus.values()), 0.0), strict=True))
    return [
        Evidence(
            tasks=tuple(_task(task, one.reference[task], one.candidate[task]) for task in one.reference),
            averaged=one.averaged,
            average=difference,
            reference_average=_average(one.reference, one.averaged),
            candidate_average=_average(one.candidate, one.averaged),
            recovery=recoveries.get(i),
            dense_average=_average(one.dense, one.averaged) if one.dense else None,
        )
        for i, (one, difference) in enumerate(zip(scores, differences, strict=True))
    ]


def _advantages(strata_M: Sequence[Strata], allowed: float) -> list[Advantage]:
    """Test averages on the same documents against zero and against what is allowed to be lost."""
    if not strata_M:
        return []
    stacked = {task: np.stack([strata[task] for strata in strata_M]) for task in strata_M[0]}
    replicates_RM = statistics.resampled_average(stacked)
    found = []
    for strata, replicates_R in zip(strata_M, replicates_RM.T, strict=True):
        value = _average(strata, tuple(strata))
        distance = allowed or abs(value)
        negated = {task: -differences_D for task, differences_D in strata.items()}
        found.append(
            Advantage(
                value=value,
                interval=statistics.percentile_interval(replicates_R, 2 * statistics.CONFIDENCE - 1),
                p_worse=statistics.exceeds(negated, -replicates_R, 0.0),
                p_allowed=statistics.exceeds(strata, replicates_R, -allowed),
                num_documents=sum(len(differences_D) for differences_D in strata.values()),
                num_needed=statistics.documents_needed(strata, distance) if distance else None,
            )
        )
    return found


def _average(strata: Strata, tasks: Sequence[str]) -> float:
    return float(np.mean([strata[task].mean() for task in tasks]))


def _task(task: str, reference_D: Floats, candidate_D: Floats) -> TaskEvidence:
    test = statistics.mcnemar(reference_D, candidate_D, "greater")
    means = float(reference_D.mean()), float(candidate_D.mean())
    return TaskEvidence(task, len(reference_D), *means, test.only_first, test.only_second, test.p_value)


def corrected(evidence: Sequence[Evidence | None]) -> list[Evidence | None]:
    """The same with Holm's correction over all averages, and over all tasks."""
    known = [one for one in evidence if one is not None]
    averages = [one.average for one in known] + [one.recovery for one in known if one.recovery]
    by_average = iter(_holm([average.p_worse for average in averages]))
    by_task = iter(_holm([task.p_worse for one in known for task in one.tasks]))
    first = [replace(one, average=replace(one.average, p_worse_holm=next(by_average))) for one in known]
    second = iter(
        replace(
            one,
            recovery=replace(one.recovery, p_worse_holm=next(by_average)) if one.recovery else None,
            tasks=tuple(replace(task, p_worse_holm=next(by_task)) for task in one.tasks),
        )
        for one in first
    )
    return [None if one is None else next(second) for one in evidence]


def _holm(p_values: Sequence[float]) -> list[float]:
    return [min(1.0, FAMILIES * p_value) for p_value in statistics.holm(p_values)]
