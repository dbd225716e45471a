"""Whether of all that is said with 70 %, 70 % happens: the reliability curve and its distance from that.

Rows are put into `bins` bins of equal width by their confidence, (0, 1/bins], (1/bins, 2/bins] and so on,
the first one with 0. Where y_prob is a vector, the confidence is the probability of the positive one of two
classes (`pos_label`, as in `brier`), and a row is right when it is positive. Where y_prob is a matrix (rows,
classes), it is the largest probability of the row, and the row is right when that class is its own.

Source: Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks", section 2; bins as
scikit-learn's calibration_curve has them.
"""

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import whole
from minift.metrics.columns import happened, probable
from minift.metrics.totals import Rows, Totals


def expected_calibration_error(y_true, y_prob, bins: int = 10, pos_label=None, labels=None) -> float:
    """The mean distance between confidence and share of right rows, bin by bin.

    ECE = sum over bins of rows_b / n x |share right_b - mean confidence_b|

    A vector y_prob is the probability of the positive class, a matrix is judged by its largest probability;
    `labels` names its columns' classes where some have no rows.
    Range: 0 to 1, lower is better.
    Use: beside the accuracy, where a threshold or a person acts on the confidence.
    Lies: always predicting the share of positives scores 0; it moves with `bins`; and few rows score high by
    chance alone, about 1 / sqrt(rows of a bin) each.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3; Naeini et al. 2015.

    >>> round(expected_calibration_error([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.1375
    """
    units, right, rows = _filled(y_true, y_prob, bins, pos_label, labels)
    far = sum(abs((int(r) << exact.UNIT) - u) for u, r in zip(units, right, strict=True))
    return exact.mean(far, int(rows.sum()))


def reliability_curve(y_true, y_prob, bins: int = 10, pos_label=None, labels=None):
    """The share of right rows at each confidence.

    confidence_b = mean over rows of the bin of their confidence,   right_b = right rows / rows

    Returns (confidence, share right, rows), each (bins,); both means are nan in a bin without rows.
    Range: 0 to 1; the diagonal is calibrated, below it confidence is too high.
    Use: to see where `expected_calibration_error` comes from.
    Lies: a point may stand for three rows; read it beside `rows`.
    Source: DeGroot and Fienberg 1983, "The comparison and evaluation of forecasters"; scikit-learn's
    calibration_curve, which leaves empty bins out.

    >>> confidence, right, rows = reliability_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], bins=2)
    >>> confidence.round(4).tolist(), right.round(4).tolist(), rows.tolist()
    ([0.2833, 0.8], [0.3333, 1.0], [3, 1])
    """
    units, right, rows = _filled(y_true, y_prob, bins, pos_label, labels)
    means = [exact.mean(u, int(n)) if n else np.nan for u, n in zip(units, rows, strict=True)]
    return np.array(means), np.where(rows > 0, right / np.maximum(rows, 1), np.nan), rows


def binned(y_true, y_prob, bins: int = 10, pos_label=None, labels=None) -> Rows | Totals:
    """The statistics of calibration: the rows, or with `labels` each bin's sum, right rows and rows."""
    whole(bins, "bins")
    if isinstance(y_true, Totals):
        return y_true
    rows = probable(y_true, y_prob)
    return rows if labels is None else _bins(rows, bins, pos_label, labels)


def _filled(y_true, y_prob, bins: int, pos_label, labels) -> Totals:
    counted = binned(y_true, y_prob, bins, pos_label, labels)
    return _bins(counted, bins, pos_label, labels) if isinstance(counted, Rows) else counted


def _bins(rows: Rows, bins: int, pos_label, labels) -> Totals:
    truth, prob = rows
    right = happened(truth, prob, pos_label, labels)
    if prob.ndim == 2:
        most = prob.argmax(axis=1)[:, None]
        prob, right = (np.take_along_axis(x, most, axis=1)[:, 0] for x in (prob, right))
    prob = prob.astype(np.float64)
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], prob)
    count = np.bincount(place, minlength=bins)
    parts = np.split(prob[np.argsort(place, kind="stable")], np.cumsum(count)[:-1])
    units = np.array([exact.total(part) for part in parts], dtype=object)  # (bins,) of Python's integers
    return Totals(units, np.bincount(place[right], minlength=bins), count)
