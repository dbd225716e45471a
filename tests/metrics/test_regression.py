"""Scores of numbers: published values, exact rationals, laws, and what is refused."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, exact, regression
from minift.metrics.regression import mae, moments, mse, pairs, pearson, r2, rmse, spearman

# scikit-learn's documentation of the four scores.
DOCUMENTED = ([3, -0.5, 2, 7], [2.5, 0.0, 2, 8])
# Anscombe 1973, "Graphs in statistical analysis", table 1: of all four sets r is 0.816.
ANSCOMBE_X = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
ANSCOMBE_Y = [
    [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68],
    [9.14, 8.14, 8.74, 8.77, 9.26, 8.10, 6.13, 3.10, 9.13, 7.26, 4.74],
    [7.46, 6.77, 12.74, 7.11, 7.81, 8.84, 6.08, 5.39, 8.15, 6.42, 5.73],
]
# Hours of television beside IQ, a worked example found in many texts: sum d^2 = 194, rho = 1 - 6 194 / 990.
IQ = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
HOURS = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]

doubles = st.floats(allow_nan=False, allow_infinity=False)
columns = st.lists(st.tuples(doubles, doubles), min_size=2, max_size=12).map(
    lambda rows: tuple(zip(*rows, strict=True))
)
small = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=12).map(
    lambda rows: tuple(zip(*rows, strict=True))
)


def check_published(module):
    assert module.mse(*DOCUMENTED) == 0.375 and module.mae(*DOCUMENTED) == 0.5
    assert module.rmse(*DOCUMENTED) == 0.375**0.5
    assert module.r2(*DOCUMENTED) == pytest.approx(0.948608137, abs=1e-9)  # its nine digits
    for y in ANSCOMBE_Y:
        assert module.pearson(ANSCOMBE_X, y) == pytest.approx(0.816, abs=5e-4)  # his three digits
    assert module.spearman(IQ, HOURS) == pytest.approx(-29 / 165, rel=2**-52)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5; less their means -1.5, 0, 0, 1.5 and -1.5, -.5, 1, 1
    assert module.spearman([1, 5, 5, 9], [0, 1, 2, 2]) == pytest.approx(3.75 / 4.5, rel=2**-52)


def check_exact(module):
    """A spread of 2^-30 beside a mean of 2^22: a sum of squared doubles has lost it whole."""
    y = 2.0**22 + 2.0**-30 * np.array([0, 1, 2, 3])
    p = 2.0**22 + 2.0**-30 * np.array([0, 1, 2, 4])
    assert module.mse(y, p) == 2.0**-62 and module.mae(y, p) == 2.0**-32
    assert module.r2(y, p) == 0.8 and module.pearson(y, p) == pytest.approx(
        6.5 / (5 * 8.75) ** 0.5, rel=2**-52
    )
    assert module.r2(3 * [0.1], [0.1, 0.1, 0.2]) == 0 and module.r2(3 * [0.1], 3 * [0.1]) == 1
    assert module.pearson([1e308, -1e308, 5e-324], [-1e-320, 1e-320, 0]) == -1
    assert module.rmse([3e-160], [-1e-160]) == pytest.approx(4e-160, rel=1e-3)  # 1.6e-319: 15 bits are left


def test_published_values():
    check_published(regression)


def test_differences_of_sums_do_not_cancel():
    check_exact(regression)


MUTANTS = [
    (check_published, "_ratio(yy - 2 * yp + pp", "_ratio(yy - yp + pp"),
    (check_published, "n << 2 * exact.MOMENT", "n + 1 << 2 * exact.MOMENT"),
    (check_published, "root = math.isqrt(", "root = int("),
    (check_published, "np.maximum(y, p)", "np.abs(y)"),
    (check_published, "spread - n * errors, spread", "spread - errors, spread"),
    (check_published, "spread = yy - 2 * yp + pp, n * yy - y * y", "spread = yy - 2 * yp + pp, n * yy"),
    (check_published, "n * yp - y * p", "n * yp"),
    (check_published, "spread_y * spread_p)", "spread_y * spread_y)"),
    (check_published, "last - ties + 1 + last", "last + last"),
    (check_published, "last = np.cumsum(ties)", "last = np.cumsum(np.ones_like(ties))"),
    (check_exact, "return 0.0 if errors else 1.0", "return 0.0"),
    (check_exact, "exact.moment(y, p), exact", "exact.moment(y, y), exact"),
    (check_exact, "exact.total(column, unit=exact.MOMENT)", "exact.total(column)"),
    (check_exact, "return over / under", "return float(np.float64(over) / np.float64(under))"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, regression, old, new)


@given(columns)
def test_scores_are_the_rational_numbers_rounded_once_for_all_doubles(two):
    y, p = ([Fraction(v) for v in column] for column in two)
    n = len(y)
    errors = sum((a - b) ** 2 for a, b in zip(y, p, strict=True))
    spread = sum((a - sum(y) / n) ** 2 for a in y)
    expected = {mse: errors / n, mae: sum(abs(a - b) for a, b in zip(y, p, strict=True)) / n}
    expected[r2] = 1 - errors / spread if spread else Fraction(not errors)
    for metric, value in expected.items():
        try:
            rounded = value.numerator / value.denominator
        except OverflowError:
            with pytest.raises(ValueError, match=f"{metric.__name__} is beyond the largest double"):
                metric(*two)
        else:
            assert metric(*two) == rounded


@given(st.lists(st.tuples(doubles, doubles), min_size=1, max_size=9))
def test_moments_are_exact_for_all_doubles(rows):
    x, y = map(np.array, zip(*rows, strict=True))
    found = Fraction(exact.moment(x, y), 1 << 2 * exact.MOMENT)
    assert found == sum(Fraction(a) * Fraction(b) for a, b in rows)


@given(columns, columns)
def test_batches_add_to_the_bit_in_either_order(one, other):
    whole = [a + b for a, b in zip(one, other, strict=True)]
    assert moments(*one) + moments(*other) == moments(*other) + moments(*one) == moments(*whole)
    joined = pairs(*other) + pairs(*one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetricWarning)
        found = spearman(joined, None)
        assert found == spearman(*whole) or math.isnan(found)


@given(small, st.integers(1, 5), st.integers(-100, 100))
def test_correlations_are_symmetric_and_free_of_scale_and_offset(two, scale, offset):
    y, p = map(np.array, two)
    for correlation in (pearson, spearman):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            r = correlation(y, p)
        if len(set(y)) == 1 or len(set(p)) == 1:
            assert math.isnan(r) and [w.category for w in said] == [MetricWarning]
            continue
        assert not said and -1 <= r <= 1
        assert correlation(p, y) == r == correlation(y, scale * p + offset)
        assert correlation(y, -p) == -r
    if len(set(y)) > 1:
        best = r2(y, np.full(len(y), y.mean()))
        assert best == pytest.approx(0, abs=2**-48)  # the mean is rounded: 2^-53 of 9, squared, is far less
        assert spearman(y, y**3) == pearson(y, y) == 1


@given(small)
def test_the_three_errors_agree(two):
    assert rmse(*two) ** 2 == pytest.approx(mse(*two), rel=2**-51)  # a root and a square, rounded
    assert mae(*two) <= rmse(*two) * (1 + 2**-52)
    assert mse(*two) == mse(*reversed(two)) and mae(*two) == mae(*reversed(two))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: r2([1], [2]), "one row has no variance"),
        (lambda: pearson([1, 1], [1, 2]), "y_true is constant"),
        (lambda: pearson([1, 2], [0.1, 0.1]), "y_pred is constant"),
        (lambda: spearman([1, 2], [0.1, 0.1]), "y_pred is constant"),
        (lambda: spearman([1], [2]), "is constant"),
    ],
)
def test_what_is_undefined_is_nan_and_says_so(call, sentence):
    with pytest.warns(MetricWarning, match=sentence):
        assert math.isnan(call())


@pytest.mark.parametrize("metric", [mse, rmse, mae, r2, pearson, spearman])
def test_what_is_no_column_is_refused(metric):
    for rows, sentence in (
        (([1, 2], [1]), "y_true has 2 rows and y_pred 1"),
        (([], []), "y_true is empty"),
        (([1, 2], [1, math.nan]), r"y_pred\[1\] is nan; give finite numbers"),
        (([-math.inf, 2], [1, 2]), r"y_true\[0\] is -inf"),
        (([[1], [2]], [1, 2]), r"y_true has shape \(2, 1\)"),
        ((["1", "2"], [1, 2]), "y_true holds <U1; give numbers"),
    ):
        with pytest.raises(ValueError, match=sentence):
            metric(*rows)


def test_one_row_has_no_correlation():
    with pytest.raises(ValueError, match="one row has no correlation"):
        pearson([1], [2])


@pytest.mark.parametrize("metric", [mse, rmse, mae])
def test_errors_beyond_the_largest_double_are_refused(metric):
    with pytest.raises(ValueError, match="beyond the largest double; divide both columns by a scale"):
        metric([1.7e308, 1.7e308], [-1.7e308, -1.7e308])


def test_the_root_is_taken_before_rounding():
    assert rmse([1e-200], [0]) == 1e-200 and rmse([1e200], [0]) == 1e200
