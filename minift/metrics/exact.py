"""Sums of doubles without rounding, so that a sum is the same in any order and any split into batches.

A double is a whole number of units of 2^-1126: 53 bits of significand, and a smallest exponent of -1073 as
numpy's frexp counts. A sum in these units is an integer of Python's, which has no largest value; only where
it becomes a double again is it rounded, once. Such totals add with `+`.
"""

import numpy as np

UNIT = 1126
MOMENT = 1152  # a product of two doubles ends at 2^-2252; its two parts' own 53 bits at 2^-2304
ROWS = 1 << 26  # at a time: 2^26 halves of 27 bits stay below 2^53, where doubles count without gaps


def total(values, exponents=0, unit: int = UNIT) -> int:
    """The sum of finite doubles, each times 2^its exponent, in units of 2^-unit."""
    values = np.asarray(values, dtype=np.float64).ravel()
    exponents = np.broadcast_to(exponents, values.shape)
    units = 0
    for start in range(0, len(values), ROWS):
        part = slice(start, start + ROWS)
        significand, exponent = np.frexp(values[part])  # 1/2 <= |significand| < 1
        exponent = exponent + exponents[part]
        lowest = int(exponent.min())
        high = np.trunc(significand * 2.0**27)
        low = (significand * 2.0**27 - high) * 2.0**26  # the other 26 bits, whole
        bins = exponent - lowest
        for half, scale in ((high, 26), (low, 0)):
            sums = np.bincount(bins, weights=half)
            for bin in np.flatnonzero(sums).tolist():
                units += int(sums[bin]) << (bin + lowest - 53 + scale + unit)
    return units


def moment(x: np.ndarray, y: np.ndarray) -> int:
    """The sum of x_i y_i in units of 2^-2 MOMENT, exact for all doubles.

    The significands are multiplied apart from their exponents, so that nothing is too large or too small.
    """
    (x, x_exponent), (y, y_exponent) = np.frexp(x), np.frexp(y)
    return sum(total(part, x_exponent + y_exponent, 2 * MOMENT) for part in _two_parts(x, y))


def _two_parts(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x y = p + e with p = fl(x y) and e from halves of 26 bits.

    Source: Dekker 1971, "A floating-point technique for extending the available precision", section 5.
    """
    p = x * y
    (a, b), (c, d) = _halves(x), _halves(y)
    return p, (((a * c - p) + a * d + b * c) + b * d)


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
