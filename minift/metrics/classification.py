"""Scores of classifiers: accuracy, the confusion matrix, precision, recall, F1, and their intervals.

    accuracy = rows with y_pred = y_true / rows
    of a label: P = right / predicted,   R = right / true,   F1 = 2 P R / (P + R)
    macro: the mean over labels;   weighted: the mean weighted by `true`;   micro: of the counts' sums

Source: Sokolova and Lapalme 2009, "A systematic analysis of performance measures for classification tasks",
table 3. Names, arguments and the labels that a mean runs over are those of scikit-learn.
"""

from math import sqrt

import numpy as np

AVERAGES = ("macro", "micro", "weighted", None)
Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def accuracy(y_true, y_pred) -> float:
    """The share of rows that are right."""
    y_true, y_pred = _rows(y_true, y_pred)
    return float((y_true == y_pred).mean())


def confusion_matrix(y_true, y_pred, labels=None) -> np.ndarray:
    """Entry (i, j): rows of label i that were predicted as label j; int64 (labels, labels).

    `labels` are by default those that occur, sorted; rows with another label are left out.
    """
    y_true, y_pred = _rows(y_true, y_pred)
    labels = _labels(y_true, y_pred, labels)
    order = np.argsort(labels)
    places = []
    for y in (y_true, y_pred):
        at = np.searchsorted(labels[order], y).clip(max=len(labels) - 1)
        places.append(np.where(labels[order][at] == y, order[at], -1))
    known = (places[0] >= 0) & (places[1] >= 0)
    matrix = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(matrix, (places[0][known], places[1][known]), 1)
    return matrix


def precision(y_true, y_pred, average, labels=None, zero_division: float = 0.0):
    """P of the rows, or of each label with average=None; `zero_division` where nothing was predicted."""
    right, true, predicted = _counts(y_true, y_pred, labels)
    return _mean(right, predicted, true, average, zero_division)


def recall(y_true, y_pred, average, labels=None, zero_division: float = 0.0):
    """R, likewise; `zero_division` where nothing is true."""
    right, true, _ = _counts(y_true, y_pred, labels)
    return _mean(right, true, true, average, zero_division)


def f1(y_true, y_pred, average, labels=None, zero_division: float = 0.0):
    """F1, likewise; `zero_division` where nothing is true or predicted."""
    right, true, predicted = _counts(y_true, y_pred, labels)
    return _mean(2 * right, predicted + true, true, average, zero_division)


def wilson(right: int, rows: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share p = right / rows, at 95 % by default:

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= right <= rows or rows < 1:
        raise ValueError(f"{right} of {rows} rows is no share; give 0 <= right <= rows with at least one row")
    p, n = right / rows, rows
    middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if right == 0 else low), (1.0 if right == rows else high)  # exactly, not but for rounding


def paired_difference(a, b, z: float = Z95) -> tuple[float, float, float]:
    """(d, low, high): the mean score `a` minus the mean score `b` on the same n rows, with its interval.

    d = mean(a_i - b_i),   d +- z sqrt(sum((a_i - b_i - d)^2)) / n

    With scores 1 and 0 for right and wrong the sum is n10 + n01 - n d^2, the counts of McNemar's test: rows
    that both have right, or both wrong, tell nothing of the difference. Source: Agresti 2002, "Categorical
    Data Analysis", section 10.1.
    """
    a, b = (np.asarray(scores, dtype=float) for scores in (a, b))
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"a has shape {a.shape} and b {b.shape}; give both a score for each row, in one order"
        )
    d = float((a - b).mean())
    half = z * sqrt(((a - b - d) ** 2).sum()) / len(a)
    return d, d - half, d + half


def _rows(y_true, y_pred) -> tuple[np.ndarray, np.ndarray]:
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    if y_true.shape != y_pred.shape or y_true.ndim != 1 or not len(y_true):
        raise ValueError(
            f"y_true has shape {y_true.shape} and y_pred {y_pred.shape}; give one label for each row, and at "
            "least one row"
        )
    return y_true, y_pred


def _labels(y_true, y_pred, labels) -> np.ndarray:
    if labels is None:
        return np.unique(np.concatenate((y_true, y_pred)))
    found = np.asarray(labels)
    if found.ndim != 1 or not len(found) or len(np.unique(found)) != len(found):
        raise ValueError(f"labels {labels} must be different from each other, and at least one")
    return found


def _counts(y_true, y_pred, labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, true and predicted rows of each label: three vectors (labels,)."""
    y_true, y_pred = _rows(y_true, y_pred)
    hits = [
        ((y_true == x) & (y_pred == x), y_true == x, y_pred == x) for x in _labels(y_true, y_pred, labels)
    ]
    return tuple(np.array([[rows.sum() for rows in hit] for hit in hits]).T)


def _mean(over: np.ndarray, under: np.ndarray, true: np.ndarray, average, zero_division: float):
    """over / under of each label, or their mean; `zero_division` stands where `under` is zero."""
    if average not in AVERAGES:
        raise ValueError(f"average {average!r} is not one of {', '.join(map(str, AVERAGES))}")
    if average == "micro":
        over, under = over.sum(keepdims=True), under.sum(keepdims=True)
    scores = np.where(under > 0, over / np.maximum(under, 1), zero_division)
    if average is None:
        return scores
    if average == "weighted":
        return float((scores * true).sum() / true.sum()) if true.sum() else float(zero_division)
    return float(scores.mean())
