"""How a classifier treats groups of rows: rates of each group, and how far apart they are.

    of the rows of a group:  selection rate       = predicted positive / rows
                             true positive rate   = rightly predicted positive / positive
                             false positive rate  = wrongly predicted positive / negative

A row is positive when its label is `pos_label`, whatever the other labels are. A group is named by one value
for each row; for groups by two attributes join their values.
Source: Hardt, Price and Srebro 2016, "Equality of opportunity in supervised learning"; names and order of
arguments of fairlearn, whose `sensitive_features` are our `groups`.
"""

import math
from collections import Counter

import numpy as np

from minift.metrics.checks import label_rows, labels, same_rows, warn
from minift.metrics.totals import Totals


def group_rates(y_true, y_pred, groups, pos_label=1) -> dict:
    """Rows, accuracy, selection rate, true and false positive rate of each group, sorted by its name.

    selection rate = predicted positive / rows,   TPR = rightly predicted positive / positive,
    FPR = wrongly predicted positive / negative

    A group without positive rows has no true positive rate, one without negative rows no false
    positive rate: nan, with a warning that names it.
    Range: 0 to 1.
    Use: before any single number about fairness.
    Lies: the rate of a group of ten rows is mostly luck; look at `rows`, and at `wilson`.
    Source: the module's; fairlearn's MetricFrame.

    >>> group_rates([1, 0, 1, 0], [1, 1, 0, 0], ["a", "a", "b", "b"])["a"]
    {'rows': 2, 'accuracy': 0.5, 'selection_rate': 1.0, 'true_positive_rate': 1.0, 'false_positive_rate': 1.0}
    """
    counts = group_counts(y_true, y_pred, groups, pos_label)
    names = sorted(counts[0])
    columns = {
        "rows": [counts[0][name] for name in names],
        "accuracy": _rates(counts, _accuracy),
        "selection_rate": _rates(counts, _selection),
        "true_positive_rate": _rates(counts, _true_positive, "true positive rate"),
        "false_positive_rate": _rates(counts, _false_positive, "false positive rate"),
    }
    rows = zip(*columns.values(), strict=True)
    return {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def demographic_parity_difference(y_true, y_pred, groups, pos_label=1) -> float:
    """The largest difference between two groups' selection rates; the truth does not enter.

    difference = max over groups of (predicted positive / rows) - min over groups

    0 with a warning where there is one group, or no row is predicted positive.
    Range: 0 to 1; 0 where all groups are selected alike.
    Use: when the same share of every group should be selected, whatever their labels.
    Lies: random selection scores 0; small groups raise it by luck, and more groups do.
    Source: Dwork et al. 2012, "Fairness through awareness", section 3.2; fairlearn.

    >>> demographic_parity_difference([0, 1, 0, 1], [1, 1, 1, 0], ["a", "a", "b", "b"])
    0.5
    """
    counts = group_counts(y_true, y_pred, groups, pos_label)
    _compared(counts)
    if not counts[3].total():
        warn(
            f"no row is predicted as {pos_label!r}, so all selection rates are 0; `pos_label` names the label"
        )
    return _gap(counts, _selection)


def equalized_odds_difference(y_true, y_pred, groups, pos_label=1) -> float:
    """The largest difference between two groups' true positive rates, or their false positive rates.

    difference = max(max TPR - min TPR, max FPR - min FPR), over groups

    A group without positive rows has no TPR and is left out of it, one without negative rows out of FPR,
    with a warning that names it; 0 with a warning where there is one group.
    Range: 0 to 1; 0 where errors fall on all groups alike.
    Use: when the labels can be trusted, and the same mistakes should hit every group as often.
    Lies: where labels carry an old bias, repeating it scores 0; small groups raise it by luck.
    Source: Hardt, Price and Srebro 2016, definition 2.1; fairlearn, agg="worst_case", which counts a rate of
    no rows as 0.

    >>> equalized_odds_difference([1, 0, 1, 0], [1, 0, 1, 1], ["a", "a", "b", "b"])
    1.0
    """
    counts = group_counts(y_true, y_pred, groups, pos_label)
    _compared(counts)
    parts = (_true_positive, "true positive rate"), (_false_positive, "false positive rate")
    gaps = [_gap(counts, *part) for part in parts]
    return max(gap for gap in gaps if not math.isnan(gap))


def worst_group_accuracy(y_true, y_pred, groups) -> float:
    """The accuracy of the group where it is lowest.

    accuracy = min over groups of right / rows

    Range: 0 to 1, higher is better.
    Use: groups that a shortcut in the data helps or hurts, as label by background.
    Lies: it is the score of few rows, so its interval is wide (`wilson`); a group no one named is not seen.
    Source: Sagawa et al. 2020, "Distributionally robust neural networks for group shifts", section 2.

    >>> worst_group_accuracy([1, 0, 1, 0], [1, 0, 1, 1], ["a", "a", "b", "b"])
    0.5
    """
    return min(_rates(group_right(y_true, y_pred, groups), _accuracy))


def group_right(y_true, y_pred, groups) -> Totals:
    """rows, right: Counters of groups."""
    if isinstance(y_true, Totals):
        return y_true
    y_true, y_pred, groups = _three(y_true, y_pred, groups)
    return Totals(*(_count(groups, rows) for rows in (np.full(len(groups), True), y_true == y_pred)))


def group_counts(y_true, y_pred, groups, pos_label=1) -> Totals:
    """rows, right, positive, selected, and rows that are both: Counters of groups."""
    if isinstance(y_true, Totals):
        return y_true
    y_true, y_pred, groups = _three(y_true, y_pred, groups)
    if isinstance(pos_label, str) != (y_true.dtype.kind == "U"):
        raise ValueError(
            f"pos_label {pos_label!r} is of another kind than the labels, as {y_true[0].item()!r}"
        )
    positive, selected = y_true == pos_label, y_pred == pos_label
    masks = (np.full(len(groups), True), y_true == y_pred, positive, selected, positive & selected)
    return Totals(*(_count(groups, mask) for mask in masks))


def _three(y_true, y_pred, groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y_true, y_pred = label_rows(y_true, y_pred)
    groups = labels(groups, "groups")
    same_rows(y_true, groups, ("y_true", "groups"))
    return y_true, y_pred, groups


def _count(groups: np.ndarray, mask: np.ndarray) -> Counter:
    """The rows of each group where the mask holds."""
    names, rows = np.unique(groups[mask], return_counts=True)
    return Counter(dict(zip(names.tolist(), rows.tolist(), strict=True)))


# The numerator and the denominator of a rate.
def _accuracy(rows, right, *_):
    return right, rows


def _selection(rows, right, positive, selected, both):
    return selected, rows


def _true_positive(rows, right, positive, selected, both):
    return both, positive


def _false_positive(rows, right, positive, selected, both):
    return selected - both, rows - positive


def _rates(counts: Totals, parts, name: str = "") -> list[float]:
    """The rate of each group, sorted by its name; nan where it has no denominator."""
    rates, without = [], []
    for group in sorted(counts[0]):
        over, under = parts(*(count[group] for count in counts))
        rates.append(over / under if under else math.nan)
        without += [] if under else [group]
    if without:
        which = f"group{'s' * (len(without) > 1)} {', '.join(map(repr, without))}"
        rows = "positive" if parts is _true_positive else "negative"
        warn(f"{which} without {rows} rows: the {name} is undefined, and left out of comparisons")
    return rates


def _gap(counts: Totals, parts, name: str = "") -> float:
    """The largest rate less the smallest; nan where no group has one."""
    known = [rate for rate in _rates(counts, parts, name) if not math.isnan(rate)]
    return max(known) - min(known) if known else math.nan


def _compared(counts: Totals) -> None:
    if len(counts[0]) == 1:
        warn(f"all rows are of the group {next(iter(counts[0]))!r}, so there is nothing to compare: 0")
