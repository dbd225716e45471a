"""Areas under curves and top k: published and golden values, the definitions as loops, what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, ranking
from minift.metrics.ranking import average_precision, roc_auc, top_k_accuracy
from minift.metrics.streaming import State

# Fawcett 2006, "An introduction to ROC analysis", figure 3: 20 rows, the highest score first.
FAWCETT = (
    [int(c == "p") for c in "ppnpppnnpnpnpnnnpnpn"],
    [90, 80, 70, 60, 55, 54, 53, 52, 51, 50.5, 40, 39, 38, 37, 36, 35, 34, 33, 30, 10],
)
SMALL = ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
THREE = (
    np.array([0, 1, 2, 2, 1, 0, 2]),
    np.array([[5, 3, 2], [2, 5, 3], [1, 4, 5], [4, 4, 2], [6, 2, 2], [5, 2, 3], [2, 2, 6]]) / 10,
)
MANY = (
    [[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]],
    [[0.9, 0.4, 0.4], [0.2, 0.7, 0.6], [0.3, 0.8, 0.3], [0.3, 0.9, 0.2]],
)
# Computed with scikit-learn 1.9.1; SMALL is of its documentation.
GOLDEN = [
    ("roc_auc", SMALL, {}, 0.75),
    ("roc_auc", FAWCETT, {}, 0.68),
    ("roc_auc", THREE, {"average": "micro"}, 0.75),
    ("roc_auc", THREE, {}, 0.7166666666666668),
    ("roc_auc", THREE, {"average": "weighted"}, 0.7214285714285715),
    ("roc_auc", THREE, {"average": None}, [0.8, 0.6, 0.75]),
    ("roc_auc", THREE, {"multi_class": "ovo"}, 0.7013888888888888),
    ("roc_auc", THREE, {"multi_class": "ovo", "average": "weighted"}, 0.7113095238095237),
    ("roc_auc", MANY, {"average": "samples"}, 0.625),
    ("roc_auc", MANY, {"average": None}, [0.875, 0.5, 2 / 3]),
    ("average_precision", SMALL, {}, 0.8333333333333333),
    ("average_precision", FAWCETT, {}, 0.7357475805927818),
    ("average_precision", THREE, {"average": "micro"}, 0.6476190476190475),
    ("average_precision", THREE, {}, 0.7063492063492062),
    ("average_precision", MANY, {"average": "samples"}, 0.75),
    ("average_precision", MANY, {"average": "weighted"}, 0.7976190476190474),
    ("top_k_accuracy", THREE, {"k": 1}, 5 / 7),
    ("top_k_accuracy", THREE, {"k": 2}, 5 / 7),
    ("top_k_accuracy", ([0, 1, 1, 0], [0.2, 0.6, 0.4, 0.5]), {"k": 1}, 0.75),
    ("top_k_accuracy", ([0, 1, 1, 1], [-0.2, 0.6, 0.4, 0.5]), {"k": 1}, 1.0),
    # Of equal scores the later class stands first, so the third is a hit and the first is none.
    ("top_k_accuracy", ([0, 2, 1], [[0.3, 0.3, 0.3]] * 3), {"k": 1}, 1 / 3),
]
rows = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30)


def check_golden(module):
    for name, arguments, options, expected in GOLDEN:
        found = getattr(module, name)(*arguments, **options)
        assert found == pytest.approx(expected, rel=0, abs=1e-15)  # means of a few quotients, of ulp 1e-16


def test_golden_values():
    check_golden(ranking)


def test_values_of_the_reference_file(shared_data):
    known = {"roc_auc": roc_auc, "average_precision": average_precision}
    lines = json.loads((shared_data / "metric_refs" / "classification.json").read_text())
    lines = [line for line in lines if line["id"] in known]
    assert len(lines) == len(known)
    for line in lines:
        assert known[line["id"]](*line["args"]) == pytest.approx(line["expected"], rel=0, abs=1e-12)


MUTANTS = [
    ('high, "left").sum()', 'high, "right").sum()'),
    ("(below + below_or_tied) / (2 * len(high)", "(below + below) / (2 * len(high)"),
    ("score[~positive])", "score[positive])"),
    ("(true / (true + false))).sum()", "(true / (true + false + 1))).sum()"),
    ("np.diff(true, prepend=0)", "np.diff(true, prepend=1)"),
    ("(np.where(weights > 0, values, 0) * weights).sum() / weights.sum()", "values.mean()"),
    ("weights = truth.sum(axis=0)", "weights = (~truth).sum(axis=0)"),
    ("metric(truth.ravel(), score.ravel())", "metric(truth.T.ravel(), score.ravel())"),
    ('if average == "samples" else', 'if average != "samples" else'),
    ("_pairs(own[b][:, b], own[a][:, b])", "_pairs(own[a][:, b], own[b][:, b])"),
    ("_pairs(own[a][:, a], own[b][:, a])", "_pairs(own[a][:, b], own[b][:, b])"),
    ('len(own[a]) + len(own[b]) if average == "weighted"', 'len(own[a]) if average == "weighted"'),
    ("found[-1]), score), ", "found[0]), score), "),
    ("np.arange(len(found)) > place", "np.arange(len(found)) < place"),
    ("(score > own) |", "(score >= own) |"),
    (".sum(axis=1) < k)", ".sum(axis=1) <= k)"),
    ("0.5 if score.min() >= 0 and", "0.5 if"),
    ("(score > threshold) == place", "(score < threshold) == place"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_golden, ranking, old, new)


@given(rows)
def test_the_area_is_the_share_of_pairs_in_order_and_ap_the_mean_over_positives(pairs):
    y, s = map(np.array, zip(*pairs, strict=True))
    if len(set(y.tolist())) == 2:
        won = sum((a > b) + (a == b) / 2 for a in s[y] for b in s[~y])
        assert roc_auc(y, s) == won / (y.sum() * (~y).sum())
        assert roc_auc(~y, s) == pytest.approx(1 - roc_auc(y, s), rel=0, abs=2**-52)
        assert roc_auc(y, s**3 - 7) == roc_auc(y, s)  # only the order counts
    if y.any():
        at = [(y & (s >= a)).sum() / (s >= a).sum() for a in s[y]]
        assert average_precision(y, s) == pytest.approx(
            sum(at) / len(at), rel=1e-14, abs=0
        )  # sums in another order


@given(st.permutations(range(7)))
def test_the_order_of_rows_changes_nothing(order):
    for y, s in (THREE, map(np.array, MANY)):
        own = [row for row in order if row < len(y)]
        for average in ("macro", "micro", None):
            assert np.array_equal(roc_auc(y[own], s[own], average=average), roc_auc(y, s, average=average))
            ap = average_precision(y[own], s[own], average)
            assert np.array_equal(ap, average_precision(y, s, average))


def test_names_and_kinds_of_labels_change_nothing():
    y, s = SMALL
    for names in (["ham", "spam"], [-1, 1], [False, True], [1, 2], [0.0, 1.0]):
        assert roc_auc([names[i] for i in y], s) == roc_auc([names[i] for i in y], s, "ovo", labels=names)
        assert roc_auc([names[i] for i in y], np.array(s)[:, None]) == 0.75
    assert average_precision(["a", "b"], [1, 0], pos_label="a") == 1
    assert roc_auc([0, 1], np.array([2**62, 2**62 + 1])) == 1  # no double tells these apart
    names = np.array(["a", "b", "c"])[THREE[0]]
    assert roc_auc(names, THREE[1]) == roc_auc(*THREE)
    assert top_k_accuracy(names, THREE[1], 1) == top_k_accuracy(*THREE, 1)


def test_batches_need_not_hold_all_classes():
    for metric, settings in ((roc_auc, {}), (roc_auc, {"multi_class": "ovo"}), (top_k_accuracy, {"k": 1})):
        state = State(metric, **settings)
        for y, s in zip(*THREE, strict=True):
            state.update([y], [s])
        assert state.compute() == metric(*THREE, **settings)


def test_what_holds_by_convention_warns_once(recwarn):
    assert np.isnan(roc_auc([1, 1], [0.1, 0.2]))
    assert np.isnan(roc_auc([0, 0], [[0.1, 0.2, 0.7]] * 2, "ovo", labels=[0, 1, 2]))
    assert np.isnan(roc_auc([0, 1], [[0.1, 0.2, 0.7]] * 2, labels=[0, 1, 2]))
    assert average_precision([0, 0], [0.1, 0.2]) == 0
    assert top_k_accuracy([0, 1, 2], np.eye(3), 3) == 1
    assert [type(w.message) for w in recwarn] == 5 * [MetricWarning]
    assert str(recwarn[2].message) == (
        "y_true has rows of one class only in 1 of 3 parts, so roc_auc is nan there"
    )
    recwarn.clear()
    assert average_precision([[0, 0], [0, 0]], [[0.1, 0.2], [0.3, 0.4]], "weighted") == 0
    assert average_precision([1, 1], [0.1, 0.2]) == 1
    assert not recwarn.list


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: roc_auc([0, 1], [0.5]), "y_true has 2 rows and y_score 1"),
        (lambda: roc_auc([], []), r"y_score has shape \(0,\); give"),
        (lambda: roc_auc([0, 1], [0.5, np.nan]), r"y_score\[1\] is nan; give finite numbers"),
        (lambda: roc_auc([0, 1], [0.5, np.inf]), r"y_score\[1\] is inf"),
        (lambda: roc_auc([0, 1], ["a", "b"]), "y_score holds <U1; give numbers"),
        (lambda: roc_auc([0, 0.5], [0, 1]), r"y_true\[1\] is 0.5, which is no label"),
        (
            lambda: roc_auc([0, 1, 2], [0, 1, 2]),
            r"y_true has 3 labels, \[0, 1, 2\], and this score is of two",
        ),
        (lambda: roc_auc([0, 1], [[0.5, 0.5]] * 2), "a column for each of two classes; give the scores of"),
        (lambda: roc_auc(*THREE, multi_class="raise"), "multi_class 'raise' is not one of 'ovr', 'ovo'"),
        (lambda: roc_auc(*THREE, average="binary"), "average 'binary' is not one of"),
        (lambda: roc_auc(*THREE, "ovo", "micro"), "with multi_class 'ovo', 'micro' is not one of 'macro'"),
        (lambda: roc_auc(*THREE, average="samples"), "with multi_class 'ovr', 'samples' is not one of"),
        (lambda: roc_auc(THREE[0], 2 * THREE[1]), r"y_score\[0\] sums to 2; .* give these, as softmax does"),
        (lambda: roc_auc(THREE[0], THREE[1][:, :1]), "y_true has 3 labels"),
        (lambda: roc_auc([0, 1, 1], THREE[1][:3]), "y_true has 2 classes, .* name the class of each column"),
        (lambda: roc_auc(*THREE, labels=[2, 1, 0]), r"labels \[2, 1, 0\] are not in order; sort them"),
        (lambda: roc_auc(*THREE, labels=[0, 1]), r"labels \[0, 1\] name 2 classes, the scores are of 3"),
        (lambda: roc_auc(*THREE, labels=[0, 1, 3]), r"y_true\[2\] is .*2.*, which is not one of labels \[0"),
        (lambda: roc_auc(*THREE, labels=list("abc")), "are of another kind than y_true's"),
        (lambda: roc_auc([[1, 2]], [[0, 1]]), "give 0 or 1"),
        (lambda: roc_auc([[1, 0]], [[0, 1, 0]]), r"y_true has shape \(1, 2\) and y_score \(1, 3\)"),
        (lambda: average_precision([0, 2], [0, 1]), r"pos_label 1 is not one of the labels \[0, 2\]"),
        (lambda: average_precision(["a", "a"], [0, 1]), r"pos_label 1 is not one of the labels \['a'\]"),
        (lambda: average_precision(*THREE, pos_label=2), "pos_label 2 is of two classes, and y_score"),
        (lambda: average_precision([0, 1], [[0.5, 0.5]] * 2), "a column for each of two classes"),
        (lambda: average_precision(THREE[0], THREE[1][:, :2]), r"y_true has 3 classes, .* are of 2"),
        (lambda: top_k_accuracy(*THREE, k=0), "k is 0; give a whole number of at least 1"),
        (lambda: top_k_accuracy(*THREE, k=True), "k is True; give a whole number of at least 1"),
        (lambda: top_k_accuracy(*THREE, k=1.5), "k is 1.5; give a whole number of at least 1"),
        (lambda: top_k_accuracy(*MANY), "this score is of rows with one label"),
        (lambda: top_k_accuracy([0, 0], [0.1, 0.2]), r"y_true has 1 classes, \[0\], and the scores are of 2"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
