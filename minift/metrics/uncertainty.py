"""How far a score may be off, in closed form: a share's interval, and two systems on the same rows."""

from math import erfc, isfinite, sqrt

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import numbers, same_rows, warn
from minift.metrics.totals import Totals

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
LARGEST = 2.0**500  # of differences, so that their variance is a double


def wilson(right: float, rows: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share p = right / rows, at 95 % by default.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    `z` is the normal quantile of the level, as 2.5758 for 99 %. `right` may hold halves, for ties.
    Range: within 0 to 1, around p.
    Use: beside every accuracy, win rate or pass rate.
    Lies: it is of rows drawn independently: ten questions on one text, or one prompt sampled ten times, are
    fewer rows than ten. It knows nothing of wrong labels or of a test set unlike the use.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    >>> [round(end, 4) for end in wilson(81, 263)]
    [0.2553, 0.3662]
    """
    if not 0 <= right <= rows or rows < 1 or not isfinite(rows) or 2 * right % 1:
        raise ValueError(
            f"{right} of {rows} rows is no share; give how many of the rows are right, not their share"
        )
    if not 0 < z < 40:
        raise ValueError(f"z {z!r} must be a number from 0 to 40, as 1.96 for 95 %")
    right, n, z = float(right), float(rows), float(z)
    p = right / n
    middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if right == 0 else low), (
        1.0 if right == n else high
    )  # exact ends, where rounding would leave 1e-17


def paired_difference(a, b, z: float = Z95) -> tuple[float, float, float]:
    """The mean score of `a` minus the mean score of `b` on the same n rows, and its interval.

    d = mean(a_i - b_i),   low, high = d -+ z sqrt(sum (a_i - b_i - d)^2) / n

    With scores 1 and 0 for right and wrong the sum is n10 + n01 - n d^2, the counts of McNemar's test: rows
    that both have right, or both wrong, tell nothing of the difference.
    Range: that of the scores' differences; d > 0 where `a` scores higher.
    Use: two systems on the same test rows; far narrower than two intervals apart.
    Lies: the normal quantile is too small below about 30 rows; differences that are seldom but large are
    better in `paired_bootstrap`; and of twenty systems compared one differs by luck.
    Source: Agresti 2002, "Categorical Data Analysis", section 10.1.

    >>> paired_difference([1, 1, 0, 1], [0, 1, 0, 0])[0]
    0.5
    """
    n, total, squares = difference_sums(a, b)
    if not 0 < z < float("inf"):
        raise ValueError(f"z {z!r} must be a number above 0, as 1.96 for 95 %")
    # sum d_i^2 - (sum d_i)^2 / n without rounding; the total's square is in units of 2^-2 UNIT
    spread = n * squares - (total * total << 2 * (exact.MOMENT - exact.UNIT))
    d, half = exact.mean(total, n), z * sqrt(spread / (n << 2 * exact.MOMENT)) / n
    return d, d - half, d + half


def difference_sums(a, b) -> Totals:
    """Rows, and the exact sums of a_i - b_i, as a double has it, and of its square."""
    if isinstance(a, Totals):
        return a
    a, b = _both(a, b)
    with np.errstate(over="ignore"):
        d = a - b
    if (large := np.abs(d) > LARGEST).any():
        row = int(np.argmax(large))
        raise ValueError(f"a[{row}] - b[{row}] is {d[row]}; give smaller scores")
    return Totals(len(d), exact.total(d), exact.moment(d, d))


def _both(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = numbers(a, "a"), numbers(b, "b")
    same_rows(a, b, ("a", "b"))
    return a, b


def mcnemar(a, b, exact: bool = True) -> tuple[float, float]:
    """Whether two systems are right equally often on the same rows: (statistic, p).

    n10 = rows that only `a` has right,   n01 = those that only `b` has,   n = n10 + n01
    exact: statistic min(n10, n01),   p = min(1, 2 sum over i <= min(n10, n01) of C(n, i) / 2^n)
    else:  statistic (|n10 - n01| - 1)^2 / n, 0 where they are equal,   p by chi-square with 1 degree

    `a` and `b` are 1 for right and 0 for wrong, a row each. Where no row tells them apart the exact p is 1,
    and the other nan, with a warning.
    Range: p 0 to 1; a small p speaks against "equally often".
    Use: two classifiers on one test set; exact unless n is in the ten thousands.
    Lies: a large p shows no equality: with n = 5 the smallest p is 0.0625. It says nothing of how large the
    difference is: see `paired_difference`.
    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions";
    Edwards 1948 for the 1; statsmodels' mcnemar, but for 0 at n10 = n01 as R's mcnemar.test has.

    >>> mcnemar([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1])
    (1.0, 0.125)
    """
    n10, n01 = discordant(a, b)
    n, least = n10 + n01, min(n10, n01)
    if exact:
        return float(least), min(1.0, _tail(n, least) / (1 << n - 1) if n else 1.0)
    if not n:
        warn("no row tells a from b, so the statistic is undefined: nan")
        return float("nan"), float("nan")
    statistic = max(0, abs(n10 - n01) - 1) ** 2 / n
    return statistic, erfc(sqrt(statistic / 2))


def _tail(n: int, most: int) -> int:
    """sum over i <= most of C(n, i)."""
    total = term = 1
    for i in range(most):
        term = term * (n - i) // (i + 1)
        total += term
    return total


def discordant(a, b) -> Totals:
    """Rows that only `a` has right, and rows that only `b` has."""
    if isinstance(a, Totals):
        return a
    a, b = _both(a, b)
    for name, side in (("a", a), ("b", b)):
        if (wrong := (side != 0) & (side != 1)).any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{name}[{row}] is {side[row]}; give 1 for right and 0 for wrong")
    return Totals(int((a > b).sum()), int((b > a).sum()))
