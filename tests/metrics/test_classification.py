"""Scores of labels and their means: published values, laws, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, classification
from minift.metrics.classification import f1, fbeta, hamming_loss, jaccard, precision, recall, specificity
from minift.metrics.confusion import accuracy, confusion, confusion_matrix
from minift.metrics.report import classification_report

THREE = ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1])
# Computed with scikit-learn 1.9.1, whose documentation has the same numbers.
PUBLISHED = [
    (f1, {"average": "macro"}, 0.26666666666666666),
    (f1, {"average": "micro"}, 0.3333333333333333),
    (f1, {"average": "weighted"}, 0.26666666666666666),
    (f1, {"average": None}, [0.8, 0.0, 0.0]),
    (precision, {"average": "macro"}, 0.2222222222222222),
    (recall, {"average": "macro"}, 0.3333333333333333),
    (fbeta, {"average": "macro", "beta": 0.5}, 0.23809523809523805),
    (jaccard, {"average": None}, [2 / 3, 0.0, 0.0]),
]
# By hand: right 2, 1, 1 of 3, 2, 1 true and 2, 2, 2 predicted, in 6 rows.
UNEVEN = (list("aaabbc"), list("aabbcc"))
BY_HAND = [
    (precision, None, [1, 1 / 2, 1 / 2]),
    (recall, None, [2 / 3, 1 / 2, 1]),
    (specificity, None, [3 / 3, 3 / 4, 4 / 5]),
    (specificity, "micro", 10 / 12),
    (f1, None, [4 / 5, 1 / 2, 2 / 3]),
    (f1, "macro", (4 / 5 + 1 / 2 + 2 / 3) / 3),
    (f1, "micro", 4 / 6),
    (f1, "weighted", (3 * 4 / 5 + 2 * 1 / 2 + 2 / 3) / 6),
    (jaccard, None, [2 / 3, 1 / 3, 1 / 2]),
]
# Matrices of 0 and 1. Rows: 1 of 2 true and 1 predicted; nothing at all; all of both.
MANY = ([[1, 1, 0], [0, 0, 0], [0, 1, 1]], [[1, 0, 0], [0, 0, 0], [0, 1, 1]])
MANY_BY_HAND = [
    (precision, None, [1, 1, 1]),
    (recall, None, [1, 1 / 2, 1]),
    (f1, "micro", 2 * 3 / (4 + 3)),
    (f1, "samples", (2 / 3 + 0 + 1) / 3),
    (jaccard, "samples", (1 / 2 + 0 + 1) / 3),
    (recall, "weighted", (1 * 1 + 2 * 1 / 2 + 1 * 1) / 4),
]
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def check_published(module):
    """To 1e-15: two roundings of a quotient and a mean."""
    for function, options, expected in PUBLISHED:
        found = getattr(module, function.__name__)(*THREE, **options, zero_division=0)
        assert found == pytest.approx(expected, rel=1e-15, abs=0)
    for arguments, table in ((UNEVEN, BY_HAND), (MANY, MANY_BY_HAND)):
        for function, average, expected in table:
            found = getattr(module, function.__name__)(*arguments, average=average, zero_division=0)
            assert found == pytest.approx(expected, rel=1e-15)
    assert module.hamming_loss([2, 2, 3, 4], [1, 2, 3, 4]) == 0.25
    assert module.hamming_loss(*MANY) == 1 / 9


def test_published_values():
    check_published(classification)


MUTANTS = [
    ("(1 + beta**2) * right, beta**2 * true", "(1 + beta**2) * right, beta * true"),
    ("return right, predicted", "return right, true"),
    ("return right, true\n", "return right, right\n"),
    ("return n - true - predicted + right, n - true", "return n - true - predicted + right, n + 0 * true"),
    ("return right, true + predicted - right", "return right, true + predicted"),
    ("n = n * len(right)", "n = n * 2"),
    ("t.sum(keepdims=True) for t", "t.max(keepdims=True) for t"),
    ("(scores[known] * weights[known]).sum() / weights[known].sum()", "scores[known].mean()"),
    ("return _mean(scores, count)", "return _mean(scores, count * count + np.arange(len(count)))"),
    ("true + predicted - 2 * right) / (c.n", "true + predicted - right) / (c.n"),
    ("return (true - right) / true", "return right / true"),
    ('true if average == "weighted" else None', 'predicted if average == "weighted" else None'),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_published, classification, old, new)


@given(rows)
def test_the_scores_follow_from_the_matrix(pairs):
    y_true, y_pred = map(list, zip(*pairs, strict=True))
    labels = [0, 1, 2, 3]
    present = [label for label in labels if label in y_true]
    matrix = np.zeros((4, 4), int)
    for t, p in pairs:
        matrix[t, p] += 1
    assert confusion_matrix(y_true, y_pred, labels).tolist() == matrix.tolist()
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    for score, under in ((precision, predicted), (recall, true)):
        got = score(y_true, y_pred, None, labels, zero_division=1)
        assert [x / n if n else 1 for x, n in zip(right, under, strict=True)] == got.tolist()
    assert f1(y_true, y_pred, "micro", labels) == accuracy(y_true, y_pred)
    assert hamming_loss(y_true, y_pred) == pytest.approx(1 - accuracy(y_true, y_pred), abs=2**-52)
    weighted = recall(y_true, y_pred, "weighted", present)
    assert weighted == pytest.approx(accuracy(y_true, y_pred), rel=1e-14)  # sum right / true x true / n


@given(rows, st.permutations([0, 1, 2, 3]))
def test_names_of_labels_and_their_order_change_no_mean(pairs, names):
    y_true, y_pred = map(list, zip(*pairs, strict=True))
    renamed = [["abcd"[names[x]] for x in y] for y in (y_true, y_pred)]
    for average in ("macro", "micro", "weighted"):
        a, b = (f1(*sides, average, zero_division=0) for sides in (renamed, (y_true, y_pred)))
        assert a == pytest.approx(b, rel=1e-14)  # the means sum in another order


@given(rows)
def test_indicator_matrices_of_one_label_a_row_score_as_vectors_do(pairs):
    y = [np.array(side) for side in zip(*pairs, strict=True)]
    matrices = [np.eye(4, dtype=int)[side] for side in y]
    for metric in (precision, recall, f1, jaccard, specificity):
        for average in ("macro", "micro", "weighted", None):
            expected = metric(*y, average, labels=[0, 1, 2, 3], zero_division=0)
            assert np.array_equal(metric(*matrices, average, zero_division=0), expected)


def test_the_binary_score_is_that_of_its_label():
    assert f1(["no", "yes", "yes"], ["yes", "yes", "no"], "binary", pos_label="yes") == 0.5
    assert recall([1, 1, 1], [1, 1, 0], "binary", pos_label=0, zero_division=1) == 1


def test_what_was_counted_stands_for_its_rows():
    assert f1(confusion(*THREE), None, zero_division=0) == f1(*THREE, zero_division=0)
    assert f1(confusion(*MANY), None, "samples", zero_division=0) == f1(*MANY, "samples", zero_division=0)


def test_a_score_without_denominator_warns_unless_its_value_is_chosen(recwarn):
    assert precision([0, 1, 1, 1], [0, 0, 0, 0], zero_division=0.0) == 1 / 8
    assert precision([0, 1, 1, 1], [0, 0, 0, 0], zero_division=math.nan) == 1 / 4
    assert precision([0, 1, 1, 1], [0, 0, 0, 0], zero_division=1) == 5 / 8
    assert not recwarn.list
    with pytest.warns(MetricWarning, match="precision has no denominator in 1 of 2 labels and is taken as 0"):
        assert precision([0, 1, 1, 1], [0, 0, 0, 0]) == 1 / 8


def test_the_report_names_its_lines():
    text = classification_report(*UNEVEN, labels=["a", "c"], target_names=["first", "third one"])
    lines = [line.split() for line in text.splitlines() if line]
    assert [line[0] for line in lines] == ["precision", "first", "third", "micro", "macro", "weighted"]
    assert lines[1] == ["first", "1.00", "0.67", "0.80", "3"]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (
            lambda: f1([0, 1, 2], [0, 1, 2], "binary"),
            r"needs two labels, and the rows have the labels \[0, 1",
        ),
        (lambda: f1(*MANY, "binary"), "needs two labels, and the rows have several labels a row"),
        (lambda: f1(["a", "b"], ["a", "b"], "binary"), r"pos_label 1 is not one of the labels \['a', 'b'\]"),
        (lambda: f1([0], [0], "mean"), "average 'mean' is not one of 'binary', 'micro'"),
        (lambda: f1([0], [0], labels=[]), "at least one"),
        (lambda: f1([0], [0], labels=[1, 1]), "different from each other"),
        (lambda: f1([0], [0], labels=["a"]), r"labels \['a'\] are of another kind than the rows'"),
        (lambda: f1([0], [0], zero_division=0.5), "zero_division 0.5 is not 0, 1 or nan"),
        (lambda: f1([0], [0], "samples"), "needs matrices"),
        (lambda: f1(*MANY, labels=[0, 3]), "must be columns, 0 to 2"),
        (lambda: fbeta([0], [0], beta=-1), "beta -1 must be from 0 to 1e100, or infinite"),
        (lambda: fbeta([0], [0], beta=math.nan), "beta nan must be from 0"),
        (lambda: f1([[1, 2]], [[1, 0]]), r"y_true\[0, 1\] is .*2.*; give 0 or 1"),
        (lambda: f1([[1, 0]], [[1, 0, 1]]), r"y_true has shape \(1, 2\) and y_pred \(1, 3\)"),
        (lambda: f1([[1], [0]], [[1], [1]]), r"y_true has one column; give its vector, y_true\[:, 0\]"),
        (lambda: f1([0, 1], [0, 1], np.array([0, 1])), r"average array\(\[0, 1\]\) is not one of"),
        (lambda: f1([[1, 0], [1]], [[1, 0], [1]]), "y_true has rows of different lengths"),
        (lambda: f1([[1, 0]], [[1, 0]], "samples", labels=[0]), "give the columns of the labels meant"),
        (lambda: classification_report([0], [0], target_names=["a", "b"]), "2 names for 1 labels"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
