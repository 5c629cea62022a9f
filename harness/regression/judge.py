"""From evidence and bounds to verdicts: a run's, and the comparison's exit code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.records import RunRecord
from harness.regression.evidence import Advantage, Evidence, read_evidence
from harness.regression.limits import Limits
from harness.regression.matching import Pair, count_differences, match, refuse_differences, refuse_missing
from harness.report.scores import SIGNIFICANT
from harness.store import Store

Verdict = Literal["pass", "fail", "cannot tell"]

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "cannot tell": 3}
VERDICTS: tuple[Verdict, ...] = ("fail", "cannot tell", "pass")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    """``accuracy``, ``mmlu``, ``recovery``, ``loss``, ``parameters``, ``pruning time``, ``run``."""
    verdict: Verdict
    text: str
    """The numbers behind it, in a sentence."""


@dataclass(frozen=True, slots=True)
class RunVerdict:
    """What became of one reference run."""

    pair: Pair
    checks: tuple[Check, ...]
    evidence: Evidence | None

    @property
    def run_id(self) -> str:
        """Of the reference run."""
        return self.pair.reference.spec.run_id

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks."""
        return _worst([check.verdict for check in self.checks])


@dataclass(frozen=True, slots=True)
class Regression:
    """A candidate compared with a reference."""

    runs: tuple[RunVerdict, ...]
    limits: Limits
    differences: tuple[str, ...]
    """What else than the code differed, and was allowed to."""
    only_reference: tuple[str, ...]
    """Runs without a counterpart, which were not compared."""
    only_candidate: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of the runs."""
        return _worst([run.verdict for run in self.runs])

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 cannot tell."""
        return EXIT_CODES[self.verdict]


def regress(
    reference: Store, candidate: Store, limits: Limits, *, allow_different: bool = False, require_all: bool = False
) -> Regression:
    """Compare every reference run with its counterpart.

    Args:
        reference: the runs to hold on to.
        candidate: the runs made with what is under test.
        limits: how much worse they may be.
        allow_different: compare although documents, versions, data, calibration or settings differ.
        require_all: compare only if every reference run has a counterpart.

    Raises:
        UserError: a folder is empty or corrupt, nothing matches, or what must be alike or there is not.
    """
    matching = match(reference, candidate)
    if require_all:
        refuse_missing(matching)
    if not allow_different:
        refuse_differences(matching.pairs)
    scored = [pair for pair in matching.pairs if pair.reference.status == pair.candidate.status == "ok"]
    evidence, scored = read_evidence(reference, candidate, scored, limits.tolerance / 100, limits.min_recovery)
    if not allow_different:
        refuse_differences(scored)
    found = {pair.reference.spec.run_id: (pair, one) for pair, one in zip(scored, evidence, strict=True)}
    pairs = [found.get(pair.reference.spec.run_id, (pair, None)) for pair in matching.pairs]
    return Regression(
        runs=tuple(RunVerdict(pair, tuple(_checks(pair, one, limits)), one) for pair, one in pairs),
        limits=limits,
        differences=tuple(count_differences([pair for pair, _ in pairs])),
        only_reference=matching.only_reference,
        only_candidate=matching.only_candidate,
    )


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    return next(verdict for verdict in VERDICTS if verdict in verdicts)


def _checks(pair: Pair, evidence: Evidence | None, limits: Limits) -> Iterator[Check]:
    before, after = pair.reference, pair.candidate
    if after.status != before.status:
        better = after.status == "ok"
        told = f"{before.status} in the reference, {after.status} in the candidate" + (
            f": {after.reason}" if after.reason else ""
        )
        yield Check("run", "cannot tell" if better else "fail", told)
        return
    if after.status != "ok":
        yield Check("run", "pass", f"{after.status} in both: {after.reason}")
        return
    if evidence is None:
        yield Check("accuracy", "cannot tell", "no task was scored on the same documents in both")
    else:
        yield from accuracy_checks(evidence, limits)
    yield from _bounds(before, after, limits)


def accuracy_checks(evidence: Evidence, limits: Limits) -> Iterator[Check]:
    """The average, tasks that got worse, and the recovery where it was asked for."""
    yield _accuracy(evidence, limits)
    yield from _tasks(evidence, limits)
    if evidence.recovery is not None and evidence.dense_average is not None and limits.min_recovery is not None:
        kept = evidence.candidate_average / evidence.dense_average if evidence.dense_average else math.nan
        yield _recovery(evidence.recovery, kept, limits.min_recovery)


def _accuracy(evidence: Evidence, limits: Limits) -> Check:
    average = evidence.average
    told = (
        f"average {100 * evidence.reference_average:.1f} to {100 * evidence.candidate_average:.1f}, "
        f"{points(average.value)} points {interval(average)} on {average.num_documents} documents"
    )
    if average.p_allowed < SIGNIFICANT:
        return Check(
            "accuracy", "pass", f"{told}: not {limits.tolerance:g} points worse (p {p_text(average.p_allowed)})"
        )
    # A drop can be real and yet within what is allowed; it fails where it is neither noise nor allowed.
    is_real = average.p_worse_holm < SIGNIFICANT
    if is_real and average.value < -limits.tolerance / 100:
        return Check("accuracy", "fail", f"{told}: worse for real (corrected p {p_text(average.p_worse_holm)})")
    real = f" a drop is real (corrected p {p_text(average.p_worse_holm)}), but" if is_real else ""
    return Check(
        "accuracy",
        "cannot tell",
        f"{told}:{real} a drop of {limits.tolerance:g} points is neither seen nor excluded; "
        f"with {average.num_needed:,} documents it would be in 80% of comparisons, if nothing dropped",
    )


def _tasks(evidence: Evidence, limits: Limits) -> Iterator[Check]:
    for task in evidence.tasks:
        drop = task.reference - task.candidate
        if task.p_worse_holm < SIGNIFICANT and drop > limits.tolerance / 100:
            yield Check(
                task.task,
                "fail",
                f"{100 * task.reference:.1f} to {100 * task.candidate:.1f}: of {task.num_documents} documents "
                f"{task.only_reference} were lost and {task.only_candidate} won (McNemar's exact test, corrected "
                f"p {p_text(task.p_worse_holm)})",
            )


def _recovery(surplus: Advantage, kept: float, least: float) -> Check:
    told = f"{kept:.1%} of the dense average, {least:.1%} asked for"
    if surplus.p_worse_holm < SIGNIFICANT:
        return Check("recovery", "fail", f"{told}: less for real (corrected p {p_text(surplus.p_worse_holm)})")
    if surplus.p_allowed < SIGNIFICANT:
        return Check("recovery", "pass", f"{told}: reached (p {p_text(surplus.p_allowed)})")
    needed = f"; {surplus.num_needed:,} documents would tell in 80% of comparisons" if surplus.num_needed else ""
    return Check("recovery", "cannot tell", f"{told}: neither shown on {surplus.num_documents} documents{needed}")


def _bounds(before: RunRecord, after: RunRecord, limits: Limits) -> Iterator[Check]:
    if limits.max_loss_increase is not None:
        losses = [held_out_loss(record) for record in (before, after)]
        yield _loss(losses[0], losses[1], limits.max_loss_increase)
    if limits.max_params_ratio is not None:
        totals = [record.params_after.total if record.params_after else None for record in (before, after)]
        yield _ratio("parameters", totals[0], totals[1], limits.max_params_ratio)
    if limits.max_time_ratio is not None:
        seconds = [record.phase_seconds.get("prune") for record in (before, after)]
        yield _ratio("pruning time", seconds[0], seconds[1], limits.max_time_ratio)


def held_out_loss(record: RunRecord) -> float | None:
    """Nats per token of the held-out text; None where it was not measured."""
    measure = record.measure("heldout/ppl_token")
    return math.log(measure.value) if measure else None


def _loss(before: float | None, after: float | None, allowed: float) -> Check:
    if before is None or after is None:
        return Check("loss", "cannot tell", "the held-out loss was not measured in both")
    told = (
        f"{before:.4f} to {after:.4f} nats/token (perplexity {math.exp(before):,.2f} to {math.exp(after):,.2f}), "
        f"{after - before:+.4f}, {allowed:g} allowed"
    )
    return Check("loss", "pass" if after - before <= allowed else "fail", told)


def _ratio(name: str, before: float | None, after: float | None, allowed: float) -> Check:
    if before is None or after is None or before <= 0:
        return Check(name, "cannot tell", f"{name} not counted in both")
    told = f"{before:,.10g} to {after:,.10g}, {after / before:.4f} times, {allowed:g} allowed"
    return Check(name, "pass" if after / before <= allowed else "fail", told)


def points(fraction: float) -> str:
    """A difference of fractions in signed points."""
    return f"{100 * fraction:+.1f}"


def interval(average: Advantage) -> str:
    """Its 90% interval in points."""
    return f"[{points(average.interval.low)}, {points(average.interval.high)}]"


def p_text(p_value: float) -> str:
    """A p-value, as far as it says anything."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
