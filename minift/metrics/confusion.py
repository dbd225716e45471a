"""The confusion matrix, counted once, and the scores that are its totals.

    C[i, j] = rows of label i that were predicted as label j
    right_i = C[i, i],   true_i = sum over j of C[i, j],   predicted_j = sum over i of C[i, j],   n = all rows

Every metric here and in classification.py takes a Confusion in place of `y_true`, with y_pred=None.
Source: Sokolova and Lapalme 2009, "A systematic analysis of performance measures for classification tasks".
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from minift.metrics.checks import array_of, choice, label_rows, warn
from minift.metrics.multilabel import LabelCounts, label_counts
from minift.metrics.totals import joined

SPAN = 1 << 10  # labels that are integers this near to each other are counted in a dense matrix
BLOCK = 1 << 13  # rows counted at a time, which bounds memory


@dataclass(frozen=True)
class Confusion:
    """The matrix' entries that are not zero; adding two joins their labels."""

    labels: np.ndarray  # (k,) sorted, those that occur
    true: np.ndarray  # (m,) place of the row's label
    predicted: np.ndarray  # (m,)
    count: np.ndarray  # (m,) int64

    def __add__(self, other: "Confusion") -> "Confusion":
        labels = np.unique(joined(self.labels, other.labels))
        places = [np.searchsorted(labels, part.labels) for part in (self, other)]
        parts = list(zip((self, other), places, strict=True))
        true = np.concatenate([place[part.true] for part, place in parts])
        predicted = np.concatenate([place[part.predicted] for part, place in parts])
        return _sparse(labels, true, predicted, np.concatenate((self.count, other.count)))

    @property
    def n(self) -> int:
        """Rows."""
        return int(self.count.sum())

    @property
    def share_right(self) -> float:
        """Of rows."""
        return int(self.count[self.true == self.predicted].sum()) / self.n

    def totals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """right, true and predicted rows of each label: int64 (k,)."""
        k, same = len(self.labels), self.true == self.predicted
        return (
            _add(self.true[same], self.count[same], k),
            _add(self.true, self.count, k),
            _add(self.predicted, self.count, k),
        )


def confusion(y_true, y_pred) -> Confusion | LabelCounts:
    """The statistics of all metrics of labels; what was counted already stays as it is.

    Vectors of labels give a Confusion, matrices of 0 and 1 give LabelCounts (multilabel.py).
    """
    if isinstance(y_true, (Confusion, LabelCounts)):
        return y_true
    if array_of(y_true, "y_true").ndim == 2:
        return label_counts(y_true, y_pred)
    y_true, y_pred = label_rows(y_true, y_pred)
    if y_true.dtype.kind in "bi" and y_pred.dtype.kind in "bi":
        low = min(int(y_true.min()), int(y_pred.min()))
        span = max(int(y_true.max()), int(y_pred.max())) - low + 1
        if span <= SPAN and span * span <= max(SPAN, 4 * len(y_true)):
            return _dense(y_true, y_pred, low, span)
    parts = []
    for block in _blocks(len(y_true), BLOCK):
        labels, places = np.unique(np.concatenate((y_true[block], y_pred[block])), return_inverse=True)
        true, predicted = np.split(places, 2)
        cells, count = np.unique(true * len(labels) + predicted, return_counts=True)
        parts.append((labels[cells // len(labels)], labels[cells % len(labels)], count))
    true, predicted, count = map(np.concatenate, zip(*parts, strict=True))
    labels, places = np.unique(np.concatenate((true, predicted)), return_inverse=True)
    return _sparse(labels, *np.split(places, 2), count)


def _dense(y_true, y_pred, low: int, span: int) -> Confusion:
    """Counted in span x span cells."""
    matrix = np.zeros(span * span, np.int64)
    for block in _blocks(len(y_true), max(BLOCK, span * span)):
        cell = y_true[block].astype(np.int64)
        cell -= low
        cell *= span
        cell += y_pred[block]
        cell -= low
        matrix += np.bincount(cell, minlength=span * span)
    matrix = matrix.reshape(span, span)
    occur = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    matrix = matrix[np.ix_(occur, occur)]
    true, predicted = np.nonzero(matrix)
    labels = (occur + low).astype(np.result_type(y_true, y_pred))
    return Confusion(labels, true, predicted, matrix[true, predicted])


def _blocks(rows: int, size: int):
    return (slice(start, start + size) for start in range(0, rows, size))


def _sparse(labels, true, predicted, count) -> Confusion:
    cells, place = np.unique(true * len(labels) + predicted, return_inverse=True)
    return Confusion(labels, cells // len(labels), cells % len(labels), _add(place, count, len(cells)))


def _add(places: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """The sum of the counts of each place; int64 (size,)."""
    return np.bincount(places, weights=counts, minlength=size).astype(np.int64)  # exact below 2^53


def confusion_matrix(y_true, y_pred, labels=None, normalize=None) -> np.ndarray:
    """Rows of each label by what they were predicted as.

    C[i, j] = number of rows with y_true = labels[i] and y_pred = labels[j]

    int64 (labels, labels). `labels` are by default those that occur, sorted; rows with a label that is not
    among `labels` are left out. `normalize` "true" divides by the sums of lines, "pred" of columns, "all" of
    the whole; what has no rows is 0.
    Range: 0 to n, or 0 to 1 where normalized; right answers stand on the diagonal.
    Use: first of all, to see which classes are taken for which.
    Lies: with many classes the eye sees the large ones only.
    Source: names, arguments and order of scikit-learn.

    >>> confusion_matrix(["cat", "cat", "dog", "owl"], ["cat", "dog", "dog", "dog"]).tolist()
    [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    """
    choice(normalize, (None, "true", "pred", "all"), "normalize")
    c = one_label(y_true, y_pred)
    place, size = places(c, labels)
    true, predicted = place[c.true], place[c.predicted]
    if labels is not None and not (true >= 0).any():
        raise ValueError(
            f"none of labels {np.asarray(labels).tolist()} is in y_true; give at least one that is"
        )
    known = (true >= 0) & (predicted >= 0)
    matrix = np.zeros((size, size), np.int64)
    matrix[true[known], predicted[known]] = c.count[known]
    if size == 1:
        warn("one label makes a matrix of 1 x 1; name all labels with `labels`")
    if normalize is None:
        return matrix
    axis = {"true": 1, "pred": 0, "all": None}[normalize]
    sums = matrix.sum(axis=axis, keepdims=True)
    return np.where(sums > 0, matrix / np.maximum(sums, 1), 0.0)


def one_label(y_true, y_pred) -> Confusion:
    """The Confusion of rows with one label each."""
    c = confusion(y_true, y_pred)
    if isinstance(c, LabelCounts):
        raise ValueError("this score is of rows with one label; y_true is a matrix (rows, labels)")
    return c


def places(c: Confusion | LabelCounts, labels) -> tuple[np.ndarray, int]:
    """The place of each of c's labels within `labels`, or -1; and the number of `labels`."""
    if labels is None:
        return np.arange(len(c.labels)), len(c.labels)
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or len(np.unique(labels)) != len(labels):
        raise ValueError(f"labels {labels.tolist()} must be different from each other, and at least one")
    if (labels.dtype.kind == "U") != (c.labels.dtype.kind == "U"):
        raise ValueError(f"labels {labels.tolist()} are of another kind than the rows', as {c.labels[0]!r}")
    order = np.argsort(labels)
    at = np.searchsorted(labels[order], c.labels).clip(max=len(labels) - 1)
    return np.where(labels[order][at] == c.labels, order[at], -1), len(labels)


def accuracy(y_true, y_pred) -> float:
    """The share of rows that are right.

    accuracy = rows with y_pred = y_true / rows

    Where y_true and y_pred are matrices (rows, labels) of 0 and 1, a row is right when all its labels are.
    Range: 0 to 1, higher is better.
    Use: classes of about equal size whose errors cost the same.
    Lies: with 1 % positives, calling every row negative scores 0.99. Beside it belong the share of the
    largest class and `balanced_accuracy` or `f1`.
    Source: scikit-learn's accuracy_score.

    >>> accuracy([1] + 99 * [0], 100 * [0])
    0.99
    """
    if isinstance(y_true, (Confusion, LabelCounts)) or array_of(y_true, "y_true").ndim == 2:
        return confusion(y_true, y_pred).share_right
    y_true, y_pred = label_rows(y_true, y_pred)  # the same share, without counting what the others are
    return int(np.count_nonzero(y_true == y_pred)) / len(y_true)


def balanced_accuracy(y_true, y_pred, adjusted: bool = False) -> float:
    """The mean over classes of the share of their rows that are right.

    balanced_accuracy = mean over labels i with true_i > 0 of right_i / true_i

    `adjusted` subtracts chance, 1 / k for k such labels, and divides by 1 - 1 / k; nan where k is 1.
    Range: 0 to 1, chance is 1 / k; adjusted: at most 1, chance is 0.
    Use: classes of very different sizes.
    Lies: a class of three rows weighs as much as one of three thousand, so its luck moves the score.
    Source: Brodersen et al. 2010, "The balanced accuracy and its posterior distribution"; scikit-learn.

    >>> balanced_accuracy([1] + 99 * [0], 100 * [0])
    0.5
    """
    right, true, _ = one_label(y_true, y_pred).totals()
    occur = true > 0
    classes = int(occur.sum())
    if classes < len(true):
        warn("y_pred has labels that y_true lacks; they are left out of the mean")
    elif classes == 1:
        warn("all rows have one label, so this says nothing of others" + adjusted * ", and adjusted is nan")
    score = float((right[occur] / true[occur]).mean())
    if not adjusted:
        return score
    return (score - 1 / classes) / (1 - 1 / classes) if classes > 1 else float("nan")


def matthews_corrcoef(y_true, y_pred) -> float:
    """Matthews' correlation of truth and prediction, for any number of classes.

    MCC = (n sum right_i - sum true_i predicted_i) / sqrt((n^2 - sum predicted_i^2) (n^2 - sum true_i^2))

    It is 0 where all rows have one label or get one.
    Range: -1 to 1; 0 is what guessing scores.
    Use: one number for two unbalanced classes that a constant guess cannot raise.
    Lies: it swings when one class has a handful of rows, and hides which kind of error was made.
    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".

    >>> matthews_corrcoef([1, 1, 1, 0], [1, 0, 1, 1])
    -0.3333333333333333
    """
    right, true, predicted = (t.tolist() for t in one_label(y_true, y_pred).totals())
    n = sum(true)
    both = n * sum(right) - sum(t * p for t, p in zip(true, predicted, strict=True))
    alone = (n * n - sum(p * p for p in predicted)) * (n * n - sum(t * t for t in true))
    return both / sqrt(alone) if alone else 0.0
