"""The confusion matrix and the scores of its totals: published values, laws, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, confusion
from minift.metrics.confusion import SPAN, accuracy, balanced_accuracy, confusion_matrix, matthews_corrcoef

labelled = st.one_of(
    st.tuples(st.integers(-3, 4), st.integers(-3, 4)), st.tuples(*2 * [st.integers(-(2**40), 2**40)])
)
rows = st.lists(labelled, min_size=1, max_size=40)


def check_published(module):
    """Computed with scikit-learn 1.9.1, whose documentation has the same numbers, or by hand."""
    matrix = module.confusion_matrix([2, 0, 2, 2, 0, 1], [0, 0, 2, 2, 0, 2])
    assert matrix.tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 2]]
    named = module.confusion_matrix(list("babcb"), list("bbbca"), labels=["c", "b", "a"])
    assert named.tolist() == [[1, 0, 0], [0, 2, 1], [0, 1, 0]]  # by hand
    shares = {"true": [[1, 0, 0], [0, 2 / 3, 1 / 3], [0, 1, 0]], "all": (named / 5).tolist()}
    shares["pred"] = [[1, 0, 0], [0, 2 / 3, 1], [0, 1 / 3, 0]]
    for way, expected in shares.items():
        found = module.confusion_matrix(list("babcb"), list("bbbca"), list("cba"), normalize=way)
        assert found.tolist() == expected
    assert module.accuracy([0, 1, 2, 3], [0, 2, 1, 3]) == 0.5
    assert module.accuracy([[1, 0], [1, 1]], [[1, 0], [1, 0]]) == 0.5
    assert module.balanced_accuracy([0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1]) == 0.625
    assert module.balanced_accuracy([0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1], adjusted=True) == 0.25
    assert module.matthews_corrcoef([1, 1, 1, -1], [1, -1, 1, 1]) == pytest.approx(-1 / 3, rel=1e-15)
    assert module.matthews_corrcoef([0, 1], [0, 0]) == 0
    far = (10**12 * np.array([2, 0, 2, 2, 0, 1]), 10**12 * np.array([0, 0, 2, 2, 0, 2]))
    assert module.confusion_matrix(*far).tolist() == matrix.tolist()
    for y in (np.array([1, 2, 2]), np.array(["b", "a", "a"]), 10**9 * np.array([1, 2, 2])):
        many = np.tile(y, module.BLOCK)
        assert module.accuracy(many, many) == 1
        assert sorted(module.confusion_matrix(many, many).sum(1)) == [module.BLOCK, 2 * module.BLOCK]
    three = [module.confusion([x], [y]) for x, y in ((5, 5), (1, 9), (5, 1))]
    assert module.confusion_matrix(three[0] + three[1] + three[2], None).tolist() == [
        [0, 0, 1],
        [1, 1, 0],
        [0, 0, 0],
    ]


def test_published_values():
    check_published(confusion)


MUTANTS = [
    ("cell += y_pred[block]", "cell += y_true[block]"),
    ("cell *= span", "cell *= span - 1"),
    ("matrix += np.bincount", "matrix = np.bincount"),
    ("matrix.sum(axis=0) + matrix.sum(axis=1)", "matrix.sum(axis=1)"),
    ("(occur + low)", "occur"),
    ("cells // len(labels), cells % len(labels)", "cells % len(labels), cells // len(labels)"),
    ("_add(place, count, len(cells))", "np.bincount(place)"),
    ("*np.split(places, 2), count", "*np.split(places, 2)[::-1], count"),
    (
        "labels[cells // len(labels)], labels[cells % len(labels)], count",
        "labels[cells // len(labels)], labels[cells % len(labels)], count**0",
    ),
    ("np.count_nonzero(y_true == y_pred)", "np.count_nonzero(y_true != y_pred) // 2"),
    ('{"true": 1, "pred": 0', '{"true": 0, "pred": 1'),
    ("order[at], -1)", "at, -1)"),
    ("matrix[true[known], predicted[known]] =", "matrix[predicted[known], true[known]] ="),
    ("(right[occur] / true[occur]).mean()", "right[occur].sum() / true[occur].sum()"),
    ("(score - 1 / classes) / (1 - 1 / classes)", "score - 1 / classes"),
    ("n * sum(right) - sum(t * p", "n * sum(right) + sum(t * p"),
    ("sum(p * p for p in predicted)", "sum(p for p in predicted)"),
    ("if alone else 0.0", "if alone else 1.0"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    survivor = survives(check_published, confusion, old, new)
    if "np.bincount(place)" in new:  # rows of a batch are counted once; only merged batches count more
        survivor = survives(check_merged, confusion, old, new)
    assert not survivor


def check_merged(module):
    part = module.confusion([1, 1, 7 * SPAN], [1, 1, 1])
    assert module.confusion_matrix(part + part, None).tolist() == [[4, 0], [2, 0]]


@given(rows, st.data())
def test_the_matrix_holds_every_row_in_any_split(pairs, data):
    y_true, y_pred = (np.array(side) for side in zip(*pairs, strict=True))
    labels = sorted({*y_true.tolist(), *y_pred.tolist()})
    cut = data.draw(st.integers(1, len(pairs)))
    parts = [
        confusion.confusion(a, b)
        for a, b in ((y_true[:cut], y_pred[:cut]), (y_true[cut:], y_pred[cut:]))
        if len(a)
    ]
    merged = parts[0] if len(parts) == 1 else parts[1] + parts[0]
    with_all = confusion_matrix(y_true, y_pred, [*labels, 2**50])
    assert with_all.sum() == len(pairs)
    for i, t in enumerate(labels):
        for j, p in enumerate(labels):
            assert with_all[i, j] == ((y_true == t) & (y_pred == p)).sum()
    assert confusion_matrix(merged, None, [*labels, 2**50]).tolist() == with_all.tolist()
    assert merged.labels.tolist() == labels


@given(rows)
def test_matthews_of_two_labels_is_pearsons_correlation(pairs):
    y = np.array(pairs) > 0
    if not y.all(axis=0).any() and y.any(axis=0).all():
        r = np.corrcoef(y[:, 0], y[:, 1])[0, 1]
        assert matthews_corrcoef(y[:, 0], y[:, 1]) == pytest.approx(r, abs=1e-12)


def test_many_labels_need_no_square_matrix():
    y = np.arange(10**5)
    assert accuracy(y, y) == balanced_accuracy(y, y) == 1
    assert matthews_corrcoef(y, y) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("kind", [bool, np.int8, np.uint64, np.float32, str, object])
def test_labels_of_every_kind_count_alike(kind):
    true, predicted = (
        np.array(side).astype(str if kind is object else kind).astype(kind) for side in ([1, 0, 1], [1, 1, 0])
    )
    assert confusion_matrix(true, predicted).tolist() == [[0, 1], [1, 1]]


def test_degenerate_cases_warn():
    with pytest.warns(MetricWarning, match="y_pred has labels that y_true lacks"):
        assert balanced_accuracy([0, 0], [0, 1]) == 0.5
    with pytest.warns(MetricWarning, match="1 x 1"):
        assert confusion_matrix([3], [3]).tolist() == [[1]]
    with pytest.warns(MetricWarning, match="adjusted is nan"):
        assert np.isnan(balanced_accuracy([0, 0], [0, 0], adjusted=True))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: accuracy([0], [0, 1]), "y_true has 1 rows and y_pred 2"),
        (lambda: accuracy([], []), "y_true is empty; give at least one row"),
        (lambda: accuracy([0, 1], ["a", "b"]), "y_true holds int64, as .*0.*, and y_pred <U1"),
        (lambda: accuracy([0, "b"], ["a", "b"]), r"y_true\[0\] is 0 among strings"),
        (lambda: accuracy([0.5, 1], [0, 1]), r"y_true\[0\] is 0.5, which is no label"),
        (lambda: accuracy([0, 1], [0, np.nan]), r"y_pred\[1\] is nan, which is no label"),
        (lambda: accuracy([0, np.inf], [0, 1]), r"y_true\[1\] is inf, which is no label"),
        (lambda: accuracy([None, 1], [0, 1]), "y_true holds object"),
        (lambda: accuracy([2**53 + 1, 1.0], [2**53, 1.0]), r"y_true\[0\] is 9007199254740992.0, which is no"),
        (lambda: accuracy(np.array([2**60]), np.array([1.0])), "y_true has integers beyond 2\\^53"),
        (lambda: accuracy(np.array([2**63], np.uint64), [1]), "y_true has a label of 9223372036854775808"),
        (lambda: accuracy(np.ma.array([1, 0], mask=[0, 1]), [1, 1]), "y_true is a masked array"),
        (lambda: accuracy(3, 3), r"y_true has shape \(\)"),
        (lambda: confusion_matrix([0], [0], labels=[0, 0]), "different from each other"),
        (lambda: confusion_matrix([0], [0], labels=[3]), r"none of labels \[3\] is in y_true"),
        (lambda: confusion_matrix([0], [0], normalize="rows"), "normalize 'rows' is not one of None, 'true'"),
        (lambda: confusion_matrix([[1, 0]], [[1, 0]]), "this score is of rows with one label"),
        (lambda: matthews_corrcoef([[1, 0]], [[1, 0]]), "this score is of rows with one label"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
