"""Scores of numbers: errors, the share of variance explained, correlations.

    n rows y_i predicted as p_i;   S(u, v) = n sum u_i v_i - sum u_i sum v_i   (n^2 times their covariance)

All sums are exact (exact.py), so that no difference of two of them cancels, however large the mean is beside
the spread, and a score is rounded once. Scores beyond the largest double are an error.
Source: names and order of arguments of scikit-learn.
"""

import math

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import numbers, same_rows, warn
from minift.metrics.totals import Rows, Totals

HALF = 128  # bits below the point of an integer root


def mse(y_true, y_pred) -> float:
    """The mean squared error.

    mse = sum (y_i - p_i)^2 / n

    Range: 0 to infinity, lower is better; in squared units of y.
    Use: when one large error is worse than many small ones; it is least for the mean.
    Lies: a single outlier can be nearly all of it, and it does not compare between targets of other scale.
    Source: scikit-learn's mean_squared_error.

    >>> mse([3, -0.5, 2, 7], [2.5, 0.0, 2, 8])
    0.375
    """
    n, _, _, yy, yp, pp = moments(y_true, y_pred)
    return _ratio(yy - 2 * yp + pp, n << 2 * exact.MOMENT, "mse")


def rmse(y_true, y_pred) -> float:
    """The root of the mean squared error.

    rmse = sqrt(sum (y_i - p_i)^2 / n)

    Range: 0 to infinity, lower is better; in units of y.
    Use: as `mse`, to be read beside y itself.
    Lies: as `mse`; and the mean of batches' roots is not the root of all rows.
    Source: scikit-learn's root_mean_squared_error.

    >>> round(rmse([3, -0.5, 2, 7], [2.5, 0.0, 2, 8]), 4)
    0.6124
    """
    n, _, _, yy, yp, pp = moments(y_true, y_pred)
    root = math.isqrt(((yy - 2 * yp + pp) << 2 * HALF) // n)
    return _ratio(root, 1 << HALF + exact.MOMENT, "rmse")


def mae(y_true, y_pred) -> float:
    """The mean absolute error.

    mae = sum |y_i - p_i| / n

    Range: 0 to infinity, lower is better; in units of y.
    Use: when an error of 2 is twice as bad as one of 1; it is least for the median.
    Lies: where most rows share one value, always predicting that scores well.
    Source: scikit-learn's mean_absolute_error.

    >>> mae([3, -0.5, 2, 7], [2.5, 0.0, 2, 8])
    0.5
    """
    n, errors = absolute_errors(y_true, y_pred)
    return _ratio(errors, n << exact.UNIT, "mae")


def r2(y_true, y_pred) -> float:
    """The share of the target's variance that the predictions explain.

    R^2 = 1 - sum (y_i - p_i)^2 / sum (y_i - mean y)^2

    Of a constant target it is 1 where all predictions are right and else 0; of one row nan, with a warning.
    Range: minus infinity to 1, higher is better; 0 is what always predicting the mean of y scores.
    Use: to compare a model with the constant one, in no units.
    Lies: more spread in the target raises it with the same errors; it is not the square of `pearson`.
    Source: scikit-learn's r2_score, which by rounding may miss that a target is constant.

    >>> round(r2([3, -0.5, 2, 7], [2.5, 0.0, 2, 8]), 4)
    0.9486
    """
    n, y, _, yy, yp, pp = moments(y_true, y_pred)
    if n == 1:
        warn("one row has no variance, so r2 is undefined: nan; give at least two rows")
        return math.nan
    errors, spread = yy - 2 * yp + pp, n * yy - y * y
    if not spread:
        return 0.0 if errors else 1.0
    return _ratio(spread - n * errors, spread, "r2")


def pearson(y_true, y_pred) -> float:
    """The linear correlation of two columns.

    r = S(y, p) / sqrt(S(y, y) S(p, p))

    nan with a warning where a column is constant; one row is an error.
    Range: -1 to 1; 0 where a line explains nothing.
    Use: scores whose scale and offset mean nothing, as of a regression head beside human ratings.
    Lies: predictions that are all off by 100 correlate perfectly; one far row can make it 1 or -1.
    Source: Pearson 1895, "Notes on regression and inheritance in the case of two parents"; scipy's pearsonr.

    >>> pearson([1, 2, 3, 4], [1, 3, 2, 4])
    0.8
    """
    statistics = moments(y_true, y_pred)
    if statistics[0] == 1:
        raise ValueError("one row has no correlation; give at least two rows")
    return _correlation(statistics)


def spearman(y_true, y_pred) -> float:
    """The linear correlation of two columns' ranks; rows that tie share their mean rank.

    rho = pearson(rank y, rank p)

    nan with a warning where a column is constant, or of one row.
    Range: -1 to 1; 1 where p grows whenever y does.
    Use: when only the order matters, or the relation bends.
    Lies: it hides how far rows are apart; with few different values ties make most of it.
    Source: Spearman 1904, "The proof and measurement of association between two things"; scipy's spearmanr.

    >>> spearman([1, 2, 3, 4], [1, 10, 100, 50])
    0.8
    """
    return _correlation(moments(*(_doubled_ranks(column) for column in pairs(y_true, y_pred))))


def moments(y_true, y_pred) -> Totals:
    """n, sum y, sum p, sum y^2, sum y p, sum p^2; exact, in units of 2^-1152 and, of products, its square."""
    if isinstance(y_true, Totals):
        return y_true
    y, p = pairs(y_true, y_pred)
    sums = (exact.total(column, unit=exact.MOMENT) for column in (y, p))
    return Totals(len(y), *sums, exact.moment(y, y), exact.moment(y, p), exact.moment(p, p))


def absolute_errors(y_true, y_pred) -> Totals:
    """n, sum |y - p|; exact, as the larger one less the smaller."""
    if isinstance(y_true, Totals):
        return y_true
    y, p = pairs(y_true, y_pred)
    return Totals(len(y), exact.total(np.maximum(y, p)) - exact.total(np.minimum(y, p)))


def pairs(y_true, y_pred) -> Rows:
    """The two columns."""
    if isinstance(y_true, Rows):
        return y_true
    y, p = numbers(y_true, "y_true"), numbers(y_pred, "y_pred")
    same_rows(y, p, ("y_true", "y_pred"))
    return Rows(y, p)


def _doubled_ranks(column: np.ndarray) -> np.ndarray:
    """Twice the mean rank of each row's ties, which is whole: the first rank plus the last."""
    _, place, ties = np.unique(column, return_inverse=True, return_counts=True)
    last = np.cumsum(ties)
    return (last - ties + 1 + last)[place].astype(np.float64)


def _correlation(statistics: Totals) -> float:
    n, y, p, yy, yp, pp = statistics
    spread_y, spread_p = n * yy - y * y, n * pp - p * p
    if not (spread_y and spread_p):
        constant = "y_pred" if spread_y else "y_true"
        warn(f"{constant} is constant, so the correlation is undefined: nan")
        return math.nan
    return (n * yp - y * p) / math.isqrt(spread_y * spread_p)  # whole numbers of hundreds of bits


def _ratio(over: int, under: int, name: str) -> float:
    """The double nearest to over / under."""
    try:
        return over / under
    except OverflowError:
        raise ValueError(f"{name} is beyond the largest double; divide both columns by a scale") from None
