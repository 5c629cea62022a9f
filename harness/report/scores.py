"""Scores of rows on shared documents: averages with intervals, differences from dense, who is best and who tied.

Per-document scores are read one contest at a time and dropped once it is summed up, so memory does not grow with runs.

Shape letters: R resamples, M runs, S seeds, D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np

from harness import statistics
from harness.errors import UserError
from harness.records import RunRecord
from harness.report.rows import Row
from harness.statistics import Difference, Floats
from harness.store import Store

COMMONSENSE = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande", "social_iqa")
"""The tasks of the average. Source: Adapt-Pruner (arXiv:2502.03460), zero-shot evaluation."""
MMLU = "mmlu"
SIGNIFICANT = 0.05

Mark = Literal["best", "tied", ""]


class Estimate(NamedTuple):
    """A mean over documents (and seeds) with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Guessing:
    """What guessing scores; the intervals are where 95% of guessers land."""

    tasks: dict[str, Estimate] = field(default_factory=dict)
    """Task, or group -> chance level, where its documents have one."""
    average: Estimate | None = None
    """Over the commonsense tasks."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """What the table says about one row, as fractions."""

    tasks: dict[str, Estimate] = field(default_factory=dict)
    """Task, or group such as ``mmlu`` -> its primary metric."""
    average: Estimate | None = None
    averaged_tasks: tuple[str, ...] = ()
    """The commonsense tasks that were scored."""
    spread: float | None = None
    """Sample standard deviation of the average over seeds."""
    delta: Difference | None = None
    """The average less the dense row's, paired."""
    margin: Estimate | None = None
    """Nats by which the right choice is likelier than the likeliest wrong one, averaged over the same tasks."""
    margin_delta: Difference | None = None
    """The margin less the dense row's, paired."""
    mark: Mark = ""
    p_vs_best: float | None = None
    """Holm-corrected, of the paired difference from the best of the contest."""
    guessing: Guessing = Guessing()
    """On the same documents."""


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """One run's primary metric on one task, in the order of the documents' ids."""

    documents: str
    """Hash of which documents these are."""
    scores: Floats
    """[D]"""
    chance: Floats
    """Of guessing right, [D]."""
    margin: Floats
    """Of the right choice, nats, [D]; NaN where the run did not keep it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's scores on every task, and their resamples."""

    scores: dict[str, Floats]
    """Task -> scores_SD."""
    replicates: dict[str, Floats]
    """Task -> replicates_R of the mean over documents and seeds."""
    chance: dict[str, Floats]
    """Task -> chance_D."""
    margin: Sample | None = None
    """The margins of the right choice in place of the scores, from the same draws; of the tasks that have them."""

    def per_seed(self, tasks: Sequence[str]) -> Floats:
        """Average over tasks of each seed: averages_S."""
        averages_S: Floats = np.mean([self.scores[task].mean(axis=1) for task in tasks], axis=0)
        return averages_S

    def resampled(self, tasks: Sequence[str]) -> Floats:
        """Replicates_R of the average over tasks."""
        replicates_R: Floats = np.mean([self.replicates[task] for task in tasks], axis=0)
        return replicates_R

    def estimate(self, tasks: Sequence[str]) -> Estimate:
        """The average over tasks."""
        interval = statistics.percentile_interval(self.resampled(tasks))
        return Estimate(float(self.per_seed(tasks).mean()), *interval)

    def less(self, other: Sample, tasks: Sequence[str]) -> Difference:
        """The average over tasks less that of another sample drawn together with this one."""
        value = float(self.per_seed(tasks).mean() - other.per_seed(tasks).mean())
        return statistics.paired_difference(self.resampled(tasks), other.resampled(tasks), value)


def commonsense_tasks(sample: Sample) -> tuple[str, ...]:
    """The tasks of the average that were scored."""
    return tuple(task for task in COMMONSENSE if task in sample.scores)


def score_contest(store: Store, rows: Sequence[Row], dense: Row | None) -> dict[Row, RowScores]:
    """Sum up rows that compete, and compare them with each other and with the dense model.

    Args:
        store: holds the per-document scores of the rows.
        rows: of one contest; those that are not ``ok``, or stored no documents, get no scores.
        dense: what they are measured against, or None.

    Raises:
        UserError: per-document scores are corrupt, or were taken on different documents.
    """
    scored = [row for row in rows if row.status == "ok"]
    samples = draw_samples(store, [*scored, *([dense] if dense and dense not in scored else [])])
    reference = samples.get(dense) if dense else None
    guessing = _guessing(next(iter(samples.values()))) if samples else Guessing()
    summaries = {row: _summary(row, samples[row], reference, guessing) for row in scored if row in samples}
    return _with_marks(summaries, samples)


def draw_samples(store: Store, rows: Sequence[Row]) -> dict[Row, Sample]:
    """Read and resample the scores of rows on the same documents; rows without stored documents are left out.

    Raises:
        UserError: the documents are not the same.
    """
    runs: dict[Row, list[dict[str, DocumentScores]]] = {}
    for row in rows:
        read = [found for record in row.records if (found := read_scores(store, record)) is not None]
        if len(read) == len(row.records):
            runs[row] = read
    _require_same_documents(runs)
    if not runs:
        return {}
    first = next(iter(runs.values()))[0]
    chance = {task: on_task.chance for task, on_task in first.items()}
    samples = {row: Sample({}, {}, chance, Sample({}, {}, chance)) for row in runs}
    for task in first:
        drawn: list[tuple[Sample, Floats]] = []  # what goes where: one draw serves all
        for row, seeds in runs.items():
            drawn.append((samples[row], np.stack([found[task].scores for found in seeds])))
            margins_SD = np.stack([found[task].margin for found in seeds])
            if (margin := samples[row].margin) and not np.isnan(margins_SD).any():
                drawn.append((margin, margins_SD))
        means_RM = statistics.resampled_means(np.concatenate([values_SD for _, values_SD in drawn]), task)
        ends = np.cumsum([len(values_SD) for _, values_SD in drawn])
        for (sample, values_SD), means_RS in zip(drawn, np.split(means_RM, ends[:-1], axis=1), strict=True):
            sample.scores[task] = values_SD
            sample.replicates[task] = statistics.over_seeds(means_RS)
    return samples


def read_scores(store: Store, record: RunRecord) -> dict[str, DocumentScores] | None:
    """Task or group -> scores of one run in its primary metric (acc_norm where the task has it, else acc).

    The subjects of a group such as MMLU make one pool of documents: its mean is then lm-eval's, weighted by subject
    size, and so few documents a subject as two say too little about the spread within it to resample them apart.
    """
    numbers = ["acc", "acc_norm", "chance", "margin"]
    frame = store.documents(record.spec.run_id, ["task", "group", "doc_id", "doc_hash", *numbers])
    if frame is None:
        return None
    pools = frame["group"].fillna(frame["task"])
    order = (pools, frame["task"], frame["doc_id"], frame["doc_hash"])
    # As lists: from one text to the next they take a tenth of the time that pandas takes.
    documents = sorted(zip(*(column.tolist() for column in order), range(len(frame)), strict=True))
    columns = {name: frame[name].to_numpy(dtype=np.float64) for name in numbers}
    found: dict[str, DocumentScores] = {}
    for pool, members in groupby(documents, key=lambda document: document[0]):
        keys = [key for _, *key in members]
        lines = [key.pop() for key in keys]
        metric = "acc_norm" if pool != MMLU and record.measure(f"{pool}/acc_norm") else "acc"
        scores_D = columns[metric][lines]
        if not np.isnan(scores_D).all():
            digest = hashlib.sha256(repr(keys).encode()).hexdigest()
            found[pool] = DocumentScores(digest, scores_D, columns["chance"][lines], columns["margin"][lines])
    return found


def _require_same_documents(runs: dict[Row, list[dict[str, DocumentScores]]]) -> None:
    """Specs and data fingerprints agree already, so a difference means that a file is not what it says it is."""
    first: tuple[str, dict[str, str]] | None = None
    for row, seeds in runs.items():
        for record, found in zip(row.records, seeds, strict=True):
            documents = {task: scores.documents for task, scores in found.items()}
            first = first or (record.spec.run_id, documents)
            if documents != first[1]:
                raise UserError(
                    f"the runs {first[0]} and {record.spec.run_id} claim the same evaluation but hold scores of "
                    "different documents: delete one of them and run it again"
                )


def _guessing(sample: Sample) -> Guessing:
    levels = {task: chance_D for task, chance_D in sample.chance.items() if not np.isnan(chance_D).any()}

    def estimate(tasks: Sequence[str]) -> Estimate:
        chosen = [levels[task] for task in tasks]
        return Estimate(float(np.mean([c.mean() for c in chosen])), *statistics.guessing_interval(chosen))

    tasks = commonsense_tasks(sample)
    known = tasks and all(task in levels for task in tasks)
    return Guessing({task: estimate([task]) for task in levels}, estimate(tasks) if known else None)


def _summary(row: Row, sample: Sample, dense: Sample | None, guessing: Guessing) -> RowScores:
    tasks = commonsense_tasks(sample)
    scores = RowScores(tasks={task: sample.estimate([task]) for task in sample.scores}, guessing=guessing)
    if not tasks:
        return scores
    against = dense if dense and not row.is_reference else None
    margin, dense_margin = _margins(sample, tasks), _margins(against, tasks)
    return replace(
        scores,
        average=sample.estimate(tasks),
        averaged_tasks=tasks,
        spread=statistics.spread([float(average) for average in sample.per_seed(tasks)]),
        delta=sample.less(against, tasks) if against else None,
        margin=margin.estimate(tasks) if margin else None,
        margin_delta=margin.less(dense_margin, tasks) if margin and dense_margin else None,
    )


def _margins(sample: Sample | None, tasks: Sequence[str]) -> Sample | None:
    """The margins of a sample, where every one of the tasks has them."""
    margin = sample.margin if sample else None
    return margin if margin and all(task in margin.scores for task in tasks) else None


def _with_marks(summaries: dict[Row, RowScores], samples: dict[Row, Sample]) -> dict[Row, RowScores]:
    """Mark the best average of the contest and those not significantly below it."""
    averages = {row: s.average.value for row, s in summaries.items() if s.average and not row.is_reference}
    if not averages:
        return summaries
    # Equal averages: by name, whatever order the records were read in.
    best = min(averages, key=lambda row: (-round(averages[row], 12), row.spec.method, row.settings))
    tasks = summaries[best].averaged_tasks
    others = [row for row in averages if row is not best]
    adjusted = statistics.holm([samples[best].less(samples[row], tasks).p_value for row in others])
    marked = {**summaries, best: replace(summaries[best], mark="best")}
    for row, p_value in zip(others, adjusted, strict=True):
        mark: Mark = "" if p_value < SIGNIFICANT else "tied"
        marked[row] = replace(summaries[row], mark=mark, p_vs_best=p_value)
    return marked
