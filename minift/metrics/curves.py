"""The curves that a threshold on the score draws: ROC, and precision over recall.

    TP(t) = positive rows with score >= t,   FP(t) = negative rows with score >= t

for each score t that occurs. Both are counted from sorted scores, in integers.
Source: Fawcett 2006, "An introduction to ROC analysis", section 5.
"""

import numpy as np

from minift.metrics.checks import warn
from minift.metrics.columns import one_score, positives, scored


def roc_curve(y_true, y_score, pos_label=None, drop_intermediate: bool = True):
    """The false and the true positive rate of each threshold on the score.

    FPR(t) = FP(t) / negative rows,   TPR(t) = TP(t) / positive rows

    Returns (FPR, TPR, thresholds) with thresholds from infinity down, so that both rates rise from 0 to 1.
    `drop_intermediate` leaves out points on a straight line between their neighbours, where both steps are
    alike. A rate without rows is nan, with a warning. `pos_label` may be
    left out where it is 1 beside 0 or -1.
    Range: 0 to 1; the diagonal is chance, the upper left corner is best.
    Use: to choose a threshold, and to see what `roc_auc` sums up.
    Lies: with few positives, a false positive rate of 0.01 may be ten false alarms for each hit; see
    `precision_recall_curve`.
    Source: Fawcett 2006, "An introduction to ROC analysis", algorithm 1; scikit-learn's roc_curve.

    >>> fpr, tpr, thresholds = roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    >>> fpr.tolist(), tpr.tolist(), thresholds.tolist()
    ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0], [inf, 0.8, 0.4, 0.35, 0.1])
    """
    truth, score = one_score(scored(y_true, y_score))
    true, false, thresholds = counts(positives(truth, pos_label), score)
    if drop_intermediate and len(thresholds) > 2:
        bend = (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)
        kept = np.concatenate(([True], bend, [True]))
        true, false, thresholds = (x[kept] for x in (true, false, thresholds))
    rates = [np.concatenate(([0], count)) for count in (false, true)]
    if not (false[-1] and true[-1]):
        warn(f"y_true has no {'positive' if false[-1] else 'negative'} rows; their rate is nan")
    rates = [count / count[-1] if count[-1] else np.full(len(count), np.nan) for count in rates]
    return *rates, np.concatenate(([np.inf], thresholds))


def precision_recall_curve(y_true, y_score, pos_label=None, drop_intermediate: bool = False):
    """Precision and recall of each threshold on the score.

    P(t) = TP(t) / (TP(t) + FP(t)),   R(t) = TP(t) / positive rows

    Returns (P, R, thresholds) with thresholds from the lowest up, and at the end P = 1 and R = 0, which have
    no threshold. `drop_intermediate` leaves out points between others of the same recall. Without positive
    rows recall is 1, with a warning. `pos_label` as in `roc_curve`.
    Range: 0 to 1; the upper right corner is best, chance is a precision of the share of positive rows.
    Use: to choose a threshold where positives are rare.
    Lies: curves of data with other shares of positives do not compare; straight lines between its points
    are too high.
    Source: Davis and Goadrich 2006, "The relationship between Precision-Recall and ROC curves"; scikit-learn.

    >>> p, r, thresholds = precision_recall_curve([0, 1, 1], [0.1, 0.4, 0.8])
    >>> p.round(4).tolist(), r.tolist(), thresholds.tolist()
    ([0.6667, 1.0, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0], [0.1, 0.4, 0.8])
    """
    truth, score = one_score(scored(y_true, y_score))
    true, false, thresholds = counts(positives(truth, pos_label), score)
    if drop_intermediate and len(thresholds) > 2:
        step = np.diff(true) != 0
        kept = np.concatenate(([True], step[:-1] | step[1:], [True]))
        true, false, thresholds = (x[kept] for x in (true, false, thresholds))
    if not true[-1]:
        warn("y_true has no positive rows; recall is taken as 1")
    precision = true / (true + false)
    recall = true / true[-1] if true[-1] else np.ones(len(true))
    return np.append(precision[::-1], 1.0), np.append(recall[::-1], 0.0), thresholds[::-1]


def counts(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """TP and FP of each score that occurs, int64 (m,), and these scores, the highest first."""
    ordered = np.sort(score)
    first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))[::-1]
    thresholds = ordered[first]
    own = np.sort(score[positive])
    true = len(own) - np.searchsorted(own, thresholds)
    return true, len(ordered) - first - true, thresholds
