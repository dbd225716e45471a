"""Log loss and Brier score: published values, values by hand, laws, what is refused."""

import json
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import columns, probabilities
from minift.metrics.probabilities import brier, log_loss
from minift.metrics.streaming import State

SPAM = (["spam", "ham", "ham", "spam"], [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]])
RAIN = ([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.3])
THREE = (
    [0, 1, 2, 2, 1, 0, 2],
    np.array([[5, 3, 2], [2, 5, 3], [0, 4, 6], [4, 4, 2], [6, 0, 4], [5, 2, 3], [2, 2, 6]]) / 10,
)
EPS = 2.0**-52
# SPAM and RAIN are of scikit-learn's documentation; THREE computed with scikit-learn 1.9.1.
GOLDEN = [
    ("log_loss", SPAM, {}, -(2 * log(0.9) + log(0.8) + log(0.65)) / 4),
    ("log_loss", RAIN, {}, -(2 * log(0.9) + log(0.8) + log(0.7)) / 4),
    ("log_loss", THREE, {}, 5.822026298680439),
    ("log_loss", ([1, 0], [0.0, 1.0]), {}, -log(EPS)),
    ("log_loss", ([1, 0], [1.0, 0.0]), {}, -log(1 - EPS)),
    ("log_loss", ([2, 2], [[0.2, 0.3, 0.5]] * 2), {"labels": [0, 1, 2]}, log(2)),
    ("brier", RAIN, {}, 0.0375),
    ("brier", RAIN, {"scale_by_half": False}, 0.075),
    ("brier", RAIN, {"pos_label": 0}, (0.9**2 + 0.9**2 + 0.8**2 + 0.7**2) / 4),
    ("brier", SPAM, {}, (0.01 + 0.01 + 0.04 + 0.35**2) / 4),
    ("brier", (SPAM[0], [0.9, 0.1, 0.2, 0.65]), {"pos_label": "spam"}, (0.01 + 0.01 + 0.04 + 0.35**2) / 4),
    ("brier", THREE, {}, 0.5971428571428571),
    ("brier", THREE, {"scale_by_half": True}, 0.29857142857142854),
    ("brier", ([0, 0], [0.25, 0.25]), {}, 1 / 16),
    ("brier", ([2, 2], [0.25, 0.25]), {}, 9 / 16),
    ("brier", ([0, 2], [0.25, 0.25]), {}, 5 / 16),
]
truth = st.lists(st.integers(0, 2), min_size=1, max_size=20)


def check_golden(module):
    for name, arguments, options, expected in GOLDEN:
        found = getattr(module, name)(*arguments, **options)
        # They are of a few rounded squares or logarithms.
        assert found == pytest.approx(expected, rel=1e-14, abs=0)


def check_positive(module):
    """Which label of a vector is positive."""
    one = np.array([0.25])
    for label, pos_label, expected in ((0, None, 0), (-1, None, 0), (1, None, 1), (2, None, 1), (5, 4, 0)):
        assert module.happened(np.array([label]), one, pos_label, None).tolist() == [bool(expected)]
    assert module.happened(np.array([3, 4]), np.array([0.1, 0.2]), None, [3, 4]).tolist() == [False, True]
    assert module.happened(np.array([3]), one, 3, [3, 4]).tolist() == [True]
    matrix = module.happened(np.array(["b", "a"]), np.array([[0.1, 0.9]] * 2), None, None)
    assert matrix.tolist() == [[False, True], [True, False]]
    rows = module.scored([0, 1], [[0.5], [0.25]])
    assert [array.tolist() for array in rows] == [[0, 1], [0.5, 0.25]]


def test_golden_values():
    check_golden(probabilities)
    check_positive(columns)


def test_values_of_the_reference_file(shared_data):
    lines = json.loads((shared_data / "metric_refs" / "classification.json").read_text())
    lines = [line for line in lines if line["id"] == "log_loss"]
    assert len(lines) == 1
    for line in lines:
        assert log_loss(*line["args"]) == pytest.approx(line["expected"], rel=0, abs=1e-12)


MUTANTS = [
    (probabilities, "clip(eps, 1 - eps)", "clip(eps / 2, 1 - eps)"),
    (probabilities, "clip(eps, 1 - eps)", "clip(eps, 1)"),
    (probabilities, "clip(eps, 1 - eps)", "clip(2 * eps, 1 - eps)"),
    (probabilities, "np.stack((1 - prob, prob), axis=1)", "np.stack((prob, 1 - prob), axis=1)"),
    (probabilities, "exact.mean(-units, rows)", "exact.mean(-units, rows + 1)"),
    (probabilities, "cells == 2 * rows", "cells == 3 * rows"),
    (probabilities, "2 * rows if half else rows", "rows if half else 2 * rows"),
    (probabilities, "exact.total(error * error) * (2 if vector", "exact.total(error * error) * (1 if vector"),
    (probabilities, "2 * len(prob) if vector", "len(prob) if vector"),
    (probabilities, "exact.total(error * error)", "exact.total(abs(error))"),
    (columns, "found.tolist() in ([0], [-1])", "found.tolist() in ([0],)"),
    (columns, "found.tolist() in ([0], [-1])", "found.tolist() in ([-1],)"),
    (columns, "else found[-1]\n", "else found[0]\n"),
    (columns, "return truth == pos_label", "return truth != pos_label"),
    (columns, "score = score[:, 0]", "score = score[0]"),
    (columns, "truth[:, None] == classes", "truth[:, None] != classes"),
]


@pytest.mark.parametrize("module, old, new", MUTANTS)
def test_mutants_die(module, old, new):
    assert not survives(check_golden if module is probabilities else check_positive, module, old, new)


@given(truth, st.data())
def test_scores_are_the_loops_over_rows_and_classes(y, data):
    parts = data.draw(st.lists(st.tuples(*3 * [st.integers(1, 50)]), min_size=len(y), max_size=len(y)))
    p = np.array(parts) / np.sum(parts, axis=1, keepdims=True)
    losses = [-log(row[label]) for row, label in zip(p.tolist(), y, strict=True)]
    assert log_loss(y, p, [0, 1, 2]) == pytest.approx(sum(losses) / len(y), rel=1e-14, abs=0)
    squares = [(p[i, c] - (c == y[i])) ** 2 for i in range(len(y)) for c in range(3)]
    assert brier(y, p, labels=[0, 1, 2]) == pytest.approx(sum(squares) / len(y), rel=1e-14, abs=0)


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_a_vector_scores_as_its_two_columns(rows):
    y, p = map(np.array, zip(*rows, strict=True))
    both = np.stack((1 - p, p), axis=1)
    assert log_loss(y, p, [0, 1]) == log_loss(y, both, [0, 1])
    assert brier(y, p, 1) == pytest.approx(brier(y, both, labels=[0, 1]), rel=0, abs=2**-52)  # 1 - p rounds


def test_batches_are_sums_with_labels_and_rows_without():
    y, p = THREE
    for metric in (log_loss, brier):
        for labels in (None, [0, 1, 2]):
            state = State(metric, labels=labels)
            for i in (3, 0, 6, 1, 5, 2, 4):
                state.update(y[i : i + 1], p[i : i + 1])
            assert state.compute() == metric(y, p)
            assert any(isinstance(part, np.ndarray) for part in state.statistics) == (labels is None)
    assert brier(np.array(y), np.asfortranarray(p)) == brier(y, p)


def test_the_clipping_is_that_of_the_dtype():
    assert log_loss([1, 0], np.float32([0, 0.5])) == pytest.approx(
        (-log(2**-23) + log(2)) / 2, rel=1e-15, abs=0
    )
    assert log_loss([1, 0], [0, 1]) == pytest.approx(-log(EPS), rel=1e-15, abs=0)  # integers count as doubles


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: log_loss([0, 1], [0.5]), "y_true has 2 rows and y_prob 1"),
        (lambda: log_loss([], []), r"y_prob has shape \(0,\)"),
        (lambda: log_loss([0, 1], [0.5, np.nan]), r"y_prob\[1\] is nan"),
        (lambda: log_loss([0, 1], [0.5, 1.5]), r"y_prob\[1\] is 1.5; give probabilities, from 0 to 1"),
        (lambda: log_loss([0, 1], [[0.5, 0.5], [1.5, -0.5]]), r"y_prob\[1, 0\] is 1.5; give prob"),
        (lambda: log_loss([0, 1], [[0.5, 0.5], [0.5, 0.4]]), r"y_prob\[1\] sums to 0.9; give rows that sum"),
        (lambda: log_loss([1, 1], [0.5, 0.5]), r"y_true has 1 classes, \[1\], .* are of 2; name the class"),
        (lambda: log_loss([1, 1], [[1.0], [1.0]]), "y_true has 1 classes"),
        (lambda: log_loss([0, 1, 2], [0.5, 0.5, 0.5]), r"y_true has 3 classes, \[0, 1, 2\], .* are of 2"),
        (lambda: log_loss([1, 0], [0.5, 0.5], labels=[1, 0]), r"labels \[1, 0\] are not in order"),
        (lambda: log_loss([1, 2], [0.5, 0.5], labels=[0, 1]), r"y_true\[1\] is .*2.*, which is not one of"),
        (
            lambda: log_loss([1, 1], [0.5, 0.5], labels=[1]),
            r"labels \[1\] name 1 classes, the scores are of 2",
        ),
        (lambda: log_loss([[0, 1]], [[0.5, 0.5]]), "this score is of rows with one label"),
        (lambda: brier(["a", "b"], [0.5, 0.5]), r"the labels are strings, \['a', 'b'\]; name one with"),
        (lambda: brier([0, 1], [0.5, 0.5], pos_label=2), r"pos_label 2 is not one of the labels \[0, 1\]"),
        (lambda: brier([0], [0.5], pos_label=2, labels=[0, 1]), r"pos_label 2 is not one of labels \[0, 1\]"),
        (lambda: brier([0, 1], [[0.5, 0.5]] * 2, pos_label=1), "pos_label 1 is of a vector, and y_prob has"),
        (lambda: brier([0, 1, 2], [0.5] * 3), "y_true has 3 labels"),
        (lambda: brier([0, 1], [0.5, 0.5], scale_by_half="no"), "scale_by_half 'no' is not one of True"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
