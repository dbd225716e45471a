"""The table of a classifier's scores, label by label, as text."""

import numpy as np

from minift.metrics.classification import ZERO, f1, precision, recall
from minift.metrics.confusion import confusion
from minift.metrics.multilabel import LabelCounts

HEADS = ("precision", "recall", "f1-score", "support")


def classification_report(
    y_true, y_pred, labels=None, target_names=None, digits=2, zero_division=ZERO
) -> str:
    """Precision, recall, F1 and rows of each label, and their means, as a table.

    P = right / predicted,   R = right / true,   F1 = 2 P R / (P + R),   support = true

    A line for each label; then the accuracy (or, where `labels` leaves some out, the micro average), the
    macro and the weighted average; "samples" too for matrices of 0 and 1. `target_names` name the lines.
    Range: 0 to 1, higher is better.
    Use: to read a classifier's errors at a glance.
    Lies: "macro avg f1-score" is the mean of F1s, not the F1 of the mean precision and recall.
    Source: scikit-learn's classification_report, the same text.

    >>> print(classification_report([1, 0, 1, 1], [1, 0, 0, 1]))
                  precision    recall  f1-score   support
    <BLANKLINE>
               0       0.50      1.00      0.67         1
               1       1.00      0.67      0.80         3
    <BLANKLINE>
        accuracy                           0.75         4
       macro avg       0.75      0.83      0.73         4
    weighted avg       0.88      0.75      0.77         4
    <BLANKLINE>
    """
    c = confusion(y_true, y_pred)
    shown = c.labels if labels is None else labels
    names = [str(label) for label in shown] if target_names is None else list(map(str, target_names))
    if len(names) != len(shown):
        raise ValueError(f"target_names has {len(names)} names for {len(shown)} labels; give one for each")
    many = isinstance(c, LabelCounts)
    whole = not many and set(c.labels.tolist()) <= set(shown)
    true = dict(zip(c.labels.tolist(), c.totals()[1].tolist(), strict=True))
    support = [true.get(label, 0) for label in np.asarray(shown).tolist()]

    def scores(average, zero_division):
        return [metric(c, None, average, labels, zero_division) for metric in (precision, recall, f1)]

    each = zip(names, *scores(None, zero_division), support, strict=True)
    means = []
    for average in ("micro", "macro", "weighted", *(("samples",) if many else ())):
        three = scores(average, float(zero_division))  # a warning is said above
        accuracy = average == "micro" and whole
        line = ("accuracy", None, None, c.share_right) if accuracy else (f"{average} avg", *three)
        means.append((*line, sum(support)))
    return table(each, means, digits)


def table(labels, means, digits: int) -> str:
    """Lines of (name, precision, recall, F1, rows), those of labels above those of means; None is blank."""
    labels, means = list(labels), list(means)
    width = max(*(len(name) for name, *_ in labels), len("weighted avg"), digits)
    lines = [f"{'':>{width}} " + "".join(f" {head:>9}" for head in HEADS)]
    for block in (labels, means):
        lines.append("")
        for name, *scores, rows in block:
            cells = ("" if score is None else f"{score:.{digits}f}" for score in scores)
            lines.append(f"{name:>{width}} " + "".join(f" {cell:>9}" for cell in cells) + f" {rows:>9}")
    return "\n".join([*lines, ""])
