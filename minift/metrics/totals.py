"""Statistics of rows that add: what a metric counts, so that batches can be counted apart."""

import numpy as np


class Totals(tuple):
    """Numbers, or arrays of them, that add entry by entry."""

    def __new__(cls, *numbers):
        return super().__new__(cls, numbers)

    def __add__(self, other):
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


class Rows(tuple):
    """Arrays with an entry for each row; adding puts the rows one behind the other."""

    def __new__(cls, *arrays):
        return super().__new__(cls, arrays)

    def __add__(self, other):
        return Rows(*(joined(a, b) for a, b in zip(self, other, strict=True)))


def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One behind the other, where numpy would make strings of numbers that meet strings."""
    if (a.dtype.kind == "U") != (b.dtype.kind == "U"):
        raise ValueError(f"one batch has labels as {a[0]!r} and another as {b[0]!r}; give labels of one kind")
    return np.concatenate((a, b))
