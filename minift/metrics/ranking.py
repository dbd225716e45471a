"""How well scores rank the rows: areas under curves, and whether the right class is among the first.

A row's label is one of two classes and its score a number (vectors), one of several with a score for each
(y_score a matrix (rows, classes)), or several of them at once (both matrices (rows, labels), y_true of 0 and
1). Matrices are scored column by column and averaged:

    average: "macro"    the mean over columns
             "weighted" the mean over columns, weighted by their positive rows
             "micro"    the score of all cells as one column
             "samples"  the mean over rows, each scored over its cells
             None       the score of each column

Scores keep their dtype; only their order counts, so all is counted in integers until the last division.
"""

from itertools import combinations

import numpy as np

from minift.metrics.checks import choice, warn, whole
from minift.metrics.columns import classes, one_label, positives, scored, two_columns_are_refused
from minift.metrics.curves import counts
from minift.metrics.exact import mean, total

AVERAGES = ("micro", "macro", "weighted", "samples", None)
OF_CLASSES = {"ovr": ("micro", "macro", "weighted", None), "ovo": ("macro", "weighted")}
SUM_TOLERANCE = 1e-5 + 1e-8  # of rows of probabilities, as numpy's allclose has it


def roc_auc(y_true, y_score, multi_class="ovr", average="macro", labels=None):
    """The share of pairs of a positive and a negative row in which the positive scores higher.

    AUC = (pairs in order + pairs tied / 2) / (positive rows x negative rows)

    which is the area under `roc_curve`. Of two classes the greater label is positive. Of several, "ovr" takes
    each class against the rest; "ovo" is the mean over pairs of classes of the mean of both AUCs between
    these two, "weighted" by the pair's rows; rows of scores must then sum to 1. `labels` names the columns'
    classes. Where a column has one class only, its AUC is nan, with a warning.
    Range: 0 to 1, higher is better; 0.5 is chance.
    Use: to compare rankings without a threshold.
    Lies: with 1 positive in 1000 rows it can be 0.99 while of the first hundred rows two are positive; and
    it says nothing of whether 0.9 means 90 %. Beside it belong `average_precision` and a calibration error.
    Source: Hanley and McNeil 1982, "The meaning and use of the area under a ROC curve"; Hand and Till 2001,
    "A simple generalisation of the area under the ROC curve" (ovo, macro); scikit-learn's roc_auc_score.

    >>> roc_auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    choice(multi_class, OF_CLASSES, "multi_class")
    choice(average, AVERAGES, "average")
    truth, score = scored(y_true, y_score)
    if truth.ndim == 2:
        return _average(_area, truth, score, average, "roc_auc", float("nan"))
    if score.ndim == 1:
        found = np.unique(truth) if labels is None else classes(truth, 2, labels)
        return _one(_area(positives(truth, found[-1]), score), "roc_auc", float("nan"))
    two_columns_are_refused(truth, score)
    choice(average, OF_CLASSES[multi_class], f"average, of classes with multi_class {multi_class!r},")
    found = classes(truth, score.shape[1], labels)
    _sum_to_one(score)
    if multi_class == "ovo":
        return _one_against_one(np.searchsorted(found, truth), score, average)
    return _average(_area, truth[:, None] == found, score, average, "roc_auc", float("nan"))


def average_precision(y_true, y_score, average="macro", pos_label=1):
    """The mean of the precisions at which another positive row is found, going down the ranking.

    AP = sum over thresholds, from the highest, of (R_k - R_(k-1)) P_k

    with R and P of `precision_recall_curve`; no interpolation. `pos_label` is of two classes. Of several,
    columns are of the classes that occur, sorted, each against the rest. Without positive rows it is 0, with
    a warning.
    Range: 0 to 1, higher is better; chance is the share of positive rows.
    Use: rare positives, search results.
    Lies: it rises with the share of positives, so scores of different data do not compare; it is not the
    trapezoid area under the curve, which is larger.
    Source: Zhu 2004, "Recall, precision and average precision"; scikit-learn's average_precision_score.

    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    choice(average, AVERAGES, "average")
    truth, score = scored(y_true, y_score)
    if truth.ndim == 1 and score.ndim == 1:
        return _one(_precision(positives(truth, pos_label), score), "average_precision", 0.0)
    if pos_label != 1:
        raise ValueError(f"pos_label {pos_label!r} is of two classes, and y_score has columns; leave it out")
    if truth.ndim == 1:
        two_columns_are_refused(truth, score)
        truth = truth[:, None] == classes(truth, score.shape[1])
    return _average(_precision, truth, score, average, "average_precision", 0.0)


def top_k_accuracy(y_true, y_score, k: int = 2, labels=None) -> float:
    """The share of rows whose class is among the k that score highest.

    top_k = rows with rank of the true class <= k / rows

    where the rank counts the classes that score higher, and among equal scores those that come later in
    order. `labels` names the columns' classes where some have no rows. A vector of scores is of the greater
    of two classes, predicted above 0.5, or above 0 where not all scores lie between 0 and 1. With k at least
    the number of classes it is 1, with a warning.
    Range: 0 to 1, higher is better; chance is k / classes.
    Use: many classes of which several are shown.
    Lies: with 3 classes and k = 2, guessing scores 0.67; scores that are all equal are hits for the last
    classes.
    Source: Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition Challenge", section 4;
    scikit-learn's top_k_accuracy_score and its order of ties.

    >>> top_k_accuracy([0, 1, 2, 2], [[0.5, 0.2, 0.2], [0.3, 0.4, 0.2], [0.2, 0.4, 0.3], [0.7, 0.2, 0.1]])
    0.75
    """
    whole(k, "k")
    truth, score = one_label(scored(y_true, y_score))
    two_columns_are_refused(truth, score)
    found = classes(truth, 2 if score.ndim == 1 else score.shape[1], labels)
    if k >= len(found):
        warn(f"k is {k} and there are {len(found)} classes, so every row is a hit")
        return 1.0
    place = np.searchsorted(found, truth)
    if score.ndim == 1:
        threshold = 0.5 if score.min() >= 0 and score.max() <= 1 else 0
        return int(((score > threshold) == place).sum()) / len(place)
    own = np.take_along_axis(score, place[:, None], axis=1)
    before = (score > own) | ((score == own) & (np.arange(len(found)) > place[:, None]))  # (rows, classes)
    return int((before.sum(axis=1) < k).sum()) / len(place)


def _area(positive: np.ndarray, score: np.ndarray) -> float:
    """AUC; nan without positive or without negative rows."""
    return _pairs(score[positive], score[~positive])


def _pairs(high: np.ndarray, low: np.ndarray) -> float:
    """The share of pairs with high > low, and half of those with high = low."""
    if not (len(high) and len(low)):
        return float("nan")
    high, low = np.sort(high), np.sort(low)  # sorted searches run along; in random order each one jumps
    below = int(np.searchsorted(low, high, "left").sum())
    below_or_tied = int(np.searchsorted(low, high, "right").sum())
    return (below + below_or_tied) / (2 * len(high) * len(low))


def _precision(positive: np.ndarray, score: np.ndarray) -> float:
    """Average precision; nan without positive rows."""
    if not positive.any():
        return float("nan")
    true, false, _ = counts(positive, score)
    return float((np.diff(true, prepend=0) * (true / (true + false))).sum() / true[-1])


def _one(value: float, name: str, undefined: float) -> float:
    return float(_known(np.array([value]), name, undefined)[0])


def _known(values: np.ndarray, name: str, undefined: float) -> np.ndarray:
    """The values, those that are nan replaced with a warning."""
    if (lacking := np.isnan(values)).any():
        least = "no positive rows" if undefined == 0 else "rows of one class only"
        where = f" in {lacking.sum()} of {len(values)} parts" if len(values) > 1 else ""
        warn(f"y_true has {least}{where}, so {name} is {undefined} there")
    return np.where(lacking, undefined, values)


def _average(metric, truth: np.ndarray, score: np.ndarray, average, name: str, undefined: float):
    """`metric` of the columns, or of the rows, averaged."""
    if average == "micro":
        return _one(metric(truth.ravel(), score.ravel()), name, undefined)
    weights = truth.sum(axis=0)
    if average == "weighted" and not weights.any():
        return 0.0
    pairs = zip(truth, score, strict=True) if average == "samples" else zip(truth.T, score.T, strict=True)
    values = _known(np.array([metric(*pair) for pair in pairs]), name, undefined)
    if average is None:
        return values
    if average == "weighted":
        return float((np.where(weights > 0, values, 0) * weights).sum() / weights.sum())
    if np.isnan(values).any():
        return float("nan")
    return mean(total(values), len(values))


def _one_against_one(place: np.ndarray, score: np.ndarray, average) -> float:
    """The mean over pairs of classes that have rows."""
    own = {c: score[place == c] for c in np.unique(place).tolist()}  # class -> (its rows, classes)
    if len(own) == 1:
        return _one(float("nan"), "roc_auc", float("nan"))
    areas, weights = [], []
    for a, b in combinations(own, 2):
        areas.append((_pairs(own[a][:, a], own[b][:, a]) + _pairs(own[b][:, b], own[a][:, b])) / 2)
        weights.append(len(own[a]) + len(own[b]) if average == "weighted" else 1)
    return float(np.dot(areas, weights) / sum(weights))


def _sum_to_one(score: np.ndarray) -> None:
    sums = score.sum(axis=1, dtype=np.float64)
    if (wrong := np.abs(sums - 1) > SUM_TOLERANCE).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"y_score[{row}] sums to {sums[row]:g}; classes are compared within a row of probabilities that "
            "sum to 1, so give these, as softmax does"
        )
