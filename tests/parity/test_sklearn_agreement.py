"""Agreement beside scikit-learn, statsmodels and krippendorff; McNemar's test beside statsmodels.

Known differences: statsmodels gives (0 - 1)^2 / n for McNemar's statistic with n10 = n01, here as in R it is
0; krippendorff raises where all ratings are equal and gives nan where only those that count are, here both
are nan with a warning.
"""

import math
import warnings

import pytest

pytest.importorskip("sklearn")

import numpy as np
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import cohen_kappa_score

from minift.metrics import MetricWarning
from minift.metrics.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from minift.metrics.uncertainty import mcnemar

pytestmark = pytest.mark.parity
CLOSE = {"rel": 0, "abs": 1e-12, "nan_ok": True}
seeds = st.integers(0, 2**32 - 1)

alphabets = st.sampled_from(
    [
        [0, 1],
        [0],
        [-3, 0, 7, 900],
        ["a", "b", "ab", "", "é", "e\u0301", "\U0001f600"],
        [False, True],
        [2.0, 1.0],
    ]
)


def outcome(call, warning):
    """The score and whether it warned, or that it is a ValueError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            score = call()
        except ValueError:
            return "ValueError"
    return score, any(issubclass(w.category, warning) for w in caught)


@CASES
@given(
    st.integers(1, 40), seeds, alphabets, st.sampled_from([None, "linear", "quadratic"]), st.integers(0, 3)
)
def test_cohens_kappa_is_scikit_learns(n, seed, alphabet, weights, chosen):
    rng = np.random.default_rng(seed)
    y1, y2 = ([alphabet[i] for i in rng.integers(0, rng.integers(1, len(alphabet) + 1), n)] for _ in "12")
    order = [alphabet[i] for i in rng.permutation(len(alphabet))]
    labels = order[:chosen] if chosen < 3 and chosen else (None, order)[chosen == 3]
    replace = [math.nan, 0.0, -1.0][seed % 3]
    arguments = {"labels": labels, "weights": weights, "replace_undefined_by": replace}
    theirs = outcome(lambda: cohen_kappa_score(y1, y2, **arguments), UndefinedMetricWarning)
    ours = outcome(lambda: cohen_kappa(y1, y2, **arguments), MetricWarning)
    if theirs == "ValueError":
        assert ours == theirs
    else:
        assert ours[0] == pytest.approx(theirs[0], **CLOSE) and ours[1] == theirs[1]


@CASES
@given(st.integers(1, 15), st.integers(2, 8), st.integers(2, 6), st.sampled_from([0.02, 0.3, 5]), seeds)
def test_fleiss_kappa_is_statsmodels(subjects, raters, categories, evenness, seed):
    rng = np.random.default_rng(seed)
    table = rng.multinomial(raters, rng.dirichlet([evenness] * categories), subjects).tolist()
    reference = pytest.importorskip("statsmodels.stats.inter_rater").fleiss_kappa
    with np.errstate(all="ignore"):
        expected = reference(table)
    found, warned = outcome(lambda: fleiss_kappa(table), MetricWarning)
    # 1 - Pe is lost to rounding there when nearly all is in one category: the quotient's own error bound
    total = sum(map(sum, table))
    pe = sum((sum(column) / total) ** 2 for column in zip(*table, strict=True))
    if math.isnan(found):
        assert warned and pe == 1
    else:
        assert not warned and found == pytest.approx(expected, rel=0, abs=max(1e-12, 2**-50 / (1 - pe)))


scales = st.sampled_from([[0, 1], [1], [0, 0.5, 3, 100], [1e6, 1e6 + 1, 2e6], list(range(20))])


@CASES
@given(st.integers(1, 4), st.integers(1, 12), scales, st.sampled_from([0, 0.2, 0.7]), seeds)
def test_alpha_is_krippendorffs(coders, units, values, missing, seed):
    rng = np.random.default_rng(seed)
    array = rng.choice(np.array(values, dtype=float), (coders, units))
    array[rng.random((coders, units)) < missing] = math.nan
    array = np.where(rng.random((coders, units)) < 0.5, array[0], array)  # so that they also agree
    matrix = array.tolist()
    reference = pytest.importorskip("krippendorff").alpha
    paired = array[:, (~np.isnan(array)).sum(axis=0) > 1]
    paired = paired[~np.isnan(paired)]
    for level in ("nominal", "ordinal", "interval", "ratio"):
        found = outcome(lambda level=level: krippendorff_alpha(matrix, level), MetricWarning)
        if not len(paired):
            with pytest.raises(ValueError):
                reference(array, level_of_measurement=level)
            assert found == "ValueError"
        elif len(np.unique(paired)) == 1:
            assert math.isnan(found[0]) and found[1]
        else:
            expected = reference(array, level_of_measurement=level)
            assert found[0] == pytest.approx(expected, **CLOSE) and not found[1]


@CASES
@given(*4 * [st.integers(0, 12)])
def test_mcnemars_test_is_statsmodels(n11, n10, n01, n00):
    reference = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    table = np.array([[n11, n10], [n01, n00 + 1]])
    a, b = [1] * (n11 + n10) + [0] * (n01 + n00 + 1), [1] * n11 + [0] * n10 + [1] * n01 + [0] * (n00 + 1)
    theirs = reference(table, exact=True)
    assert mcnemar(a, b) == pytest.approx((theirs.statistic, theirs.pvalue), **CLOSE)
    found, warned = outcome(lambda: mcnemar(a, b, exact=False), MetricWarning)
    assert warned == (n10 + n01 == 0)
    if warned:
        assert math.isnan(found[1])
    elif n10 == n01:
        assert found == (0.0, 1.0)
    else:
        theirs = reference(table, exact=False, correction=True)
        assert found == pytest.approx((theirs.statistic, theirs.pvalue), **CLOSE)
