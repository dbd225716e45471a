"""Metrics of probabilities against scikit-learn's: values and refusals, in generated and awkward cases."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from cases import CASES, cases
from hypothesis import given
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as their_log_loss

from minift.metrics import brier, expected_calibration_error, log_loss, reliability_curve

pytestmark = pytest.mark.parity

NAMES = [(0, 1), (-1, 1), (False, True), (1, 2), (0, 2), ("ham", "spam"), ("e\u0301", "\U0001f600")]
# Certainties, edges of bins and their neighbours, and what is clipped.
AWKWARD = [0.0, 1.0, 0.5, 0.1, 0.3, 0.1 + 0.2, 0.7, 1 / 3, 5e-324, 1e-17, 2**-52, 1 - 2**-53, 0.999]
KINDS = [lambda c: c, lambda c: c * 2 - 3, lambda c: ["a", "aa", "b", "e\u0301", "\U0001f600"][c]]
FAULTS = ["backwards", "too few", "unknown", "missing", "sum", "fine", "negative", "nan"]


def draw_bytes(draw, *shape) -> np.ndarray:
    size = int(np.prod(shape))
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(shape).astype(int)


def outcome(call, *arguments, **settings):
    """A score, or None where it is refused or where scikit-learn warns of sums or of the order of labels."""
    with warnings.catch_warnings(), config_context(skip_parameter_validation=True):
        warnings.simplefilter("error", UserWarning)
        try:
            return call(*arguments, **settings)
        except (ValueError, UserWarning):
            return None


def same(value, expected, largest: float = 1.0) -> None:
    assert (value is None) == (expected is None)
    if expected is not None:
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * largest)  # rounded once a row


@st.composite
def of_two(draw):
    names, n = draw(st.sampled_from(NAMES)), draw(st.integers(1, 24))
    p = np.where(draw_bytes(draw, n) % 2, np.array(AWKWARD)[draw_bytes(draw, n) % len(AWKWARD)], 0.0)
    p = np.where(p > 0, p, draw_bytes(draw, n) / 255)
    if draw(st.integers(0, 15)) == 0:
        p[draw(st.integers(0, n - 1))] = draw(st.sampled_from([-1e-9, 1 + 2**-52, np.nan, np.inf]))
    return names, [names[byte % 2] for byte in draw_bytes(draw, n)], p


@CASES
@given(of_two(), st.booleans(), st.sampled_from([True, False, "auto"]), st.integers(1, 20), st.booleans())
def test_two_classes(case, named, half, bins, column):
    names, y, p = case
    labels = sorted(names) if named else None
    given_p = p[:, None] if column else p
    # 1e-12 of ln 2^52, the largest loss of a row
    same(outcome(log_loss, y, given_p, labels), outcome(their_log_loss, y, given_p, labels=labels), 36.0)
    pos_label = names[1] if half == "auto" or bins > 10 else None
    ours = outcome(brier, y, given_p, pos_label, scale_by_half=half)
    same(ours, outcome(brier_score_loss, y, given_p, pos_label=pos_label, scale_by_half=half))
    ours = outcome(reliability_curve, y, p, bins, names[1])
    theirs = outcome(calibration_curve, y, p, pos_label=names[1], n_bins=bins)
    if np.isnan(p).any():
        theirs = None  # they take nan for a probability
    ece = outcome(expected_calibration_error, y, p, bins, names[1])
    if theirs is None:
        assert ours is None and ece is None
        return
    confidence, right, rows = (array[ours[2] > 0] for array in ours)
    same([right, confidence], theirs)
    same(ece, np.abs(theirs[0] - theirs[1]) @ rows / len(y))


@st.composite
def of_classes(draw):
    """Labels, rows of probabilities, some of them certain, and `labels`; one case in four has a fault."""
    k, kind = draw(st.integers(2, 4)), draw(st.sampled_from(KINDS))
    n = k + draw(st.integers(0, 12))
    y, labels = draw_bytes(draw, n) % k, range(k)
    parts = np.maximum(draw_bytes(draw, n, k) - 64.0, 0)
    parts[:, 0] += parts.sum(axis=1) == 0
    p = parts / parts.sum(axis=1, keepdims=True)
    if draw(st.booleans()):
        y[:k] = range(k)
        labels = draw(st.sampled_from([None, labels]))
    fault = draw(st.sampled_from(21 * [None] + FAULTS))
    if fault == "unknown":
        y[0], labels = k - 1, [*range(k - 1), k]
    elif fault in ("backwards", "too few"):
        labels = range(k)[::-1] if fault == "backwards" else range(k - 1)
    elif fault == "missing":
        y, labels = y % (k - 1), None
    row, change = draw(st.integers(0, n - 1)), {"sum": 3e-8, "fine": 2e-8, "negative": -2.0, "nan": np.nan}
    p[row] *= 1 - change.get(fault, 0.0)
    return [kind(c) for c in y.tolist()], p, None if labels is None else [kind(c) for c in labels]


@cases(500)
@given(of_classes(), st.sampled_from([True, False, "auto"]))
def test_several_classes(case, half):
    y, p, labels = case
    same(outcome(log_loss, y, p, labels), outcome(their_log_loss, y, p, labels=labels), 36.0)
    ours = outcome(brier, y, p, labels=labels, scale_by_half=half)
    same(ours, outcome(brier_score_loss, y, p, labels=labels, scale_by_half=half))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_many_rows(dtype):
    """Theirs computes in the dtype of the probabilities, ours in doubles, clipped at that dtype's epsilon."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 20_000), rng.random(20_000).astype(dtype)
    p[:50], p[50:100] = 0, 1
    close = (
        1e-12 if dtype is np.float64 else 20 * float(np.finfo(dtype).eps)
    )  # of some 16, their largest loss
    assert log_loss(y, p) == pytest.approx(their_log_loss(y, p), abs=close)
    assert brier(y, p) == pytest.approx(brier_score_loss(y, p), abs=close)
