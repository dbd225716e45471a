"""How far a score may be off: intervals, and whether two systems differ on the same rows."""

from math import sqrt

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


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
