"""Calibration: values by hand, the definition as a double loop, what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import calibration
from minift.metrics.calibration import expected_calibration_error, reliability_curve
from minift.metrics.streaming import State

# By hand: the bins (0, 0.2], (0.2, 0.4] ... hold 2, 0, 1, 0 and 2 rows; 0 and the edge 0.2 are in the first.
HAND = ([0, 1, 1, 0, 1], [0.0, 0.2, 0.5, 1.0, 0.9])
# The largest of each row and whether it is the row's class: 0.5 yes, 0.5 (the first of two) no, 0.75 yes.
THREE = (["a", "b", "c"], [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])


def check_hand(module):
    """Means of two rows, to an ulp."""
    confidence, right, rows = module.reliability_curve(*HAND, bins=5)
    assert rows.tolist() == [2, 0, 1, 0, 2]
    assert confidence == pytest.approx([0.1, np.nan, 0.5, np.nan, 0.95], rel=1e-15, abs=0, nan_ok=True)
    assert right == pytest.approx([0.5, np.nan, 1, np.nan, 0.5], nan_ok=True)
    ece = (2 * 0.4 + 0.5 + 2 * 0.45) / 5
    assert module.expected_calibration_error(*HAND, bins=5) == pytest.approx(ece, rel=1e-15, abs=0)
    other = module.expected_calibration_error(*HAND, bins=5, pos_label=0)
    assert other == pytest.approx((2 * 0.4 + 0.5 + 2 * 0.45) / 5, rel=1e-15, abs=0)
    confidence, right, rows = module.reliability_curve(*THREE, bins=4)
    assert rows.tolist() == [0, 2, 1, 0]
    assert confidence[1:3].tolist() == [0.5, 0.75] and right[1:3].tolist() == [0.5, 1.0]
    assert module.expected_calibration_error(*THREE, bins=4) == 0.25 / 3
    assert module.expected_calibration_error(*THREE) == module.expected_calibration_error(*THREE, bins=10)
    assert module.reliability_curve(*THREE)[2].shape == (10,)


def test_values_by_hand():
    check_hand(calibration)


MUTANTS = [
    (
        "np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], prob)",
        "np.minimum(prob * bins, bins - 1).astype(int)",
    ),
    ("bins + 1)[1:-1]", "bins + 2)[1:-1]"),
    ("np.linspace(0, 1, bins + 1)[1:-1]", "np.linspace(0, 1, bins + 1)[:-1]"),
    ("prob.argmax(axis=1)", "prob.argmin(axis=1)"),
    ("place[right]", "place[~right]"),
    ("np.cumsum(count)[:-1]", "np.cumsum(count)[1:]"),
    ("prob[np.argsort(place", "prob[np.argsort(-place"),
    ("sum(abs((int(r) << exact.UNIT) - u)", "sum(((int(r) << exact.UNIT) - u)"),
    ("int(rows.sum()))", "len(rows))"),
    ("exact.mean(u, int(n)) if n else np.nan", "exact.mean(u, int(n) + 1)"),
    ("right / np.maximum(rows, 1), np.nan)", "right / np.maximum(rows, 1), 0)"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_hand, calibration, old, new)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 64).map(lambda i: i / 64)), min_size=1, max_size=30),
    st.sampled_from([1, 2, 4, 8, 32]),
)
def test_the_error_is_the_double_loop_over_bins_and_rows(pairs, bins):
    """Edges and probabilities are multiples of 1/64, so that the loop rounds nothing but its quotients."""
    far = 0.0
    for b in range(bins):
        own = [(y, p) for y, p in pairs if b / bins < p <= (b + 1) / bins or (b == p == 0)]
        if own:
            share, confidence = (sum(side) / len(own) for side in zip(*own, strict=True))
            far += len(own) / len(pairs) * abs(share - confidence)
    y, p = zip(*pairs, strict=True)
    found = expected_calibration_error(y, p, bins, pos_label=1)
    assert found == pytest.approx(far, rel=0, abs=1e-14)
    confidence, right, rows = reliability_curve(y, p, bins, pos_label=1)
    kept = rows > 0
    assert found == pytest.approx(rows[kept] @ abs(right - confidence)[kept] / len(y), rel=0, abs=1e-14)


@given(st.permutations(range(40)), st.sampled_from([None, [0, 1]]))
def test_batches_in_any_order_are_all_rows_to_the_bit(order, labels):
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 40), rng.random(40)
    for metric in (expected_calibration_error, reliability_curve):
        state = State(metric, bins=3, labels=labels)
        for part in np.array_split(order, 7):
            state.update(y[part], p[part])
        assert np.array_equal(state.compute(), metric(y, p, 3))


def test_what_is_calibrated_scores_zero():
    y = [1, 0, 0, 0] * 5 + [1, 1, 1, 0] * 5
    assert expected_calibration_error(y, [0.25] * 20 + [0.75] * 20) == 0
    assert expected_calibration_error([0, 1], [0.0, 1.0]) == 0
    assert expected_calibration_error([0, 1], [1.0, 0.0]) == 1


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda f: f([0, 1], [0.5, 0.5], 0), "bins is 0; give a whole number of at least 1"),
        (lambda f: f([0, 1], [0.5, 0.5], 2.5), "bins is 2.5; give a whole number of at least 1"),
        (lambda f: f([0, 1], [0.5, 0.5], True), "bins is True; give a whole number of at least 1"),
        (lambda f: f([0, 1], [0.5]), "y_true has 2 rows and y_prob 1"),
        (lambda f: f([0, 1], [0.5, -0.1]), r"y_prob\[1\] is -0.1; give probabilities"),
        (lambda f: f([0, 1], [[0.5, 0.5], [0.5, 0.6]]), r"y_prob\[1\] sums to 1.1"),
        (lambda f: f([0, 1, 1], [[0.2, 0.2, 0.6]] * 3), "y_true has 2 classes"),
        (lambda f: f(["a", "b"], [0.5, 0.5]), "the labels are strings"),
        (lambda f: f([0, 1, 2], [0.5, 0.5, 0.5]), "y_true has 3 labels"),
    ],
)
@pytest.mark.parametrize("metric", [expected_calibration_error, reliability_curve])
def test_what_makes_no_score_is_refused(metric, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(metric)
