"""Scores of numbers against scikit-learn and scipy.

Values are quarters below 2^20 or have a spread of their size: there the references' own sums, which square
differences from a rounded mean, are right to 1e-12. Where they are not, tests/metrics/test_regression.py
compares with rational numbers.
"""

import math
import warnings

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import sklearn.metrics
from cases import CASES, cases
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from minift.metrics import MetricWarning, mae, mse, pearson, r2, rmse, spearman

pytestmark = pytest.mark.parity

REFERENCES = {
    mse: sklearn.metrics.mean_squared_error,
    rmse: sklearn.metrics.root_mean_squared_error,
    mae: sklearn.metrics.mean_absolute_error,
    r2: sklearn.metrics.r2_score,
    pearson: lambda y, p: stats.pearsonr(y, p).statistic,
    spearman: lambda y, p: stats.spearmanr(y, p).statistic,
}
FEW = np.array([0.0, -0.0, 1.0, 2.0, 2.5, -3.0, 0.0, 1.0])  # ties, columns that are constant
sizes = st.sampled_from([2.0**-300, 2.0**-20, 1.0, 2.0**20, 2.0**300])


@st.composite
def columns(draw):
    """Two columns from bytes, which draw much faster than lists of numbers."""
    rows = draw(st.integers(1, 30))
    two = []
    for _ in range(2):
        drawn = np.frombuffer(draw(st.binary(min_size=3 * rows, max_size=3 * rows)), np.uint8).reshape(
            3, rows
        )
        two.append(drawn.T @ [1 / 4, 2.0**6, 2.0**14] - 2.0**20 if draw(st.booleans()) else FEW[drawn[0] % 8])
    if draw(st.booleans()):
        two[1] = two[0] if draw(st.booleans()) else np.where(two[1] > 0, two[0], two[1])
    return two


def score(metric, y, p):
    """The score and the sentences of its warnings, or the kind of its error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return metric(y, p), [w.category for w in said]
        except ValueError:
            return ValueError, []


@CASES
@given(columns(), sizes)
@example([np.array([1.0]), np.array([2.0])], 1.0)
@example([np.array([0.0, 1.0]), np.array([1.0, 0.0])], 1.0)
def test_scores_are_those_of_the_references(two, size):
    y, p = (column * size for column in two)
    for metric, reference in REFERENCES.items():
        found, said = score(metric, y, p)
        expected, theirs = score(reference, y, p)
        if expected is ValueError or found is ValueError:
            assert found is expected
            continue
        # A mean of n terms carries n roundings of at most the largest; 1e-12 is more than 30 * 2^-53.
        scale = 1.0 if metric in (pearson, spearman) else max(abs(expected), 1.0 if metric is r2 else 0.0)
        assert found == pytest.approx(expected, rel=0, abs=1e-12 * scale, nan_ok=True)
        if metric is spearman and len(y) == 1:
            assert math.isnan(expected) and not theirs  # scipy is silent there, and nowhere else
        else:
            assert bool(said) == bool(theirs)
        assert all(category is MetricWarning for category in said) and len(said) <= 1


@cases(300)
@given(st.lists(st.tuples(*(2 * [st.integers(-3, 3)])), min_size=2, max_size=8), st.sampled_from([-1, 1]))
def test_pearson_holds_where_squares_would_not(rows, sign):
    """scipy divides by the largest value before it squares; every square here would be 0 or infinite."""
    y, p = map(np.array, zip(*rows, strict=True))
    if len(set(y)) > 1 and len(set(p)) > 1:
        expected = stats.pearsonr(y * 2.0 ** (600 * sign), p).statistic
        assert pearson(y * 2.0 ** (600 * sign), p) == pytest.approx(expected, rel=0, abs=1e-12)


def test_a_constant_target_is_constant_whatever_its_mean_rounds_to():
    """The mean of three times 0.1 is not 0.1 in doubles, and scikit-learn divides by what is left over."""
    y, p = [0.1, 0.1, 0.1], [1.0, 2.0, 3.0]
    assert sklearn.metrics.r2_score(y, p) < -1e34 and r2(y, p) == 0
    assert sklearn.metrics.r2_score([1.0, 1.0, 1.0], p) == r2([1.0, 1.0, 1.0], p) == 0


def test_squares_beyond_the_largest_double_are_refused_where_scikit_learn_has_infinity():
    y, p = [1e200, 2e200], [0.0, 0.0]
    with np.errstate(over="ignore", invalid="ignore"):
        assert sklearn.metrics.mean_squared_error(y, p) == math.inf
        assert math.isnan(sklearn.metrics.r2_score(y, p))
    with pytest.raises(ValueError, match="mse is beyond the largest double"):
        mse(y, p)
    assert rmse(y, p) == pytest.approx(2.5**0.5 * 1e200, rel=1e-15)
    assert r2(y, p) == r2([1, 2], [0, 0]) == -9


def test_a_nearly_constant_column_needs_no_warning_here():
    """Spreads of 2 beside 1e16: scipy warns that its digits may be lost; of exact sums none are."""
    x, y = [1e16, 1e16 + 2, 1e16 + 4], [1.0, 2.0, 5.0]
    with pytest.warns(stats.NearConstantInputWarning):
        stats.pearsonr(x, y)
    assert score(pearson, x, y) == (pytest.approx(12 / math.sqrt(156), rel=2**-51), [])
