"""Rates of groups and how far apart they are: by hand, laws, and what is refused."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, State, accuracy, fairness
from minift.metrics.fairness import (
    demographic_parity_difference,
    equalized_odds_difference,
    group_counts,
    group_rates,
    worst_group_accuracy,
)

# Group a: true positives, false positives, misses, true negatives 2, 1, 1, 4; b: 1, 2, 3, 2; c: 1, 0, 0, 3.
CELLS = {"a": (2, 1, 1, 4), "b": (1, 2, 3, 2), "c": (1, 0, 0, 3)}
ROWS = [
    (truth, said, group)
    for group, cells in CELLS.items()
    for (truth, said), n in zip([(1, 1), (0, 1), (1, 0), (0, 0)], cells, strict=True)
    for _ in range(n)
]
rows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from("abc")), min_size=1, max_size=30
)


def columns(some) -> list[list]:
    return [list(column) for column in zip(*some, strict=True)]


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetricWarning)
        return call()


def check_by_hand(module):
    three = columns(ROWS)
    rates = module.group_rates(*three)
    assert rates == {
        "a": dict(zip(rates["a"], (8, 6 / 8, 3 / 8, 2 / 3, 1 / 5), strict=True)),
        "b": dict(zip(rates["a"], (8, 3 / 8, 3 / 8, 1 / 4, 2 / 4), strict=True)),
        "c": dict(zip(rates["a"], (4, 1.0, 1 / 4, 1.0, 0.0), strict=True)),
    }
    names = ["rows", "accuracy", "selection_rate", "true_positive_rate", "false_positive_rate"]
    assert list(rates["a"]) == names
    assert module.demographic_parity_difference(*three) == 1 / 8
    assert module.equalized_odds_difference(*three) == 3 / 4
    assert module.worst_group_accuracy(*three) == 3 / 8
    assert [own["selection_rate"] for own in module.group_rates(*three, 0).values()] == [5 / 8, 5 / 8, 3 / 4]
    assert module.equalized_odds_difference([0, 0, 1, 1], [1, 0, 1, 1], list("abab")) == 1


def test_rates_by_hand():
    check_by_hand(fairness)


MUTANTS = [
    ("return right, rows", "return right + 1, rows"),
    ("return selected, rows", "return positive, rows"),
    ("return both, positive", "return both, selected"),
    ("return selected - both, rows - positive", "return selected - both, rows"),
    ("return selected - both, rows - positive", "return selected, rows - positive"),
    ("max(known) - min(known)", "max(known)"),
    ("return max(gap for gap", "return min(gap for gap"),
    ("return min(_rates(group_right", "return max(_rates(group_right"),
    ("y_true == pos_label, y_pred == pos_label", "y_true == 1, y_pred == 1"),
    ("positive & selected)", "positive | selected)"),
    ("np.unique(groups[mask], return", "np.unique(groups, return"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_by_hand, fairness, old, new)


@given(rows)
def test_a_groups_rates_are_those_of_its_rows_alone(some):
    rates = silent(lambda: group_rates(*columns(some)))
    assert list(rates) == sorted({group for _, _, group in some})
    for group, found in rates.items():
        own = [(t, p) for t, p, g in some if g == group]
        assert found["rows"] == len(own) and found["accuracy"] == accuracy(*columns(own))
        for name, label in (("true_positive_rate", {1}), ("false_positive_rate", {0, 2})):
            said = [p == 1 for t, p in own if t in label]
            assert found[name] == np.mean(said) if said else math.isnan(found[name])
    assert silent(lambda: worst_group_accuracy(*columns(some))) == min(r["accuracy"] for r in rates.values())


@given(rows, st.permutations("abc"))
def test_names_of_groups_and_the_order_of_rows_change_no_difference(some, names):
    renamed = [(t, p, names["abc".index(g)]) for t, p, g in reversed(some)]
    for metric in (demographic_parity_difference, equalized_odds_difference, worst_group_accuracy):
        whole = silent(lambda m=metric: m(*columns(some)))
        assert silent(lambda m=metric: m(*columns(renamed))) == whole
        assert 0 <= whole <= 1
        state = State(metric)
        for i in range(0, len(some), 4):
            state.update(*columns(some[i : i + 4]))
        assert silent(state.compute) == whole


@given(rows)
def test_groups_that_are_treated_alike_have_no_difference(some):
    truth, said, _ = columns(some)
    twice = (truth + truth, said + said, ["a"] * len(some) + ["b"] * len(some))
    assert silent(lambda: demographic_parity_difference(*twice)) == 0
    assert silent(lambda: equalized_odds_difference(*twice)) == 0


def test_a_group_without_positive_rows_is_named_and_left_out():
    three = ([0, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 1], list("aabbcc"))
    with pytest.warns(
        MetricWarning, match="group 'a' without positive rows: the true positive rate is undef"
    ):
        assert equalized_odds_difference(*three) == 0.5
    with pytest.warns(MetricWarning, match="groups 'a', 'b' without negative rows"):
        assert equalized_odds_difference([1, 1, 1, 0], [1, 0, 1, 1], list("abcc")) == 1
    with pytest.warns(MetricWarning, match="group 'a' without positive rows"):
        assert math.isnan(group_rates(*three)["a"]["true_positive_rate"])


def test_one_group_is_compared_with_nothing():
    for metric in (demographic_parity_difference, equalized_odds_difference):
        with pytest.warns(
            MetricWarning, match="all rows are of the group 'a', so there is nothing to compare"
        ):
            assert metric([0, 1], [1, 1], ["a", "a"]) == 0


def test_a_label_that_is_never_predicted_is_named():
    with pytest.warns(MetricWarning, match="no row is predicted as 1, so all selection rates are 0"):
        assert demographic_parity_difference([0, 2], [0, 2], ["a", "b"]) == 0


def test_batches_may_lack_groups_and_labels():
    parts = [group_counts(*columns(ROWS[i : i + 1])) for i in range(len(ROWS))]
    whole = parts[-1]
    for part in parts[:-1]:
        whole = part + whole
    assert whole == group_counts(*columns(ROWS))


@pytest.mark.parametrize("metric", [group_rates, demographic_parity_difference, equalized_odds_difference])
def test_a_label_of_another_kind_is_refused(metric):
    with pytest.raises(ValueError, match="pos_label 1 is of another kind than the labels, as 'yes'"):
        metric(["yes", "no"], ["yes", "no"], ["a", "b"])
    with pytest.raises(ValueError, match="pos_label 'yes' is of another kind than the labels, as 0"):
        metric([0, 1], [0, 1], ["a", "b"], pos_label="yes")
    alike = metric(["yes", "no"] * 2, ["yes", "no"] * 2, ["a", "a", "b", "b"], "yes")
    assert alike == 0 or alike["a"] == alike["b"]


@pytest.mark.parametrize(
    "metric", [group_rates, demographic_parity_difference, equalized_odds_difference, worst_group_accuracy]
)
def test_what_has_no_groups_is_refused(metric):
    for three, sentence in (
        (([0, 1], [0, 1], ["a"]), "y_true has 2 rows and groups 1"),
        (([0, 1], [0], ["a", "b"]), "y_true has 2 rows and y_pred 1"),
        (([], [], []), "y_true is empty"),
        (([0, 1], [0, 1], [1, math.nan]), r"groups\[1\] is nan"),
        (([0, 1], [0, 1], [["a", 1], ["b", 2]]), r"groups has shape \(2, 2\)"),
        (([0, 1], [0, 0.5], ["a", "b"]), r"y_pred\[1\] is 0.5, which is no label"),
    ):
        with pytest.raises(ValueError, match=sentence):
            metric(*three)
