"""Intervals, p values and pass@k beside scipy; the same draws give the same intervals.

numpy's default_rng gives both the same row numbers, so the bootstrap's intervals are compared one by one.
"""

import math

import pytest

pytest.importorskip("scipy")

import numpy as np
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from minift.metrics.resampling import approximate_randomization, bootstrap, paired_bootstrap
from minift.metrics.sampling import pass_at_k
from minift.metrics.uncertainty import mcnemar, paired_difference, wilson

pytestmark = pytest.mark.parity

kinds = st.sampled_from(["right or wrong", "ties", "normal", "large", "constant"])
seeds = st.integers(0, 2**32 - 1)


def scores(kind: str, n: int, rng) -> np.ndarray:
    return {
        "right or wrong": rng.integers(0, 2, n).astype(float),
        "ties": rng.integers(0, 5, n) / 4,
        "normal": rng.normal(size=n),
        "large": 1e6 + rng.normal(size=n),
        "constant": np.full(n, 0.1),
    }[kind]


@CASES
@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.01, 0.999))
def test_wilsons_interval_and_mcnemars_p_are_binomtests(n10, n01, level):
    if n10 + n01:
        expected = stats.binomtest(n10, n10 + n01)
        statistic, p = mcnemar([1] * n10 + [0] * n01 + [1], [0] * n10 + [1] * n01 + [1])
        assert statistic == min(n10, n01)
        assert p == pytest.approx(expected.pvalue, rel=1e-10, abs=1e-12)  # its beta function's own error
        z, ends = float(stats.norm.ppf((1 + level) / 2)), expected.proportion_ci(level, "wilson")
        assert wilson(n10, n10 + n01, z) == pytest.approx((ends.low, ends.high), rel=0, abs=1e-12)
    found = mcnemar([1] * (n10 + 1) + [0] * n01, [0] * (n10 + 1) + [1] * n01, exact=False)
    assert found[1] == pytest.approx(stats.chi2.sf(found[0], 1), rel=1e-12, abs=0)


@CASES
@given(st.integers(1, 300), st.data())
def test_pass_at_k_is_the_hypergeometric_chance_of_a_right_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(stats.hypergeom.sf(0, n, c, k), rel=0, abs=1e-12)


@CASES
@given(kinds, st.integers(2, 40), seeds, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_bootstrap_intervals_are_those_of_the_same_draws(kind, n, seed, level):
    rng = np.random.default_rng(seed)
    a, b = scores(kind, n, rng), scores(kind, n, rng)
    size = max(np.abs(a).max(), np.abs(b).max(), 1)

    def expected(statistic, *columns):
        # One column of row numbers, so that `paired` draws the same rows for all columns.
        rows = (np.arange(n),)
        return stats.bootstrap(
            rows,
            lambda i, axis: statistic(*(c[i] for c in columns)),
            n_resamples=25,
            confidence_level=level,
            method="percentile",
            vectorized=True,
            rng=seed,
        ).confidence_interval

    theirs = expected(lambda x: x.mean(axis=-1), a)
    found = bootstrap(a, samples=25, seed=seed, level=level)
    assert found == pytest.approx((a.mean(), *theirs), rel=0, abs=1e-12 * size)
    theirs = expected(lambda x, y: x.mean(axis=-1) - y.mean(axis=-1), a, b)
    pair = paired_bootstrap(a, b, samples=25, seed=seed, level=level)
    ends = (pair["low"], pair["high"])
    assert ends == pytest.approx(tuple(theirs), rel=0, abs=1e-12 * size)
    theirs = expected(lambda x: np.median(x, axis=-1), a)
    found = bootstrap((a,), lambda x: float(np.median(x)), samples=25, seed=seed, level=level)
    assert found == pytest.approx((np.median(a), *theirs), rel=0, abs=1e-12 * size)
    half = stats.norm.ppf(0.975) * stats.sem(a - b, ddof=0)
    d = (a - b).mean()
    assert paired_difference(a, b) == pytest.approx((d, d - half, d + half), rel=0, abs=1e-12 * size)


@CASES
@given(st.sampled_from(["right or wrong", "ties", "normal"]), st.integers(2, 7), seeds)
def test_randomization_draws_from_the_permutation_test(kind, n, seed):
    rng = np.random.default_rng(seed)
    a, b = scores(kind, n, rng), scores(kind, n, rng)
    if np.abs((a - b).sum()) < 1e-9:
        assert approximate_randomization(a, b, trials=400, seed=seed) == 1
        return
    exact = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.abs((x - y).mean(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=math.inf,
        vectorized=True,
    ).pvalue
    p = approximate_randomization(a, b, trials=400, seed=seed)
    as_far = round(p * 401) - 1
    # As many of the 400 as a binomial draw gives: 1e-9 a case leaves 1e-6 for a false alarm in a thousand.
    least, most = stats.binom.ppf([1e-9, 1 - 1e-9], 400, exact)
    assert least <= as_far <= most


def test_the_interval_of_a_mean_covers_it_as_often_as_theory_says():
    """Of n normal scores it is nearly mean -+ z s / sqrt(n), s with 1 / n: it covers as Student's t says."""
    n, experiments, level = 30, 1500, 0.9
    rng = np.random.default_rng(5)
    hits = 0
    for experiment in range(experiments):
        _, low, high = bootstrap(rng.normal(size=n), samples=399, seed=experiment, level=level)
        hits += low <= 0 <= high
    z = stats.norm.ppf((1 + level) / 2)
    expected = 1 - 2 * stats.t.sf(z * math.sqrt((n - 1) / n), n - 1)
    # 5 standard deviations of a binomial draw, and 0.01 for the noise of quantiles of 399 scores
    spread = 5 * math.sqrt(expected * (1 - expected) / experiments) + 0.01
    assert hits / experiments == pytest.approx(expected, rel=0, abs=spread)


def test_p_values_of_equal_systems_are_not_below_a_level_more_often_than_it_says():
    rng = np.random.default_rng(6)
    p = []
    for experiment in range(1500):
        a, b = rng.normal(size=(2, 20))
        p.append(approximate_randomization(a, b, trials=199, seed=experiment))
    for level in (0.05, 0.2, 0.5):
        # p is a multiple of 1 / 200 and exact at these levels; bounds of 1e-9 on a binomial draw
        least, most = stats.binom.ppf([1e-9, 1 - 1e-9], len(p), level)
        assert least <= sum(x <= level for x in p) <= most
