"""Rates of groups against scikit-learn's confusion matrix of each, and against fairlearn where it is."""

import math
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

import sklearn.metrics
from cases import CASES, cases
from hypothesis import given
from hypothesis import strategies as st

from minift.metrics import (
    MetricWarning,
    demographic_parity_difference,
    equalized_odds_difference,
    group_rates,
    worst_group_accuracy,
)

pytestmark = pytest.mark.parity

# A letter is a row: its two labels and one of three groups. A text draws much faster than a list.
rows = st.text("abcdefghijkl", min_size=1, max_size=40).map(
    lambda text: [(i % 2, i // 2 % 2, i // 4) for i in (ord(letter) - ord("a") for letter in text)]
)


def ours(y_true, y_pred, groups):
    """The four results without their warnings, which tests/metrics/test_fairness.py has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetricWarning)
        metrics = group_rates, demographic_parity_difference, equalized_odds_difference, worst_group_accuracy
        return [metric(y_true, y_pred, groups) for metric in metrics]


@CASES
@given(rows)
def test_rates_follow_from_scikit_learns_matrix_of_each_group(some):
    y_true, y_pred, groups = map(np.array, zip(*some, strict=True))
    rates, parity, odds, worst = ours(y_true, y_pred, groups)
    scores = {
        name: [] for name in ("accuracy", "selection_rate", "true_positive_rate", "false_positive_rate")
    }
    # The labels of group g are 2 g and 2 g + 1, so that one matrix holds those of the groups as blocks.
    matrix = sklearn.metrics.confusion_matrix(2 * groups + y_true, 2 * groups + y_pred, labels=range(6))
    for group, found in rates.items():
        block = slice(2 * group, 2 * group + 2)
        (tn, fp), (fn, tp) = matrix[block, block]
        n = tn + fp + fn + tp
        expected = {
            "accuracy": (tp + tn) / n,
            "selection_rate": (tp + fp) / n,
            "true_positive_rate": tp / (tp + fn) if tp + fn else np.nan,
            "false_positive_rate": fp / (fp + tn) if fp + tn else np.nan,
        }
        assert found == pytest.approx({"rows": n, **expected}, rel=0, abs=1e-12, nan_ok=True)
        for name, score in expected.items():
            scores[name] += [] if math.isnan(score) else [score]
    gap = {name: max(found) - min(found) if found else 0 for name, found in scores.items()}
    assert parity == pytest.approx(gap["selection_rate"], rel=0, abs=1e-12)
    expected = max(gap["true_positive_rate"], gap["false_positive_rate"])
    assert odds == pytest.approx(expected, rel=0, abs=1e-12)
    assert worst == pytest.approx(min(scores["accuracy"]), rel=0, abs=1e-12)


@cases(50)  # its frames take a tenth of a second each
@given(rows.filter(lambda some: len(some) > 1))  # of one row fairlearn takes the group for a scalar
def test_differences_are_those_of_fairlearn(some):
    fairlearn = pytest.importorskip("fairlearn.metrics")
    y_true, y_pred, groups = map(np.array, zip(*some, strict=True))
    rates, parity, odds, _ = ours(y_true, y_pred, groups)
    arguments = {"y_true": y_true, "y_pred": y_pred, "sensitive_features": groups}
    assert parity == pytest.approx(fairlearn.demographic_parity_difference(**arguments), rel=0, abs=1e-12)
    expected = fairlearn.equalized_odds_difference(**arguments)
    if not any(math.isnan(rate) for own in rates.values() for rate in own.values()):
        assert odds == pytest.approx(expected, rel=0, abs=1e-12)
        return
    # fairlearn counts the rate of no rows as 0; here the group is left out.
    names = ("true_positive_rate", "false_positive_rate")
    columns = [[0 if math.isnan(own[name]) else own[name] for own in rates.values()] for name in names]
    assert expected == pytest.approx(max(max(c) - min(c) for c in columns), rel=0, abs=1e-12)
    assert odds <= expected + 1e-12
