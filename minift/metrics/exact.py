"""Sums of doubles without rounding, so that a sum is the same in any order and any split into batches.

A double is a whole number of units of 2^-1126: 53 bits of significand, and a smallest exponent of -1073 as
numpy's frexp counts. A sum in these units is an integer of Python's, which has no largest value; only where
it becomes a double again is it rounded, once. Such totals add with `+`.
"""

import numpy as np

UNIT = 1126
ROWS = 1 << 26  # at a time: 2^26 halves of 27 bits stay below 2^53, where doubles count without gaps


def total(values) -> int:
    """The sum of finite doubles, in units of 2^-1126."""
    values = np.asarray(values, dtype=np.float64).ravel()
    units = 0
    for start in range(0, len(values), ROWS):
        significand, exponent = np.frexp(values[start : start + ROWS])  # 1/2 <= |significand| < 1
        lowest = int(exponent.min())
        high = np.trunc(significand * 2.0**27)
        low = (significand * 2.0**27 - high) * 2.0**26  # the other 26 bits, whole
        bins = exponent - lowest
        for half, scale in ((high, 26), (low, 0)):
            for bin, part in enumerate(np.bincount(bins, weights=half)):
                units += int(part) << (bin + lowest - 53 + scale + UNIT)
    return units


def product(x: np.ndarray, y: np.ndarray) -> int:
    """The sum of x_i y_i in the same units; exact while every product is 0 or at least 2^-969.

    x y = p + e with p = fl(x y) and e from halves of 26 bits. Source: Dekker 1971, "A floating-point
    technique for extending the available precision", section 5.
    """
    p = x * y
    (a, b), (c, d) = _halves(x), _halves(y)
    return total(p) + total(((a * c - p) + a * d + b * c) + b * d)


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = x * 134217729.0  # 2^27 + 1
    high = high - (high - x)
    return high, x - high


def value(units: int) -> float:
    """The double nearest to a total."""
    return units / (1 << UNIT)


def mean(units: int, n: int) -> float:
    """The double nearest to a total over n."""
    return units / (n << UNIT)
