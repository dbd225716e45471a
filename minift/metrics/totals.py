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
        one, other = a[0].item(), b[0].item()
        raise ValueError(f"one batch has labels as {one!r} and another as {other!r}; give labels of one kind")
    if {a.dtype.kind, b.dtype.kind} == {"f"} and a.dtype != b.dtype:  # their clipping and ties differ
        raise ValueError(f"one batch holds {a.dtype} and another {b.dtype}; give one dtype")
    return np.concatenate((a, b))
