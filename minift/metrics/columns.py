"""Rows of labels with their scores, and which class a column of scores is of.

The columns of a matrix (rows, classes) are of the classes in sorted order: `labels`, or those that occur. A
vector of scores is of one class of two, the positive one; the other is what is left.
"""

import numpy as np

from minift.metrics.checks import array_of, probabilities, same_rows, scores
from minift.metrics.checks import labels as label_vector
from minift.metrics.multilabel import indicators
from minift.metrics.totals import Rows


def scored(y_true, y_score, name: str = "y_score") -> Rows:
    """The statistics of metrics of scores, the rows; those that are Rows already stay as they are.

    Labels (rows,), or 0 and 1 (rows, labels); and scores (rows,) or (rows, classes).
    """
    if isinstance(y_true, Rows):
        return y_true
    score = scores(y_score, name)
    many = array_of(y_true, "y_true").ndim == 2
    truth = indicators(y_true, "y_true") if many else label_vector(y_true, "y_true")
    same_rows(truth, score, ("y_true", name))
    if many and truth.shape != score.shape:
        raise ValueError(
            f"y_true has shape {truth.shape} and {name} {score.shape}; give both (rows, labels), or y_true "
            "as a vector of labels"
        )
    if not many and score.ndim == 2 and score.shape[1] == 1:
        score = score[:, 0]
    return Rows(truth, score)


def one_label(rows: Rows) -> Rows:
    """The same, where each row has one label."""
    if rows[0].ndim == 2:
        raise ValueError("this score is of rows with one label; y_true is a matrix (rows, labels)")
    return rows


def one_score(rows: Rows) -> Rows:
    """The same, where each row has one label and one score."""
    if one_label(rows)[1].ndim == 2:
        raise ValueError("y_score has a column for each class; give the scores of one, y_score[:, i]")
    return rows


def classes(truth: np.ndarray, columns: int, labels=None) -> np.ndarray:
    """The class of each column: `labels`, or the labels that occur, sorted."""
    found = np.unique(truth)
    if labels is None:
        if len(found) != columns:
            raise ValueError(
                f"y_true has {len(found)} classes, {found[:10].tolist()}, and the scores are of {columns}; "
                "name the class of each column with `labels`"
            )
        return found
    labels = label_vector(labels, "labels")
    if len(labels) != columns or columns < 2:
        raise ValueError(f"labels {labels.tolist()} name {len(labels)} classes, the scores are of {columns}")
    if (labels.dtype.kind == "U") != (found.dtype.kind == "U"):
        raise ValueError(f"labels {labels.tolist()} are of another kind than y_true's, as {truth[0]!r}")
    if not (labels[1:] > labels[:-1]).all():
        raise ValueError(
            f"labels {labels.tolist()} are not in order; sort them, and the columns of the scores with them"
        )
    if len(unknown := np.setdiff1d(found, labels)):
        row = int(np.argmax(truth == unknown[0]))
        raise ValueError(f"y_true[{row}] is {truth[row]!r}, which is not one of labels {labels.tolist()}")
    return labels


def positives(truth: np.ndarray, pos_label) -> np.ndarray:
    """Whether each row has the label `pos_label`, where there are at most two labels; bool (rows,).

    None is 1 where the labels are 0 and 1, or -1 and 1, and else an error.
    """
    found = np.unique(truth)
    if len(found) > 2:
        raise ValueError(
            f"y_true has {len(found)} labels, {found[:10].tolist()}, and this score is of two; score one "
            "against the rest with y_true == label"
        )
    if pos_label is None:
        if not any(set(found.tolist()) <= plain for plain in ({0, 1}, {-1, 1})):
            raise ValueError(
                f"y_true has the labels {found.tolist()}; name the positive one with `pos_label`"
            )
        pos_label = 1
    kind = np.asarray(pos_label).dtype.kind
    known = kind == "U" if found.dtype.kind == "U" else kind in "biuf"
    if not known or (len(found) == 2 and pos_label not in found.tolist()):
        raise ValueError(f"pos_label {pos_label!r} is not one of the labels {found.tolist()}")
    return truth == pos_label


def two_columns_are_refused(truth: np.ndarray, score: np.ndarray) -> None:
    if score.ndim == 2 and score.shape[1] == 2 and len(found := np.unique(truth)) <= 2:
        raise ValueError(
            f"y_score has a column for each of two classes; give the scores of {found[-1]!r} alone, "
            "y_score[:, 1]"
        )


def probable(y_true, y_prob) -> Rows:
    """The statistics of metrics of probabilities: rows as in `scored`, with one label each."""
    if isinstance(y_true, Rows):
        return y_true
    truth, prob = one_label(scored(y_true, y_prob, "y_prob"))
    return Rows(truth, probabilities(prob, "y_prob"))


def happened(truth: np.ndarray, prob: np.ndarray, pos_label, labels) -> np.ndarray:
    """Whether the row's class is the one of each probability; bool of prob's shape."""
    if prob.ndim == 2:
        if pos_label is not None:
            raise ValueError(f"pos_label {pos_label!r} is of a vector, and y_prob has columns; leave it out")
        return truth[:, None] == classes(truth, prob.shape[1], labels)
    found = np.unique(truth) if labels is None else classes(truth, 2, labels)
    if pos_label is None:
        if found.dtype.kind == "U":
            raise ValueError(f"the labels are strings, {found[:10].tolist()}; name one with `pos_label`")
        pos_label = 1 if found.tolist() in ([0], [-1]) else found[-1]
    elif labels is not None and pos_label not in found.tolist():
        raise ValueError(f"pos_label {pos_label!r} is not one of labels {found.tolist()}")
    return positives(truth, pos_label)
