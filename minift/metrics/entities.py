"""Scores of entities: spans of tags, right only where type, first and last tag are all those of the truth.

    P = right / predicted,   R = right / true,   F1 = 2 P R / (P + R),   counted for each type of entity

A tag is O, or a letter and a type, as B-PER; a letter alone has the type "_". Without `scheme` every tag
but O is part of an entity, whatever the letters before it, as in the script of the CoNLL shared tasks: B and
S start one, E and S end one, and so does another type. With a scheme only what is spelled as it says counts:

    IOB1   I I      B only where an entity of the same type stands right before
    IOB2   B I I    one tag: B; also named BIO
    IOE2   I I E    one tag: E
    IOBES  B I E    one tag: S
    BILOU  B I L    one tag: U

Source: Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 shared task", section 4; the
conventions of seqeval, whose mode="strict" is our `scheme`.
"""

import re
from collections import Counter

import numpy as np

from minift.metrics.checks import choice, same_rows, warn
from minift.metrics.classification import ZERO, averaged, check_zero_division
from minift.metrics.report import table
from minift.metrics.totals import Totals

# A tag is written in two characters: "+" where it has the type of the tag before it, else "|"; its letter.
SPELLINGS = {
    None: r".[ES]|.[BI](\+I)*(\+E)?",
    "IOB1": r"(\+B(?!\|B)|.I)(\+I)*",  # a lone B right before a B of another type is no entity to seqeval
    "IOB2": r".B(\+I)*",
    "IOE2": r".E|.I(\+I)*\+E",
    "IOBES": r".S|.B(\+I)*\+E",
    "BILOU": r".U|.B(\+I)*\+L",
}
LETTERS = {None: "BIES", "IOB1": "BI", "IOB2": "BI", "IOE2": "IE", "IOBES": "BIES", "BILOU": "BILU"}
for _table in (SPELLINGS, LETTERS):
    _table["BIO"] = _table["IOB2"]  # its other name
AVERAGES = ("micro", "macro", "weighted", None)


def entity_precision(y_true, y_pred, average="micro", scheme=None, zero_division: float = ZERO):
    """Of the entities predicted, the share that is right.

    P = right / predicted

    y_true and y_pred: for each sentence its list of tags. average=None gives the score of each type, sorted.
    Range: 0 to 1, higher is better.
    Use: tagging of names, when a false entity is what costs.
    Lies: half a name is as wrong as one that is nowhere; a tagger that tags little is precise.
    Source: seqeval's precision_score.

    >>> entity_precision([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "O"]])
    1.0
    """
    return _score(y_true, y_pred, _precision, "precision", average, scheme, zero_division)


def entity_recall(y_true, y_pred, average="micro", scheme=None, zero_division: float = ZERO):
    """Of the true entities, the share that was found.

    R = right / true

    Arguments as of `entity_precision`.
    Range: 0 to 1, higher is better.
    Use: tagging of names, when a missed entity is what costs.
    Lies: "micro" is the recall of the most frequent type, more or less.
    Source: seqeval's recall_score.

    >>> entity_recall([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "O"]])
    0.5
    """
    return _score(y_true, y_pred, _recall, "recall", average, scheme, zero_division)


def entity_f1(y_true, y_pred, average="micro", scheme=None, zero_division: float = ZERO):
    """The harmonic mean of the precision and recall of entities.

    F1 = 2 right / (true + predicted)

    Arguments as of `entity_precision`.
    Range: 0 to 1, higher is better.
    Use: the usual score of named entity recognition.
    Lies: a span off by one tag is wrong twice, in precision and in recall; the scores of one tagger with and
    without `scheme` differ where it leaves out a B.
    Source: Tjong Kim Sang and De Meulder 2003, section 4; seqeval's f1_score.

    >>> truth, tagged = [["B-PER", "I-PER", "O", "B-LOC"]], [["I-PER", "I-PER", "O", "B-LOC"]]
    >>> entity_f1(truth, tagged), entity_f1(truth, tagged, scheme="IOB2")
    (1.0, 0.6666666666666666)
    """
    return _score(y_true, y_pred, _f1, "F1", average, scheme, zero_division)


def entity_report(y_true, y_pred, scheme=None, digits: int = 2, zero_division: float = ZERO) -> str:
    """Precision, recall, F1 and entities of each type, and their means, as a table.

    F1 = 2 P R / (P + R) of each type's entities

    A line for each type; then the micro, macro and weighted averages. Rows without any entity are an error.
    Range: 0 to 1, higher is better.
    Use: to see which types are missed.
    Lies: a type that is only ever predicted has a line too, and pulls the macro average down.
    Source: seqeval's classification_report, the same text but where a score ties between two last digits.

    >>> truth, tagged = [["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "B-PER"]]
    >>> print(entity_report(truth, tagged, zero_division=0))
                  precision    recall  f1-score   support
    <BLANKLINE>
             LOC       0.00      0.00      0.00         1
             PER       0.50      1.00      0.67         1
    <BLANKLINE>
       micro avg       0.50      0.50      0.50         2
       macro avg       0.25      0.50      0.33         2
    weighted avg       0.25      0.50      0.33         2
    <BLANKLINE>
    """
    counts = entity_counts(y_true, y_pred, scheme)
    types, (_, true, _) = _types(counts)
    if not types:
        raise ValueError("y_true and y_pred hold no entity, so there is nothing to report")

    def scores(average, zero_division):
        parts = (_precision, "precision"), (_recall, "recall"), (_f1, "F1")
        return [_score(counts, None, *part, average, scheme, zero_division) for part in parts]

    each = zip(types, *scores(None, zero_division), true.tolist(), strict=True)
    means = [
        (f"{average} avg", *scores(average, float(zero_division)), true.sum())  # a warning is said above
        for average in ("micro", "macro", "weighted")
    ]
    return table(each, means, digits)


def entity_counts(y_true, y_pred, scheme=None) -> Totals:
    """right, true and predicted entities: Counters of types."""
    if isinstance(y_true, Totals):
        return y_true
    choice(scheme, tuple(SPELLINGS), "scheme")
    y_true, y_pred = _sentences(y_true, "y_true"), _sentences(y_pred, "y_pred")
    same_rows(y_true, y_pred, ("y_true", "y_pred"))
    right, true, predicted = Counter(), Counter(), Counter()
    read = {"O": ("O", None)}  # tag -> letter, type
    for row, (truth, tagged) in enumerate(zip(y_true, y_pred, strict=True)):
        if len(truth) != len(tagged):
            raise ValueError(
                f"sentence {row} has {len(truth)} tags in y_true and {len(tagged)} in y_pred; "
                "give one of each for each word"
            )
        spans = _spans(truth, scheme, read, f"y_true[{row}]"), _spans(tagged, scheme, read, f"y_pred[{row}]")
        for counter, found in zip((right, true, predicted), (spans[0] & spans[1], *spans), strict=True):
            counter.update(kind for kind, _, _ in found)
    return Totals(right, true, predicted)


def _spans(tags: list, scheme, read: dict, name: str) -> set[tuple[str, int, int]]:
    """(type, first, last + 1) of each entity of a sentence."""
    written, kinds, before = [], [], None
    for i, tag in enumerate(tags):
        if not isinstance(tag, str) or tag not in read:
            read[str(tag)] = _read(tag, scheme, f"{name}[{i}]")
        letter, kind = read[tag]
        written.append(("+" if kind == before else "|") + letter)
        kinds.append(kind)
        before = kind
    found = re.finditer(SPELLINGS[scheme], "".join(written))
    return {(kinds[m.start() // 2], m.start() // 2, m.end() // 2) for m in found}


def _read(tag, scheme, name: str) -> tuple[str, str]:
    """The letter and the type of a tag that is not O."""
    letters = LETTERS[scheme]
    if not isinstance(tag, str) or tag[:1] not in tuple(letters) or tag[1:2] not in ("", "-"):
        allowed = f"O, or one of {', '.join(letters)} and a type, as {letters[0]}-PER"
        hint = "; L and U need scheme='BILOU'" if scheme is None and str(tag)[:2] in ("L-", "U-") else ""
        raise ValueError(
            f"{name} is {tag!r}, which is no tag{f' of {scheme}' if scheme else ''}; give {allowed}{hint}"
        )
    kind = tag[2:] if scheme is None else tag[1:].strip("-")  # as seqeval's two readers
    return tag[0], kind or "_"


def _sentences(values, name: str) -> list:
    """A list of tags for each sentence, at least one sentence."""
    if isinstance(values, str) or not hasattr(values, "__len__") or not len(values):
        raise ValueError(f"{name} is {values!r}; give a list of tags for each of one or more sentences")
    for row, sentence in enumerate(values):
        if isinstance(sentence, str) or not hasattr(sentence, "__len__"):
            raise ValueError(f"{name}[{row}] is {sentence!r}; give a list of tags for each sentence")
    return values


# The numerator and the denominator of a score.
def _precision(right, true, predicted, n):
    return right, predicted


def _recall(right, true, predicted, n):
    return right, true


def _f1(right, true, predicted, n):
    return 2 * right, true + predicted


def _types(counts: Totals) -> tuple[list[str], np.ndarray]:
    """The types, sorted; their right, true and predicted entities, int64 (3, types)."""
    right, true, predicted = counts
    types = sorted(true | predicted)
    return types, np.array([[c[kind] for kind in types] for c in (right, true, predicted)], dtype=np.int64)


def _score(y_true, y_pred, parts, name: str, average, scheme, zero_division):
    choice(average, AVERAGES, "average")
    check_zero_division(zero_division)
    types, counts = _types(entity_counts(y_true, y_pred, scheme))
    if not types and average == "weighted":
        return float(zero_division)
    if not types and average == "macro":
        warn("y_true and y_pred hold no entity, so the mean over types is undefined: nan")
        return float("nan")
    return averaged(parts, name, *counts, 0, average, zero_division, "types")
