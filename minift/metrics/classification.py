"""Scores of each label and their means: precision, recall, specificity, F, Jaccard, and the report.

    P = right / predicted,   R = right / true,   F_beta = (1 + beta^2) P R / (beta^2 P + R)
    average: "macro"    the mean over labels
             "weighted" the mean over labels, weighted by `true`
             "micro"    the score of the sums over labels
             "binary"   the score of the label `pos_label`
             "samples"  the mean over rows, each scored over its labels (matrices of 0 and 1 only)
             None       the score of each label

The mean is "macro" where nothing is said (scikit-learn's default is "binary"). `pos_label` belongs to
"binary" alone; with another average it is ignored, with a warning. `labels` chooses the labels that take
part, and their order; by default those that occur, sorted. A score without a denominator is `zero_division`:
0 with a warning where it is not given, else that value without one; nan leaves the label out of the mean.
Source: Sokolova and Lapalme 2009, table 3; names, arguments and conventions of scikit-learn.
"""

import numpy as np

from minift.metrics.checks import choice, warn
from minift.metrics.confusion import confusion, places
from minift.metrics.multilabel import LabelCounts

AVERAGES = ("binary", "micro", "macro", "weighted", "samples", None)


class Unsaid(float):
    """A default that warns where it is used."""


ZERO = Unsaid(0.0)


def precision(y_true, y_pred, average="macro", labels=None, zero_division: float = ZERO, pos_label=1):
    """Of the rows predicted as a label, the share that has it.

    P = right / predicted

    Range: 0 to 1, higher is better.
    Use: when a false alarm is what costs.
    Lies: predicting a label once, rightly, scores 1; look at `recall` beside it.
    Source: scikit-learn's precision_score.

    >>> precision([1, 1, 0, 0], [1, 0, 0, 0], average=None).tolist()
    [0.6666666666666666, 1.0]
    """
    return _score(y_true, y_pred, _precision, "precision", average, labels, zero_division, pos_label)


def recall(y_true, y_pred, average="macro", labels=None, zero_division: float = ZERO, pos_label=1):
    """Of the rows that have a label, the share that was predicted so; also sensitivity, true positive rate.

    R = right / true

    Range: 0 to 1, higher is better.
    Use: when a miss is what costs.
    Lies: predicting the label always scores 1; look at `precision` or `specificity` beside it.
    Source: scikit-learn's recall_score.

    >>> recall([1, 1, 0, 0], [1, 0, 0, 0], average="binary")
    0.5
    """
    return _score(y_true, y_pred, _recall, "recall", average, labels, zero_division, pos_label)


def specificity(y_true, y_pred, average="macro", labels=None, zero_division: float = ZERO, pos_label=1):
    """Of the rows that do not have a label, the share that was not predicted so; the true negative rate.

    specificity = (n - true - predicted + right) / (n - true)

    Range: 0 to 1, higher is better.
    Use: beside `recall`, where false alarms burden the negatives.
    Lies: with many classes every label is rare, and it is near 1 whatever is predicted.
    Source: Yerushalmy 1947; Sokolova and Lapalme 2009, table 2.

    >>> specificity([1, 1, 0, 0], [1, 1, 1, 0], average="binary")
    0.5
    """
    return _score(y_true, y_pred, _specificity, "specificity", average, labels, zero_division, pos_label)


def f1(y_true, y_pred, average="macro", labels=None, zero_division: float = ZERO, pos_label=1):
    """The harmonic mean of precision and recall.

    F1 = 2 P R / (P + R) = 2 right / (true + predicted)

    Range: 0 to 1, higher is better.
    Use: one positive class among many negatives; "macro" when small classes matter as much as large ones.
    Lies: true negatives do not count; "micro" over all labels is the accuracy; a mean over labels depends on
    which labels are named, so absent ones (`labels`, `zero_division`) move it.
    Source: van Rijsbergen 1979, "Information Retrieval", chapter 7; scikit-learn's f1_score.

    >>> f1([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1], average=None, zero_division=0.0).tolist()
    [0.8, 0.0, 0.0]
    """
    return fbeta(y_true, y_pred, 1.0, average, labels, zero_division, pos_label)


def fbeta(y_true, y_pred, beta: float, average="macro", labels=None, zero_division=ZERO, pos_label=1):
    """A mean of precision and recall in which recall weighs beta times as much.

    F = (1 + b^2) P R / (b^2 P + R) = (1 + b^2) right / (b^2 true + predicted)

    Range: 0 to 1, higher is better; b = 0 is precision, b = infinity recall.
    Use: when a miss costs b times what a false alarm does.
    Lies: as `f1`; and scores of different b do not compare.
    Source: van Rijsbergen 1979, "Information Retrieval", chapter 7; scikit-learn's fbeta_score.

    >>> round(fbeta([1, 1, 0, 0], [1, 0, 0, 0], beta=2, average="binary"), 4)
    0.5556
    """
    if not (0 <= beta < 1e100 or beta == float("inf")):
        raise ValueError(f"beta {beta!r} must be from 0 to 1e100, or infinite")
    beta = float(beta)
    if beta == float("inf"):
        return _score(y_true, y_pred, _recall, "F", average, labels, zero_division, pos_label)

    def parts(right, true, predicted, n):
        return (1 + beta**2) * right, beta**2 * true + predicted

    return _score(y_true, y_pred, parts, "F", average, labels, zero_division, pos_label)


def jaccard(y_true, y_pred, average="macro", labels=None, zero_division: float = ZERO, pos_label=1):
    """Intersection over union of the rows that have a label and those predicted so.

    J = right / (true + predicted - right) = F1 / (2 - F1)

    Range: 0 to 1, higher is better.
    Use: sets of labels, spans and masks.
    Lies: it is never above F1 and orders systems as F1 does for one label, but not in means.
    Source: Jaccard 1912; scikit-learn's jaccard_score.

    >>> jaccard([[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1]], average="samples")
    0.75
    """
    return _score(y_true, y_pred, _jaccard, "jaccard", average, labels, zero_division, pos_label)


def hamming_loss(y_true, y_pred) -> float:
    """The share of labels that are wrong.

    loss = 1 - accuracy, or, of matrices, cells with y_pred != y_true / cells

    Range: 0 to 1, lower is better.
    Use: several labels a row, when each counts alone.
    Lies: where most cells are 0, predicting none at all scores close to 0.
    Source: scikit-learn's hamming_loss.

    >>> hamming_loss([[0, 1, 0, 0]], [[0, 0, 0, 0]])
    0.25
    """
    c = confusion(y_true, y_pred)
    right, true, predicted = (int(t.sum()) for t in c.totals())
    if isinstance(c, LabelCounts):
        return (true + predicted - 2 * right) / (c.n * len(c.labels))
    return (true - right) / true


# The numerator and the denominator of a score.
def _precision(right, true, predicted, n):
    return right, predicted


def _recall(right, true, predicted, n):
    return right, true


def _specificity(right, true, predicted, n):
    return n - true - predicted + right, n - true


def _jaccard(right, true, predicted, n):
    return right, true + predicted - right


def _score(y_true, y_pred, parts, name: str, average, labels, zero_division, pos_label):
    """The scores of `parts` over labels, averaged."""
    choice(average, AVERAGES, "average")
    check_zero_division(zero_division)
    c = confusion(y_true, y_pred)
    if average == "binary":
        labels = _binary(c, pos_label)
    elif pos_label not in (None, 1):
        warn(f"pos_label {pos_label!r} is for average='binary' and is ignored with {average!r}")
    counts = _chosen(c, labels)
    if average == "samples":
        return _samples(c, parts, name, labels, zero_division)
    return averaged(parts, name, *counts, c.n, average, zero_division, "labels")


def averaged(parts, name: str, right, true, predicted, n, average, zero_division: float, of: str):
    """The scores of `parts` of each of the counts, which are of labels or of other kinds (`of`), averaged."""
    if average == "micro":
        n = n * len(right)
        right, true, predicted = (t.sum(keepdims=True) for t in (right, true, predicted))
    scores = _divide(*parts(right, true, predicted, n), zero_division, name, of)
    if average is None:
        return scores
    return _mean(scores, true if average == "weighted" else None)


def _chosen(c, labels) -> list[np.ndarray]:
    """right, true, predicted of the labels that take part."""
    if labels is None:
        return list(c.totals())
    place, size = places(c, labels)
    if isinstance(c, LabelCounts) and (place >= 0).sum() < size:
        raise ValueError(f"labels {labels} must be columns, 0 to {len(c.labels) - 1}")
    chosen = []
    for counts in c.totals():
        chosen.append(np.zeros(size, np.int64))
        chosen[-1][place[place >= 0]] = counts[place >= 0]
    return chosen


def _binary(c, pos_label) -> list:
    if isinstance(c, LabelCounts) or len(c.labels) > 2:
        kind = (
            "several labels a row" if isinstance(c, LabelCounts) else f"the labels {c.labels[:10].tolist()}"
        )
        raise ValueError(f"average='binary' needs two labels, and the rows have {kind}; give another average")
    if pos_label not in c.labels.tolist() and len(c.labels) == 2:
        raise ValueError(f"pos_label {pos_label!r} is not one of the labels {c.labels.tolist()}")
    return [pos_label]


def check_zero_division(value) -> None:
    if not (isinstance(value, (int, float)) and (value in (0, 1) or value != value)):
        raise ValueError(f"zero_division {value!r} is not 0, 1 or nan")


def _divide(over: np.ndarray, under: np.ndarray, zero_division: float, name: str, of: str) -> np.ndarray:
    empty = under == 0
    if empty.any() and isinstance(zero_division, Unsaid):
        warn(
            f"{name} has no denominator in {int(empty.sum())} of {len(empty)} {of} and is taken as 0 there; "
            "zero_division chooses another value"
        )
    return np.where(empty, float(zero_division), over / np.where(empty, 1, under))


def _mean(scores: np.ndarray, weights) -> float:
    """The mean of the scores that are numbers; without weights where these are all 0."""
    known = ~np.isnan(scores)
    if not known.any():
        return float("nan")
    if weights is None or not weights[known].any():
        return float(scores[known].mean())
    return float((scores[known] * weights[known]).sum() / weights[known].sum())


def _samples(c, parts, name: str, labels, zero_division: float) -> float:
    if not isinstance(c, LabelCounts) or labels is not None:
        raise ValueError(
            "average='samples' needs matrices (rows, labels) of 0 and 1; give the columns of the labels meant"
        )
    triples, count = c.each_row()
    scores = _divide(*parts(*triples.T, len(c.labels)), zero_division, name, "kinds of rows")
    return _mean(scores, count)
