"""ROC and precision-recall curves: published points, laws, what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, average_precision, curves, roc_auc
from minift.metrics.curves import precision_recall_curve, roc_curve

# Fawcett 2006, "An introduction to ROC analysis", figure 3: 20 rows, the highest score first.
CLASSES = "ppnpppnnpnpnpnnnpnpn"
SCORES = [0.9, 0.8, 0.7, 0.6, 0.55, 0.54, 0.53, 0.52, 0.51, 0.505]
SCORES += [0.4, 0.39, 0.38, 0.37, 0.36, 0.35, 0.34, 0.33, 0.3, 0.1]
rows = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30)


def check_points(module):
    fpr, tpr, thresholds = module.roc_curve(list(CLASSES), SCORES, "p", drop_intermediate=False)
    assert thresholds.tolist() == [np.inf, *SCORES]
    # Every row is a step, a tenth up for a positive and a tenth to the right for a negative.
    assert tpr.tolist() == [CLASSES[:i].count("p") / 10 for i in range(21)]
    assert fpr.tolist() == [CLASSES[:i].count("n") / 10 for i in range(21)]
    at = thresholds.tolist().index(0.54)  # "(0.1, 0.5) produces its highest accuracy"
    assert (fpr[at], tpr[at]) == (0.1, 0.5)
    fpr, tpr, thresholds = module.roc_curve(list(CLASSES), SCORES, "p")
    corners = [np.inf, 0.9, 0.8, 0.7, 0.54, 0.52, 0.51, 0.505, 0.4, 0.39, 0.38, 0.35, 0.34, 0.33, 0.3, 0.1]
    assert thresholds.tolist() == corners  # scikit-learn 1.9.1

    precision, recall, thresholds = module.precision_recall_curve(list(CLASSES), SCORES, "p")
    assert thresholds.tolist() == SCORES[::-1]
    assert recall.tolist() == [CLASSES[:i].count("p") / 10 for i in range(20, -1, -1)]
    assert precision.tolist() == [*(CLASSES[:i].count("p") / i for i in range(20, 0, -1)), 1.0]
    thresholds = module.precision_recall_curve(list(CLASSES), SCORES, "p", drop_intermediate=True)[2]
    left_out = [0.36, 0.37, 0.53]  # inside runs of negatives, where recall stands still
    assert thresholds.tolist() == [s for s in SCORES[::-1] if s not in left_out]


def check_ties(module):
    """Rows of one score are one step."""
    fpr, tpr, thresholds = module.roc_curve([0, 1, 1, 0, 1], [2, 2, 3, 1, 2])
    assert thresholds.tolist() == [np.inf, 3, 2, 1]
    assert fpr.tolist() == [0, 0, 0.5, 1] and tpr.tolist() == [0, 1 / 3, 1, 1]
    precision, recall, thresholds = module.precision_recall_curve([0, 1, 1, 0, 1], [2, 2, 3, 1, 2])
    assert precision.tolist() == [3 / 5, 3 / 4, 1, 1] and recall.tolist() == [1, 1, 1 / 3, 0]
    # A straight line whose points differ in steps keeps them; alike steps are dropped.
    even = module.roc_curve([1, 0, 1, 0, 1, 0], [3, 3, 2, 2, 1, 1])[2]
    uneven = module.roc_curve([1, 0] + 2 * [1, 0] + [1, 0], [3, 3] + 4 * [2] + [1, 1])[2]
    assert even.tolist() == [np.inf, 3, 1] and uneven.tolist() == [np.inf, 3, 2, 1]
    right = module.roc_curve([1, 0, 1, 0, 0, 0, 0, 1, 0], [4, 4, 3, 3, 3, 3, 2, 2, 1])[2]
    assert right.tolist() == [np.inf, 4, 3, 2, 1]


@pytest.mark.parametrize("check", [check_points, check_ties])
def test_points(check):
    check(curves)


MUTANTS = [
    ("len(own) - np.searchsorted(own, thresholds)", 'len(own) - np.searchsorted(own, thresholds, "right")'),
    ("len(ordered) - first - true", "len(ordered) - first"),
    ("ordered[1:] != ordered[:-1]", "ordered[1:] != ordered[1:] - 1"),
    ("np.sort(score[positive])", "np.sort(score[~positive])"),
    ("(np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)", "np.diff(true, 2) != 0"),
    ("(np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)", "np.diff(false, 2) != 0"),
    ("for count in (false, true)]", "for count in (true, false)]"),
    ("np.concatenate(([np.inf], thresholds))", "np.concatenate((thresholds[:1] + 1, thresholds))"),
    ("true / (true + false)\n", "true / (1 + true + false)\n"),
    ("step[:-1] | step[1:]", "step[1:]"),
    ("np.append(precision[::-1], 1.0)", "np.append(precision[::-1], 0.0)"),
    ("np.append(recall[::-1], 0.0)", "np.append(recall, 0.0)"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not (survives(check_points, curves, old, new) and survives(check_ties, curves, old, new))


@given(rows)
def test_curves_count_what_each_threshold_finds_and_hold_their_areas(pairs):
    y, s = map(np.array, zip(*pairs, strict=True))
    if not 0 < y.sum() < len(y):
        return
    for drop in (False, True):
        fpr, tpr, thresholds = roc_curve(y, s, drop_intermediate=drop)
        for f, t, threshold in zip(fpr, tpr, thresholds, strict=True):
            found = s >= threshold
            assert (f, t) == ((found & ~y).sum() / (~y).sum(), (found & y).sum() / y.sum())
        area = ((fpr[1:] - fpr[:-1]) * (tpr[1:] + tpr[:-1]) / 2).sum()
        assert area == pytest.approx(roc_auc(y, s), rel=0, abs=1e-14)  # sums of at most 30 rounded areas
        precision, recall, thresholds = precision_recall_curve(y, s, drop_intermediate=drop)
        for p, r, threshold in zip(precision, recall, thresholds, strict=False):
            found = s >= threshold
            assert (p, r) == ((found & y).sum() / found.sum(), (found & y).sum() / y.sum())
        area = ((recall[:-1] - recall[1:]) * precision[:-1]).sum()
        assert drop or area == pytest.approx(average_precision(y, s), rel=0, abs=1e-14)


def test_thresholds_keep_the_scores_apart():
    scores = np.array([0.1, 0.1 + 2**-56, 5e-324, 0.0, -0.0, 1e300, -1e300])
    thresholds = precision_recall_curve([0, 1, 0, 1, 0, 1, 0], scores)[2]
    assert thresholds.tolist() == [-1e300, 0.0, 5e-324, 0.1, 0.1 + 2**-56, 1e300]
    assert precision_recall_curve([0, 1], np.float32([0.1, 0.2]))[2].dtype == np.float32


def test_a_class_without_rows_warns():
    with pytest.warns(MetricWarning, match="no positive rows; their rate is nan"):
        fpr, tpr, _ = roc_curve([0, 0], [0.1, 0.2])
    assert fpr.tolist() == [0, 0.5, 1] and np.isnan(tpr).all()
    with pytest.warns(MetricWarning, match="no negative rows; their rate is nan"):
        assert np.isnan(roc_curve([1, 1], [0.1, 0.2])[0]).all()
    with pytest.warns(MetricWarning, match="no positive rows; recall is taken as 1"):
        precision, recall, _ = precision_recall_curve([0, 0], [0.1, 0.2])
    assert precision.tolist() == [0, 0, 1] and recall.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda f: f([0, 1], [0.1]), "y_true has 2 rows and y_score 1"),
        (lambda f: f([0, 1], [0.1, np.nan]), r"y_score\[1\] is nan"),
        (lambda f: f([0, 1, 2], [1, 2, 3]), r"y_true has 3 labels, \[0, 1, 2\], .* with y_true == label"),
        (lambda f: f(["a", "b"], [1, 2]), r"y_true has the labels \['a', 'b'\]; name the positive one"),
        (lambda f: f([0, 1], [1, 2], "b"), r"pos_label 'b' is not one of the labels \[0, 1\]"),
        (
            lambda f: f([1, 2], [1, 2]),
            r"y_true has the labels \[1, 2\]; name the positive one with `pos_label`",
        ),
        (lambda f: f([0, 2], [1, 2], 1), r"pos_label 1 is not one of the labels \[0, 2\]"),
        (lambda f: f([[0, 1]], [[1, 2]]), "this score is of rows with one label"),
        (lambda f: f([0, 1], [[1, 2], [3, 4]]), "y_score has a column for each class; give"),
    ],
)
@pytest.mark.parametrize("curve", [roc_curve, precision_recall_curve])
def test_what_makes_no_curve_is_refused(curve, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(curve)
