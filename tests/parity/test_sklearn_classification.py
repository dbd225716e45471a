"""Scores of labels against scikit-learn: the same values, and warnings and errors in the same cases."""

import math
import re
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from cases import CASES
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.exceptions import UndefinedMetricWarning

from minift.metrics import MetricWarning
from minift.metrics.classification import f1, fbeta, hamming_loss, jaccard, precision, recall
from minift.metrics.confusion import accuracy, balanced_accuracy, confusion_matrix, matthews_corrcoef
from minift.metrics.report import classification_report

pytestmark = pytest.mark.parity

ALPHABETS = [
    st.integers(0, 1),
    st.integers(-2, 3),
    st.integers(-(2**40), 2**40),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 2.0, -7.0]),
    st.sampled_from(["a", "b", "Ä", "猫", "\U0001f600", "a b", ""]),
]


@st.composite
def rows(draw):
    """y_true, y_pred: one label in all rows, absent labels, repeated rows and uneven sizes come up often."""
    letters = draw(st.lists(draw(st.sampled_from(ALPHABETS)), min_size=1, max_size=5, unique=True))
    pair = st.tuples(st.sampled_from(letters), st.sampled_from(letters[: draw(st.integers(1, 5))]))
    pairs = draw(st.lists(pair, min_size=1, max_size=25)) * draw(st.sampled_from([1, 1, 40]))
    return tuple(map(np.array, zip(*pairs, strict=True)))


@st.composite
def matrices(draw):
    """Two matrices of 0 and 1 with whole rows and columns of one value."""
    n, k = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    bits = st.lists(st.integers(0, 1), min_size=n * k, max_size=n * k)
    pair = [np.array(draw(bits)).reshape(n, k) for _ in range(2)]
    for side in pair:
        side[:, draw(st.integers(0, k - 1))] = draw(st.integers(0, 1))
    assume(all(side.any() for side in pair))  # where no cell is set, scikit-learn takes the matrix for (n, 1)
    return pair


def outcome(call):
    """The value and whether it warned of an undefined score, or that it was refused."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            value = call()
        except ValueError:
            return "refused", False
    kinds = (MetricWarning, UndefinedMetricWarning, UserWarning)
    return value, any(issubclass(w.category, kinds) for w in seen)


def same(ours, theirs, silent=False):
    (a, warned), (b, expected) = outcome(ours), outcome(theirs)
    if isinstance(b, str) or isinstance(a, str):
        assert a == b
    else:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)  # of 1; a few roundings of 2^-53 a label
    assert warned == expected or silent


@CASES
@given(rows(), st.data())
def test_scores_of_the_whole_matrix(y, data):
    same(lambda: accuracy(*y), lambda: reference.accuracy_score(*y))
    same(lambda: hamming_loss(*y), lambda: reference.hamming_loss(*y))
    adjusted = data.draw(st.booleans()) and len(set(y[0].tolist())) > 1  # else it divides by 0: nan or -inf
    same(
        lambda: balanced_accuracy(*y, adjusted=adjusted),
        lambda: reference.balanced_accuracy_score(*y, adjusted=adjusted),
    )
    value = reference.matthews_corrcoef(*y)
    assert matthews_corrcoef(*y) == pytest.approx(value, rel=0, abs=1e-12)


@CASES
@given(rows(), st.data())
def test_the_matrix_itself(y, data):
    every = sorted({*y[0].tolist(), *y[1].tolist()})
    labels = data.draw(st.none() | st.permutations(every).map(lambda order: order[: max(1, len(order) - 1)]))
    way = data.draw(st.sampled_from([None, "true", "pred", "all"]))
    same(
        lambda: confusion_matrix(*y, labels=labels, normalize=way),
        lambda: reference.confusion_matrix(*y, labels=labels, normalize=way),
    )


PAIRS = [
    (precision, reference.precision_score, {}),
    (recall, reference.recall_score, {}),
    (f1, reference.f1_score, {}),
    (fbeta, reference.fbeta_score, {"beta": 0.0}),
    (fbeta, reference.fbeta_score, {"beta": 0.5}),
    (fbeta, reference.fbeta_score, {"beta": math.inf}),
    (jaccard, reference.jaccard_score, {}),
]


def compare(y, options, zero):
    """Every score of PAIRS; a warning where the reference, asked to, warns."""
    for ours, theirs, more in PAIRS:
        chosen = {} if zero is None else {"zero_division": zero}
        asked = {"zero_division": "warn" if zero is None else zero}
        if ours is jaccard and isinstance(zero, float) and math.isnan(zero):
            continue  # scikit-learn's jaccard_score takes no nan
        same(
            lambda o=ours, m=more, c=chosen: o(*y, **options, **m, **c),
            lambda t=theirs, m=more, a=asked: t(*y, **options, **m, **a),
            silent=more.get("beta") in (0, math.inf),  # of which scikit-learn forgets to warn
        )


@CASES
@given(rows(), st.sampled_from(["macro", "micro", "weighted", "binary", None]), st.data())
def test_scores_of_labels_and_their_means(y, average, data):
    every = sorted({*y[0].tolist(), *y[1].tolist()})
    options = {"average": average}
    if average == "binary":
        absent = "absent" if isinstance(every[0], str) else 1  # not 1 among strings, which ours refuses
        options["pos_label"] = data.draw(st.sampled_from([*every, absent]))
    elif data.draw(st.booleans()):
        more = "absent" if isinstance(every[0], str) else 77
        options["labels"] = data.draw(st.permutations([*every, more]))[: len(every)]
    compare(y, options, data.draw(st.sampled_from([None, 0.0, 1.0, math.nan])))


@CASES
@given(matrices(), st.sampled_from(["macro", "micro", "weighted", "samples", None]), st.data())
def test_scores_of_matrices_of_labels(y, average, data):
    compare(y, {"average": average}, data.draw(st.sampled_from([None, 0.0, 1.0, math.nan])))
    same(lambda: accuracy(*y), lambda: reference.accuracy_score(*y))
    same(lambda: hamming_loss(*y), lambda: reference.hamming_loss(*y))


@CASES
@given(rows() | matrices(), st.integers(0, 5), st.data())
def test_the_report_is_the_same_text(y, digits, data):
    assume(y[0].dtype.kind != "f" and (y[0] == y[1]).any())  # where none is right, it writes rows as 1.0
    options = {"digits": digits, "zero_division": data.draw(st.sampled_from([0.0, 1.0]))}
    if y[0].ndim == 1 and data.draw(st.booleans()):
        options["labels"] = sorted({*y[0].tolist(), *y[1].tolist()})[:2]
    ours, theirs = classification_report(*y, **options), reference.classification_report(*y, **options)
    assert re.sub("[0-9]", "0", ours) == re.sub("[0-9]", "0", theirs)
    for a, b in zip(re.findall(r"[\d.]+", ours), re.findall(r"[\d.]+", theirs), strict=True):
        assert a == b or abs(float(a) - float(b)) <= 1.001 * 10.0**-digits  # a half may be rounded otherwise
