"""Intervals and paired tests over per-document scores: numpy and scipy only.

Everything rests on one resampling of the documents that all runs share: a run's interval, the difference of two runs
and the test between them come from the same draws, so that they never contradict each other, and a row's interval does
not depend on which other rows stand in the table.

Shape letters: R resamples, M runs, D documents, S seeds.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, which takes half a second more to import

Floats = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
NORMAL_95 = float(special.ndtri((1 + CONFIDENCE) / 2))
"""Half the width of a 95% interval, in standard errors of a mean over many."""
_CHUNK = 1 << 20
"""Documents drawn at a time: bounds the memory at some 30 MB, however many documents there are."""


class Interval(NamedTuple):
    """From where to where."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """What one run scores above another on the same documents."""

    value: float
    interval: Interval
    p_value: float
    """Two-sided, paired; below 5% where the interval leaves zero out, as far as R resamples can tell."""


@dataclass(frozen=True, slots=True)
class McNemar:
    """On how many documents just one of two runs is right, and how surprising so uneven a split is."""

    only_first: int
    only_second: int
    p_value: float


def resampled_means(scores_MD: ArrayLike, stratum: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Mean scores on documents drawn with replacement, the same draw for every run: means_RM.

    Args:
        scores_MD: one row per run; column d is the same document in every row.
        stratum: name of the task; the draws depend on it, ``seed`` and D, and on nothing else.
        resamples: R.
        seed: of the draws.
    """
    scores = np.atleast_2d(np.asarray(scores_MD, dtype=np.float64))
    num_documents = scores.shape[1]
    if num_documents == 0 or not np.isfinite(scores).all():
        raise ValueError(f"{stratum}: scores must be finite and at least one, given shape {scores.shape}")
    generator = np.random.default_rng([seed, zlib.crc32(stratum.encode())])
    step = max(1, _CHUNK // num_documents)
    parts = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, num_documents, size=(rows, num_documents))
        drawn += np.arange(rows)[:, None] * num_documents
        counts = np.bincount(drawn.ravel(), minlength=rows * num_documents).reshape(rows, num_documents)
        parts.append(counts.astype(np.float64) @ scores.T)
    means_RM: Floats = np.concatenate(parts) / num_documents
    return means_RM


def resampled_average(strata: Mapping[str, ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Averages of task means, documents drawn within each task: averages_RM.

    Args:
        strata: task -> scores_MD; every task weighs the same, however many documents it has.
        resamples: R.
        seed: of the draws.
    """
    means = [resampled_means(scores, name, resamples=resamples, seed=seed) for name, scores in strata.items()]
    averages_RM: Floats = np.mean(means, axis=0)
    return averages_RM


def over_seeds(replicates_RS: Floats, *, seed: int = 0) -> Floats:
    """Resample the seeds on top of the documents: replicates_R of the mean over seeds.

    Each resample draws S - 1 of the S seeds with replacement, since drawing S would understate the variance between
    seeds by the factor (S - 1) / S, a third for three seeds. Documents are crossed with seeds: one draw of documents
    serves all seeds of a resample. Methods with as many seeds share the draw, so their calibration stays paired.

    Source: Rao and Wu, Resampling inference with complex survey data (JASA 83, 1988), with n - 1 draws.
    """
    resamples, num_seeds = replicates_RS.shape
    if num_seeds == 1:
        return replicates_RS[:, 0]
    generator = np.random.default_rng([seed, zlib.crc32(b"seeds"), num_seeds])
    drawn = generator.integers(0, num_seeds, size=(resamples, num_seeds - 1))
    return np.asarray(np.take_along_axis(replicates_RS, drawn, axis=1).mean(axis=1))


def percentile_interval(replicates_R: Floats, confidence: float = CONFIDENCE) -> Interval:
    """The middle ``confidence`` of the replicates."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates_R, [tail, 1 - tail])
    return Interval(float(low), float(high))


def paired_difference(first_R: Floats, second_R: Floats, value: float) -> Difference:
    """Difference of two runs from replicates of the same draws.

    The p-value doubles the share of replicates on the far side of zero, ties counted on both sides and one added to
    each count.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), chapter 4, for the added one.

    Args:
        first_R: replicates of the run whose advantage is asked for.
        second_R: of the other, from the same draws.
        value: the difference on the documents themselves.
    """
    differences = first_R - second_R
    # Equal sets of answers may differ by rounding in the sums.
    differences[np.abs(differences) < 1e-12] = 0.0
    smaller = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p_value = min(1.0, 2 * (smaller + 1) / (len(differences) + 1))
    return Difference(value, percentile_interval(differences), p_value)


def paired_bootstrap(
    first: Mapping[str, ArrayLike], second: Mapping[str, ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """How much higher the first run's average over tasks is, on the same documents, stratified by task.

    Args:
        first: task -> scores_D of one run.
        second: task -> scores_D of the other; document d is the same in both.
        resamples: R.
        seed: of the draws.
    """
    if first.keys() != second.keys():
        raise ValueError(f"different tasks: {sorted(first)} and {sorted(second)}")
    strata = {name: np.stack([np.asarray(first[name]), np.asarray(second[name])]) for name in first}
    replicates_RM = resampled_average(strata, resamples=resamples, seed=seed)
    value = np.mean([scores[0].mean() - scores[1].mean() for scores in strata.values()])
    return paired_difference(replicates_RM[:, 0], replicates_RM[:, 1], float(value))


def mcnemar(
    first_D: ArrayLike, second_D: ArrayLike, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> McNemar:
    """McNemar's exact test on the answers, right (1) or wrong (0), of two runs to the same questions.

    Given the questions that only one run got right, each run is as likely to be that one if neither is better: a
    binomial test at one half, one-sided where ``alternative`` is that the first is better (``greater``). Where answers
    earn parts of a point, the one that earned more counts as right: the sign test, which this is for ones and zeros.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions or percentages
    (Psychometrika 12, 1947).
    """
    first, second = np.asarray(first_D), np.asarray(second_D)
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("McNemar's test takes two equally long rows of finite scores")
    only_first = int(np.count_nonzero(first > second))
    only_second = int(np.count_nonzero(first < second))
    if only_first + only_second == 0:
        return McNemar(0, 0, 1.0)
    more = only_first if alternative == "greater" else max(only_first, only_second)
    at_least = float(special.bdtrc(more - 1, only_first + only_second, 0.5))
    return McNemar(only_first, only_second, at_least if alternative == "greater" else min(1.0, 2 * at_least))


def exceeds(strata: Mapping[str, Floats], replicates_R: Floats, margin: float) -> float:
    """One-sided p-value of an average of paired differences being above a margin, against its being no higher.

    The larger of two: the share of bootstrap replicates at or below the margin, and a score test. Where few answers
    differ the bootstrap knows too little (none of 50 differing would prove everything); the score test knows that a
    true average of ``margin`` needs at least as large a share of differing answers. What R resamples cannot resolve
    (no replicate in the tail) is left to the score test alone.

    Source: Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design (Statistics in Medicine 17, 1998), for the variance under the margin; here over strata that weigh the same.

    Args:
        strata: task -> differences_D on the documents, within -1 and 1.
        replicates_R: of the average, from `resampled_average`.
        margin: what is to be exceeded.
    """
    value = float(np.mean([differences_D.mean() for differences_D in strata.values()]))
    stderr = _null_variance(strata, margin) ** 0.5
    if stderr == 0:  # only for margin 0 and no difference at all
        return 1.0
    p_score = float(special.ndtr((margin - value) / stderr))
    # Sums of the same answers in another order may differ by rounding.
    count = int(np.count_nonzero(replicates_R <= margin + 1e-12))
    return max(p_score, (count + 1) / (len(replicates_R) + 1)) if count else p_score


def documents_needed(strata: Mapping[str, Floats], drop: float, power: float = 0.8) -> int:
    """Documents with which `exceeds` tells with this power that nothing dropped by ``drop``, if in truth nothing did.

    As many in each stratum, relative to the others, as there are now, and answers differing as often.

    Args:
        strata: task -> differences_D on the documents.
        drop: positive; the margin is its negative.
        power: share of such comparisons in which the 5% test succeeds.
    """
    now = sum(len(differences_D) for differences_D in strata.values())
    critical = float(special.ndtri(CONFIDENCE)) * _null_variance(strata, -drop) ** 0.5
    noise = float(special.ndtri(power)) * _null_variance(strata, 0.0) ** 0.5
    return int(np.ceil(now * ((critical + noise) / drop) ** 2))


def _null_variance(strata: Mapping[str, Floats], margin: float) -> float:
    """Variance of the average of task means if its expectation is the margin."""
    weights = [1 / (len(strata) ** 2 * len(differences_D)) for differences_D in strata.values()]
    moment = sum(w * float(np.mean(d_D**2)) for w, d_D in zip(weights, strata.values(), strict=True))
    return max(moment, abs(margin) * sum(weights)) - margin**2 * sum(weights)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: all below 5% are significant together at a family-wise 5%.

    Source: Holm, A simple sequentially rejective multiple test procedure (Scand. J. Statist. 6, 1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for a single seed, which shows no spread."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def guessing_interval(chances: Sequence[ArrayLike], confidence: float = CONFIDENCE) -> Interval:
    """Where the average over tasks of somebody who only guesses lands with probability ``confidence``.

    The sum of independent Bernoulli draws, approximated by a normal distribution.

    Args:
        chances: per task, chance_D of guessing each document right.
        confidence: of the interval.
    """
    tasks = [np.asarray(chance_D, dtype=np.float64) for chance_D in chances]
    mean = float(np.mean([task.mean() for task in tasks]))
    variance = sum(float((task * (1 - task)).sum()) / len(task) ** 2 for task in tasks) / len(tasks) ** 2
    half = float(special.ndtri((1 + confidence) / 2)) * variance**0.5
    return Interval(max(0.0, mean - half), min(1.0, mean + half))
