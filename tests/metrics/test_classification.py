"""Scores of classifiers: published values, laws, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import classification
from minift.metrics.classification import (
    accuracy,
    confusion_matrix,
    f1,
    paired_difference,
    precision,
    recall,
    wilson,
)

THREE = ([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1])
# Computed with scikit-learn 1.9.1, whose documentation has the same numbers.
PUBLISHED = [
    (accuracy, ([0, 1, 2, 3], [0, 2, 1, 3]), {}, 0.5),
    (f1, THREE, {"average": "macro"}, 0.26666666666666666),
    (f1, THREE, {"average": "micro"}, 0.3333333333333333),
    (f1, THREE, {"average": "weighted"}, 0.26666666666666666),
    (f1, THREE, {"average": None}, [0.8, 0.0, 0.0]),
    (precision, THREE, {"average": "macro"}, 0.2222222222222222),
    (recall, THREE, {"average": "macro"}, 0.3333333333333333),
]
# By hand: right 2, 1, 1 of 3, 2, 1 true and 2, 2, 2 predicted.
UNEVEN = (list("aaabbc"), list("aabbcc"))
BY_HAND = [
    (precision, None, [1, 1 / 2, 1 / 2]),
    (recall, None, [2 / 3, 1 / 2, 1]),
    (f1, None, [4 / 5, 1 / 2, 2 / 3]),
    (f1, "macro", (4 / 5 + 1 / 2 + 2 / 3) / 3),
    (f1, "micro", 4 / 6),
    (f1, "weighted", (3 * 4 / 5 + 2 * 1 / 2 + 2 / 3) / 6),
]
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def check_published(module):
    for function, arguments, options, expected in PUBLISHED:
        found = getattr(module, function.__name__)(*arguments, **options)
        assert found == pytest.approx(expected, rel=1e-15, abs=0)  # two roundings of a quotient and a mean
    for function, average, expected in BY_HAND:
        assert getattr(module, function.__name__)(*UNEVEN, average) == pytest.approx(expected, rel=1e-15)
    matrix = module.confusion_matrix([2, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 2])
    assert matrix.tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 2]]


def check_intervals(module):
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table 1, method 3.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert module.wilson(right, n) == pytest.approx((low, high), abs=5e-5)  # its four decimals
    # Agresti 2002, table 10.1: of 1600, 150 approved only the first time and 86 only the second: -0.04, with
    # the standard error 0.0095.
    a = [1] * 794 + [1] * 86 + [0] * 150 + [0] * 570
    b = [1] * 794 + [0] * 86 + [1] * 150 + [0] * 570
    d, low, high = module.paired_difference(a, b)
    assert d == pytest.approx(-0.04, rel=1e-12) and (high - low) / 2 / 1.959964 == pytest.approx(
        0.0095, abs=1e-4
    )


def test_published_values():
    check_published(classification)


def test_published_intervals():
    check_intervals(classification)


MUTANTS = [
    (check_published, "2 * right, predicted + true", "right, predicted + true"),
    (check_published, "_mean(right, predicted, true", "_mean(right, true, true"),
    (check_published, "return _mean(right, true, true", "return _mean(right, right, true"),
    (check_published, "over.sum(keepdims=True), under", "over.max(keepdims=True), under"),
    (check_published, "(scores * true).sum() / true.sum()", "(scores * true).max() / true.sum()"),
    (check_published, "(places[0][known], places[1][known])", "(places[1][known], places[0][known])"),
    (check_published, "(y_true == y_pred).mean()", "(y_true != y_pred).sum() / 5"),
    (check_intervals, "p + z * z / (2 * n)", "p + z * z / n"),
    (check_intervals, "z * z / (4 * n * n)", "z * z / (4 * n)"),
    (check_intervals, "(middle - half) / (1 + z * z / n)", "(middle - half)"),
    (check_intervals, "0.0 if right == 0 else low", "low + 1e-3"),
    (check_intervals, "(a - b).mean()", "(b - a).mean()"),
    (check_intervals, "((a - b - d) ** 2).sum()", "(abs(a - b)).sum() / 2"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, classification, old, new)


@given(rows)
def test_the_matrix_holds_every_row_and_the_scores_follow_from_it(pairs):
    y_true, y_pred = map(list, zip(*pairs, strict=True))
    labels = [0, 1, 2, 3]
    matrix = confusion_matrix(y_true, y_pred, labels)
    assert matrix.sum() == len(pairs) and all(
        matrix[i, j] == sum((t, p) == (i, j) for t, p in pairs) for i in labels for j in labels
    )
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    for score, under in ((precision, predicted), (recall, true)):
        got = score(y_true, y_pred, None, labels, zero_division=0.5)
        assert [x / n if n else 0.5 for x, n in zip(right, under, strict=True)] == got.tolist()
    assert f1(y_true, y_pred, "micro", labels) == pytest.approx(accuracy(y_true, y_pred))


@given(rows, st.permutations([0, 1, 2, 3]))
def test_names_of_labels_and_their_order_change_no_mean(pairs, names):
    y_true, y_pred = map(list, zip(*pairs, strict=True))
    renamed = [["abcd"[names[x]] for x in y] for y in (y_true, y_pred)]
    for average in ("macro", "micro", "weighted"):
        assert f1(*renamed, average) == pytest.approx(f1(y_true, y_pred, average))


def test_rows_of_other_labels_are_left_out_of_the_matrix():
    assert confusion_matrix([0, 1, 5], [0, 0, 1], labels=[1, 0]).tolist() == [[0, 1], [0, 1]]
    assert confusion_matrix(["b", "a"], ["b", "b"], labels=["b", "a"]).tolist() == [[1, 0], [1, 0]]


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_holds_the_share_and_mirrors(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=2**-40)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_paired_difference_is_that_of_the_discordant_rows_and_changes_sign_with_its_sides(pairs):
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    n, n10, n01 = len(pairs), int((a & ~b).sum()), int((b & ~a).sum())
    d, low, high = paired_difference(a, b)
    half = 1.959963984540054 * max(0.0, n10 + n01 - (n10 - n01) ** 2 / n) ** 0.5 / n
    assert (d, low, high) == pytest.approx(((n10 - n01) / n, d - half, d + half), abs=1e-9)
    assert paired_difference(b, a) == pytest.approx((-d, -high, -low))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: accuracy([0], [0, 1]), "y_true has shape"),
        (lambda: accuracy([], []), "at least one row"),
        (lambda: f1([0, 1], [0, 1], "binary"), "average 'binary' is not one of macro, micro, weighted, None"),
        (lambda: f1([0], [0], "macro", labels=[]), "at least one"),
        (lambda: confusion_matrix([0], [0], labels=[0, 0]), "different from each other"),
        (lambda: wilson(3, 2), "3 of 2 rows is no share"),
        (lambda: wilson(0, 0), "at least one row"),
        (lambda: paired_difference([1, 0], [1]), "give both a score for each row"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
