"""Every metric of STREAMS over batches is the metric of all rows, to the bit, in any split and any order."""

import copy
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from minift.metrics import MetricWarning
from minift.metrics.catalogue import METRICS
from minift.metrics.streaming import STREAMS, State

label = st.integers(0, 3)
bit = st.integers(0, 1)
number = st.floats(-1e6, 1e6)
share = st.floats(0, 1)
text = st.lists(st.sampled_from(["the", "cat", "sat", "on.", "a", "mats", "éa", "9"]), max_size=7).map(
    " ".join
)
distribution = st.lists(st.integers(1, 9), min_size=4, max_size=4).map(lambda p: [x / sum(p) for x in p])
tags = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), min_size=1, max_size=6)
sides = st.integers(1, 6).flatmap(
    lambda n: st.tuples(*2 * [st.lists(tags.map(lambda t: t[0]), min_size=n, max_size=n)])
)
rating = st.none() | st.integers(1, 5)
name = st.sampled_from("abcd")
duel = st.permutations(["a", "b"]).flatmap(
    lambda pair: st.tuples(*map(st.just, pair), st.sampled_from(["win", "tie"]))
)
attempts = st.integers(3, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))

# What a row of each kind is, and the settings its metrics are tried with.
LABELS, SCORES, NUMBERS, TEXTS = (
    st.tuples(label, label),
    st.tuples(bit, number),
    st.tuples(number, number),
    st.tuples(text, text),
)
CASES = {
    (
        "confusion_matrix",
        "accuracy",
        "balanced_accuracy",
        "matthews_corrcoef",
        "hamming_loss",
        "classification_report",
    ): [(LABELS, {})],
    ("precision", "recall", "specificity", "f1", "jaccard"): [
        (LABELS, {"average": average}) for average in ("macro", "micro", "weighted", None)
    ],
    ("fbeta",): [(LABELS, {"beta": 2.0}), (LABELS, {"beta": 0.5, "average": None})],
    ("cohen_kappa",): [(LABELS, {}), (LABELS, {"weights": "quadratic"})],
    ("roc_auc",): [
        (SCORES, {}),
        (st.tuples(label, distribution), {"labels": [0, 1, 2, 3], "multi_class": "ovo"}),
        (st.tuples(label, distribution), {"labels": [0, 1, 2, 3]}),
    ],
    ("average_precision", "roc_curve", "precision_recall_curve"): [(SCORES, {})],
    ("top_k_accuracy",): [(st.tuples(label, distribution), {"labels": [0, 1, 2, 3], "k": 2})],
    ("log_loss",): [
        (st.tuples(bit, share), {"labels": [0, 1]}),
        (st.tuples(label, distribution), {"labels": [0, 1, 2, 3]}),
    ],
    ("brier", "expected_calibration_error", "reliability_curve"): [(st.tuples(bit, share), {"pos_label": 1})],
    ("entity_precision", "entity_recall", "entity_f1", "entity_report"): [(sides, {})],
    ("mse", "rmse", "mae", "r2", "pearson", "spearman", "paired_difference"): [(NUMBERS, {})],
    ("mcnemar",): [(st.tuples(bit, bit), {})],
    ("fleiss_kappa",): [(st.tuples(st.permutations([2, 3, 0])), {})],
    ("bleu", "chrf", "ter", "meteor", "exact_match", "token_f1", "word_error_rate", "character_error_rate"): [
        (TEXTS, {})
    ],
    ("rouge",): [(TEXTS, {"use_stemmer": True}), (TEXTS, {"per_row": False, "variants": ("rougeL",)})],
    ("distinct_n",): [(st.tuples(text), {"n": 2})],
    ("cross_entropy", "perplexity", "bits_per_byte", "bits_per_character"): [
        (st.tuples(st.floats(0, 50), st.integers(1, 9)), {})
    ],
    ("group_rates", "demographic_parity_difference", "equalized_odds_difference", "worst_group_accuracy"): [
        (st.tuples(bit, bit, st.sampled_from("ab")), {})
    ],
    ("krippendorff_alpha",): [
        (st.tuples(rating, rating, rating), {"level": level}) for level in ("nominal", "interval")
    ],
    ("win_rate",): [(st.tuples(st.sampled_from(["win", "tie", "loss"])), {})],
    ("bradley_terry",): [(duel, {})],
    ("pass_at_k",): [(attempts, {"k": 2})],
    ("maj_at_k",): [(st.tuples(st.lists(name, min_size=3, max_size=3), name), {})],
}
CASES = {name: cases for names, cases in CASES.items() for name in names}
WHOLE = {  # where the rows are one argument
    "krippendorff_alpha": lambda rows: ([list(coder) for coder in zip(*rows, strict=True)],),
    "bradley_terry": lambda rows: (rows,),
}


def columns(rows) -> tuple:
    return tuple(map(list, zip(*rows, strict=True)))


def quietly(call):
    """The result; rows that make no score are drawn anew, and of degenerate ones the warning is not asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except ValueError:
            reject()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (float, np.ndarray)):
        return np.array_equal(a, b, equal_nan=True)
    return a == b


def test_every_metric_over_batches_is_tried():
    assert {metric.__name__ for metric in STREAMS} == set(CASES)
    assert all(metric.__name__ in METRICS for metric in STREAMS)


@pytest.mark.parametrize(
    "metric, row, options",
    [(metric, *case) for metric in STREAMS for case in CASES.get(metric.__name__, [])],
    ids=lambda value: getattr(value, "__name__", None) or (str(value) if isinstance(value, dict) else ""),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_batches_in_any_order_give_the_score_of_all_rows(metric, row, options, data):
    rows, arguments = data.draw(st.lists(row, min_size=1, max_size=12)), WHOLE.get(metric.__name__, columns)
    expected = quietly(lambda: metric(*arguments(rows), **options))
    shuffled = data.draw(st.permutations(rows))
    cuts = (
        [0, *sorted(data.draw(st.sets(st.integers(1, len(rows) - 1), max_size=4))), len(rows)]
        if len(rows) > 1
        else [0, 1]
    )
    states = [State(metric, **options), State(metric, **options)]
    for i, (start, stop) in enumerate(pairwise(cuts)):
        states[i % 2].update(*arguments(shuffled[start:stop]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = states[1].merge(states[0]).compute()
    assert same(found, expected)


def test_a_state_that_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"wilson has no statistics that add, as .* have \(STREAMS has all\)"
    ):
        State(METRICS["wilson"])
    with pytest.raises(ValueError, match="'f1' is no metric; give the function, as minift.metrics.f1"):
        State("f1")
    with pytest.raises(TypeError, match="averages"):
        State(METRICS["f1"], averages="macro")
    with pytest.raises(ValueError, match="the state of f1 has seen no rows"):
        State(METRICS["f1"]).compute()
    with pytest.raises(ValueError, match="does not merge with one of f1 with {'average': 'micro'}"):
        State(METRICS["f1"]).merge(State(METRICS["f1"], average="micro"))


def test_settings_that_are_arrays_merge_where_they_are_equal():
    one, other = (State(METRICS["f1"], labels=np.array([0, 1])).update([0, 1], [0, 0]) for _ in range(2))
    assert one.merge(copy.deepcopy(other)).compute() == METRICS["f1"]([0, 1], [0, 0])


def test_a_warning_stands_at_the_line_of_the_caller():
    for metric, rows in (("precision", ([1, 1], [0, 0])), ("roc_auc", ([1, 1], [0.2, 0.3]))):
        with pytest.warns(MetricWarning) as seen:
            METRICS[metric](*rows)
        assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize("metric", ["f1", "roc_curve"])
def test_batches_of_other_kinds_of_labels_do_not_add(metric):
    scores = {"f1": ([0, 1], ["a", "b"]), "roc_curve": ([0.1, 0.2], [0.1, 0.2])}[metric]
    state = State(METRICS[metric]).update([0, 1], scores[0])
    with pytest.raises(ValueError, match="one batch has labels as .*0.* and another as .*'a'"):
        state.update(["a", "b"], scores[1])


def test_the_caller_may_fill_its_arrays_anew():
    y, score, labels = np.array([0, 1]), np.array([0.1, 0.9]), [0, 1]
    state, matrix = State(METRICS["roc_auc"]), State(METRICS["confusion_matrix"], labels=labels)
    state.update(y, score)
    matrix.update(y, y)
    score[:], y[:] = -score, 1
    labels.append(2)
    assert state.compute() == 1 and matrix.compute().tolist() == [[1, 0], [0, 1]]


def test_settings_do_not_come_with_the_rows():
    with pytest.raises(ValueError, match="brier takes 2 arguments for rows, not 3; settings go to State"):
        State(METRICS["brier"]).update([0, 1], [0.2, 0.3], 0)
    state = State(METRICS["f1"]).update([0, 1], [0, 1])
    with pytest.raises(ValueError, match="this batch does not add to those before it"):
        state.update([[0, 1]], [[0, 1]])
    assert state.compute() == 1


def test_nan_among_the_settings_merges():
    one, other = (State(METRICS["f1"], zero_division=float("nan")).update([0, 1], [0, 1]) for _ in range(2))
    assert one.merge(copy.deepcopy(other)).compute() == 1
