"""How good probabilities are as probabilities: log loss and Brier score.

y_prob is a vector, of the positive one of two classes, or a matrix (rows, classes) whose rows sum to 1, its
columns in the sorted order of the classes. `labels` names the classes, sorted; by default those that occur.
With `labels`, batches are counted as two numbers; without, their rows are kept until all are known.
"""

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import choice
from minift.metrics.columns import classes, happened, probable
from minift.metrics.totals import Rows, Totals


def log_loss(y_true, y_prob, labels=None) -> float:
    """The mean negative logarithm of the probability given to each row's true class.

    log_loss = -mean over rows of ln p(true class of the row)

    in nats, of probabilities clipped to eps .. 1 - eps, eps of their dtype (2^-52 for doubles). Of a vector,
    the greater of two labels is positive. One label alone is an error unless `labels` names the others.
    Range: 0 to 36.04 for doubles, lower is better; guessing evenly scores ln(classes).
    Use: to train and compare models whose probabilities are used.
    Lies: one row that was given 0 costs as much as dozens of poor ones, so a few wrong labels decide.
    Source: Good 1952, "Rational decisions"; scikit-learn's log_loss, whose warning about rows that do not sum
    to 1 is an error here.

    >>> round(log_loss(["spam", "ham", "ham", "spam"], [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]), 6)
    0.216162
    """
    counted = logs(y_true, y_prob, labels)
    units, rows = _logs(counted, labels) if isinstance(counted, Rows) else counted
    return exact.mean(-units, rows)


def brier(y_true, y_prob, pos_label=None, labels=None, scale_by_half="auto") -> float:
    """The mean squared distance between probabilities and what happened.

    brier = mean over rows of sum over classes of (p_class - [class is the row's])^2

    halved where `scale_by_half` is True, or "auto" and there are two classes: of two it is then the mean of
    (p - [positive])^2. Of a vector, `pos_label` is positive; by default 1 where the labels are 0 and 1, or -1
    and 1, else the greater number.
    Range: 0 to 1 where halved, else to 2; lower is better.
    Use: as `log_loss`, where single rows should not dominate.
    Lies: with 1 % positives, predicting 0.01 always scores 0.0099; compare with that share's own score.
    Source: Brier 1950, "Verification of forecasts expressed in terms of probability"; scikit-learn's
    brier_score_loss.

    >>> round(brier([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.3]), 6)
    0.0375
    """
    choice(scale_by_half, (True, False, "auto"), "scale_by_half")
    counted = squared_errors(y_true, y_prob, pos_label, labels)
    units, rows, cells = _squares(counted, pos_label, labels) if isinstance(counted, Rows) else counted
    half = cells == 2 * rows if scale_by_half == "auto" else scale_by_half
    return exact.mean(units, 2 * rows if half else rows)


def logs(y_true, y_prob, labels=None) -> Rows | Totals:
    """The statistics of `log_loss`: the rows, or with `labels` the sum of ln p and the number of rows."""
    if isinstance(y_true, Totals):
        return y_true
    rows = probable(y_true, y_prob)
    return rows if labels is None else _logs(rows, labels)


def _logs(rows: Rows, labels) -> Totals:
    truth, prob = rows
    found = classes(truth, 2 if prob.ndim == 1 else prob.shape[1], labels)
    if len(found) < 2:
        raise ValueError(f"one class alone, {found.tolist()}, is certain; name the others too with `labels`")
    eps = float(np.finfo(prob.dtype).eps)
    if prob.ndim == 1:
        prob = np.stack((1 - prob, prob), axis=1)
    own = np.take_along_axis(prob, np.searchsorted(found, truth)[:, None], axis=1)[:, 0]
    return Totals(exact.total(np.log(own.astype(np.float64).clip(eps, 1 - eps))), len(own))


def squared_errors(y_true, y_prob, pos_label=None, labels=None) -> Rows | Totals:
    """The statistics of `brier`: the rows, or with `labels` the sum of squares, rows, and rows x classes."""
    if isinstance(y_true, Totals):
        return y_true
    rows = probable(y_true, y_prob)
    return rows if labels is None else _squares(rows, pos_label, labels)


def _squares(rows: Rows, pos_label, labels) -> Totals:
    truth, prob = rows
    error = prob.astype(np.float64) - happened(truth, prob, pos_label, labels)
    vector = prob.ndim == 1  # the other class is as far off
    units = exact.total(error * error) * (2 if vector else 1)
    return Totals(units, len(prob), 2 * len(prob) if vector else prob.size)
