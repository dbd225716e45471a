"""Counts where a row may have several labels: matrices (rows, labels) of 0 and 1.

Every metric of classification.py, and `accuracy`, takes such matrices in place of vectors of labels.
Source: Tsoumakas and Katakis 2007, "Multi-label classification: an overview".
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from minift.metrics.checks import array_of


@dataclass(frozen=True)
class LabelCounts:
    """right, true and predicted rows of each label; and how many rows have which three of these."""

    right: np.ndarray  # (labels,) int64
    true: np.ndarray
    predicted: np.ndarray
    rows: Counter  # (right, true, predicted) labels of a row -> rows

    def __add__(self, other: "LabelCounts") -> "LabelCounts":
        if len(self.right) != len(other.right):
            raise ValueError(f"batches of {len(self.right)} and {len(other.right)} labels do not add")
        sums = (a + b for a, b in zip(self.totals(), other.totals(), strict=True))
        return LabelCounts(*sums, self.rows + other.rows)

    def totals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.right, self.true, self.predicted

    def each_row(self) -> tuple[np.ndarray, np.ndarray]:
        """The different rows' (right, true, predicted), sorted, int64 (m, 3); and how many rows each (m,)."""
        triples = sorted(self.rows)
        return np.array(triples), np.array([self.rows[t] for t in triples])

    @property
    def n(self) -> int:
        """Rows."""
        return self.rows.total()

    @property
    def labels(self) -> np.ndarray:
        return np.arange(len(self.right))

    @property
    def share_right(self) -> float:
        """Of rows whose labels are all right."""
        return sum(n for (right, t, p), n in self.rows.items() if right == t == p) / self.n


def label_counts(y_true, y_pred) -> LabelCounts:
    y_true, y_pred = indicators(y_true, "y_true"), indicators(y_pred, "y_pred")
    if y_true.shape != y_pred.shape:
        raise ValueError(
            f"y_true has shape {y_true.shape} and y_pred {y_pred.shape}; give both (rows, labels)"
        )
    both = y_true & y_pred
    three = (both, y_true, y_pred)
    triples, count = np.unique(np.stack([m.sum(axis=1) for m in three], axis=1), axis=0, return_counts=True)
    rows = Counter(dict(zip(map(tuple, triples.tolist()), count.tolist(), strict=True)))
    return LabelCounts(*(m.sum(axis=0) for m in three), rows)


def indicators(values, name: str) -> np.ndarray:
    array = array_of(values, name)
    if array.ndim == 2 and array.shape[1] == 1:
        raise ValueError(f"{name} has one column; give its vector, {name}[:, 0]")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; give (rows, labels) with at least one of each")
    if array.dtype.kind not in "biuf" or (wrong := (array != 0) & (array != 1)).any():
        at = tuple(map(int, np.argwhere(wrong)[0])) if array.dtype.kind in "biuf" else (0, 0)
        raise ValueError(f"{name}{list(at)} is {array[at]!r}; give 0 or 1 for each row and label")
    return array.astype(bool)
