"""Intervals and tests against scipy, statsmodels, closed forms and a published example."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportions_ztest

from harness import statistics

RNG = np.random.default_rng(7)


def _answers(table: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of answers with (both right, only first, only second, neither) documents."""
    first = np.repeat([1.0, 1.0, 0.0, 0.0], table)
    second = np.repeat([1.0, 0.0, 1.0, 0.0], table)
    return first, second


def test_bootstrap_interval_is_scipys() -> None:
    scores = RNG.normal(size=80)
    ours = statistics.percentile_interval(statistics.resampled_means(scores, "t")[:, 0])
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    spread = scores.std() / 80**0.5
    assert ours.low == pytest.approx(theirs.low, abs=0.08 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.08 * spread)


def test_variance_of_the_average_is_the_sum_over_tasks() -> None:
    strata = {"a": RNG.random(40), "b": RNG.random(200) ** 3, "c": (RNG.random(25) < 0.3).astype(float)}
    replicates = statistics.resampled_average(strata)[:, 0]
    expected = sum(scores.var() / len(scores) for scores in strata.values()) / 9
    assert replicates.var() == pytest.approx(expected, rel=0.06)
    assert replicates.mean() == pytest.approx(np.mean([scores.mean() for scores in strata.values()]), abs=0.002)


def test_tasks_weigh_the_same_however_many_documents_they_have() -> None:
    strata = {"small": np.ones(3), "large": np.zeros(300)}
    assert statistics.resampled_average(strata) == pytest.approx(0.5)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    covered = 0
    for trial in range(200):
        scores = (np.random.default_rng(trial).random(60) < 0.4).astype(float)
        low, high = statistics.percentile_interval(statistics.resampled_means(scores, "t", resamples=1000)[:, 0])
        covered += low <= 0.4 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_rows_interval_does_not_depend_on_the_other_rows() -> None:
    scores = RNG.random((4, 30))
    together = statistics.resampled_means(scores, "piqa")
    alone = statistics.resampled_means(scores[2], "piqa")
    np.testing.assert_allclose(together[:, 2], alone[:, 0], rtol=0, atol=1e-14)


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = RNG.random((1, 30))
    whole = statistics.resampled_means(scores, "piqa", resamples=100)
    monkeypatch.setattr(statistics, "_CHUNK", 30 * 7)
    np.testing.assert_allclose(statistics.resampled_means(scores, "piqa", resamples=100), whole, atol=1e-14)


def test_non_finite_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        statistics.resampled_means([0.0, float("nan")], "piqa")


def test_paired_interval_is_scipys_on_the_differences() -> None:
    first, second = RNG.random(120), RNG.random(120)
    ours = statistics.paired_bootstrap({"t": first}, {"t": second})
    theirs = stats.bootstrap((first - second,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    assert ours.value == pytest.approx((first - second).mean())
    assert ours.interval.low == pytest.approx(theirs.confidence_interval.low, abs=0.003)
    assert ours.interval.high == pytest.approx(theirs.confidence_interval.high, abs=0.003)


def test_pairing_narrows_the_interval_of_correlated_runs() -> None:
    hard = RNG.random(200)
    first = (hard + 0.1 * RNG.random(200) < 0.60).astype(float)
    second = (hard + 0.1 * RNG.random(200) < 0.55).astype(float)
    paired = statistics.paired_bootstrap({"t": first}, {"t": second}).interval
    unpaired = 2 * 1.96 * ((first.var() + second.var()) / 200) ** 0.5
    assert paired.high - paired.low < 0.6 * unpaired


def test_p_value_is_that_of_the_z_test_for_many_documents() -> None:
    difference = RNG.normal(0.1, 1, size=500)
    ours = statistics.paired_bootstrap({"t": difference}, {"t": np.zeros(500)})
    z = difference.mean() / (difference.std() / 500**0.5)
    assert ours.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.012)


def test_equal_runs_differ_by_nothing() -> None:
    scores = RNG.random(50)
    same = statistics.paired_bootstrap({"t": scores, "u": scores}, {"t": scores, "u": scores})
    assert (same.value, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)


@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.floats(0, 0.4))
def test_significant_exactly_where_the_interval_leaves_zero_out(seed: int, documents: int, gap: float) -> None:
    generator = np.random.default_rng(seed)
    first = {"t": (generator.random(documents) < 0.5 + gap).astype(float)}
    second = {"t": (generator.random(documents) < 0.5).astype(float)}
    found = statistics.paired_bootstrap(first, second, resamples=999)
    if found.p_value < 0.05:
        assert not found.interval.low < 0 < found.interval.high
    if found.interval.low > 0 or found.interval.high < 0:
        assert found.p_value <= 0.06


@given(st.integers(0, 2**32 - 1))
def test_swapping_the_runs_changes_only_the_sign(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = ({"t": generator.random(20), "u": generator.random(9)} for _ in range(2))
    one, other = (statistics.paired_bootstrap(*pair, resamples=500) for pair in ((first, second), (second, first)))
    assert one.value == pytest.approx(-other.value)
    assert one.interval == pytest.approx((-other.interval.high, -other.interval.low))
    assert one.p_value == other.p_value


def test_different_tasks_are_not_paired() -> None:
    with pytest.raises(ValueError, match="different tasks"):
        statistics.paired_bootstrap({"t": [1.0]}, {"u": [1.0]})


@given(st.tuples(*[st.integers(0, 30)] * 4).filter(lambda table: sum(table) > 0))
def test_mcnemar_is_statsmodels_exact_test(table: tuple[int, int, int, int]) -> None:
    both, only_first, only_second, neither = table
    ours = statistics.mcnemar(*_answers(table))
    theirs = statsmodels_mcnemar([[both, only_first], [only_second, neither]], exact=True)
    assert (ours.only_first, ours.only_second) == (only_first, only_second)
    assert ours.p_value == pytest.approx(float(theirs.pvalue))


def test_mcnemar_by_hand() -> None:
    # 1 against 7 of 8: 2 (1 + 8) / 2^8.
    assert statistics.mcnemar(*_answers((5, 1, 7, 2))).p_value == pytest.approx(18 / 256)


def test_parts_of_a_point_make_it_the_sign_test() -> None:
    assert statistics.mcnemar([0.5, 1.0, 0.2], [0.25, 0.0, 0.2]) == statistics.McNemar(2, 0, 0.5)
    with pytest.raises(ValueError, match="finite"):
        statistics.mcnemar([np.nan, 1.0], [1.0, 0.0])


def test_pairing_sees_what_the_unpaired_z_test_misses() -> None:
    """The example of lm-evaluation-harness pull request 3868: 220 documents, z test p = 0.080, McNemar p = 0.008.

    It gives the p-values but not the counts. Of all tables of 220 documents, six give both values with the exact test
    and lm-eval's standard error (n - 1): 0/8, 10/27 and 12/30 discordant documents, twice each (the scores mirrored at
    one half). This is 12/30: 122 and 140 right.
    """
    table = (110, 12, 30, 68)
    first, second = _answers(table)
    variances = [scores.mean() * (1 - scores.mean()) / (len(scores) - 1) for scores in (first, second)]
    unpaired = 2 * stats.norm.sf((second.mean() - first.mean()) / sum(variances) ** 0.5)
    assert sum(table) == 220
    assert round(unpaired, 3) == 0.080
    assert proportions_ztest([122, 140], [220, 220], prop_var=False)[1] == pytest.approx(unpaired, abs=0.001)
    assert round(statistics.mcnemar(first, second).p_value, 3) == 0.008
    assert statistics.paired_bootstrap({"t": first}, {"t": second}).p_value < 0.01


@pytest.mark.parametrize("num_tests", [1, 5, 12])
def test_holm_is_statsmodels(num_tests: int) -> None:
    p_values = (RNG.random(num_tests) ** 3).tolist()
    assert statistics.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_the_raw_value_and_bonferroni(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    for raw, corrected in zip(p_values, adjusted, strict=True):
        assert raw <= corrected <= min(1.0, raw * len(p_values))
    assert [corrected for _, corrected in sorted(zip(p_values, adjusted, strict=True))] == sorted(adjusted)


def test_holm_by_hand() -> None:
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([]) == []


def test_spread_is_the_sample_standard_deviation() -> None:
    assert statistics.spread([0.40, 0.44, 0.42]) == pytest.approx(0.02)
    assert statistics.spread([0.4]) is None


def test_seeds_that_differ_widen_the_interval_by_their_variance_over_their_number() -> None:
    # Every document scores alike, so all variance comes from the seeds: s^2 / S = 0.02^2 / 3.
    seeds = np.repeat([[0.40], [0.44], [0.42]], 25, axis=1)
    replicates = statistics.over_seeds(statistics.resampled_means(seeds, "t"))
    assert replicates.var() == pytest.approx(0.02**2 / 3, rel=0.05)
    assert replicates.mean() == pytest.approx(0.42, abs=0.001)


def test_seeds_that_agree_leave_the_documents_interval_as_it_is() -> None:
    scores = RNG.random(40)
    replicates = statistics.resampled_means(np.stack([scores] * 3), "t")
    np.testing.assert_allclose(statistics.over_seeds(replicates), replicates[:, 0], atol=1e-14)


def test_one_seed_is_the_bootstrap_over_documents() -> None:
    replicates = statistics.resampled_means(RNG.random(40), "t")
    np.testing.assert_array_equal(statistics.over_seeds(replicates), replicates[:, 0])


def test_guessers_land_in_the_interval_of_chance() -> None:
    chances = [np.full(50, 0.25), np.full(40, 0.5)]
    low, high = statistics.guessing_interval(chances)
    guesses = np.mean([(RNG.random((20_000, len(c))) < c).mean(axis=1) for c in chances], axis=0)
    assert ((guesses >= low) & (guesses <= high)).mean() == pytest.approx(0.95, abs=0.012)
    # By hand: variance (0.1875 / 50 + 0.25 / 40) / 4 = 0.0025.
    assert (low, high) == pytest.approx((0.375 - 1.959964 * 0.05, 0.375 + 1.959964 * 0.05))


def test_one_sided_mcnemar_is_the_binomial_tail() -> None:
    first, second = _answers((20, 9, 2, 10))
    assert statistics.mcnemar(first, second, "greater").p_value == pytest.approx(stats.binom.sf(8, 11, 0.5))
    assert statistics.mcnemar(second, first, "greater").p_value == pytest.approx(stats.binom.sf(1, 11, 0.5))


def test_equal_answers_exclude_a_drop_only_if_there_are_enough_of_them() -> None:
    """No differing answer in n: Tango's score is sqrt(n d / (1 - d)), by hand."""
    for num_documents, drop in ((280, 0.01), (100, 0.01), (280, 0.05)):
        strata = {"a": np.zeros(num_documents)}
        p_value = statistics.exceeds(strata, np.zeros(10_000), -drop)
        assert p_value == pytest.approx(stats.norm.sf((num_documents * drop / (1 - drop)) ** 0.5))
    assert statistics.exceeds({"a": np.zeros(50)}, np.zeros(10_000), 0.0) == 1.0


def test_against_no_margin_the_score_test_is_mcnemars_asymptotic_one() -> None:
    first, second = _answers((300, 30, 12, 200))
    strata = {"a": first - second}
    replicates = statistics.resampled_average({"a": strata["a"][None]})[:, 0]
    p_value = statistics.exceeds(strata, replicates, 0.0)
    assert p_value == pytest.approx(stats.norm.sf((30 - 12) / (30 + 12) ** 0.5), rel=0.35)
    assert p_value >= (np.count_nonzero(replicates <= 0) + 1) / 10_001


def test_documents_needed_grow_with_the_square_of_the_drop() -> None:
    strata = {"a": np.repeat([1.0, -1.0, 0.0], [50, 50, 900])}
    # Textbook: (z_95 + z_80)^2 x share of differing answers / drop^2, the drop's square being small.
    textbook = (stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) ** 2 * 0.1 / 0.02**2
    assert statistics.documents_needed(strata, 0.02) == pytest.approx(textbook, rel=0.01)
    assert statistics.documents_needed(strata, 0.01) == pytest.approx(4 * textbook, rel=0.01)
