"""Short answers to questions, as SQuAD counts them: exact match, and F1 of the words.

Both compare normalised answers. A reference that normalises to nothing counts only where all of the row's do;
then it stands for "no answer", which an empty prediction gets right.
Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1;
empty answers as in Rajpurkar et al. 2018, "Know What You Don't Know".
"""

import re
from collections import Counter
from string import punctuation

from minift.metrics import exact
from minift.metrics.checks import text_rows
from minift.metrics.totals import Totals

_PUNCTUATION = str.maketrans("", "", punctuation)


def normalize_answer(text: str) -> str:
    """In lower case, without ASCII punctuation, then without the words a, an, the, with single spaces.

    >>> normalize_answer("The  U.S. Army!")
    'us army'
    """
    return " ".join(re.sub(r"\b(?:an?|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions, references) -> float:
    """The share of answers that equal one of their references, both normalised.

    EM = rows with normalize_answer(prediction) = normalize_answer(one of the references) / rows

    References are a string for each row, or a list of them; "" stands for a question without an answer.
    Range: 0 to 1, higher is better.
    Use: names, dates and numbers, which are right or wrong.
    Lies: "in 1990" for "1990" scores 0, and "3.5" is "35" once its point is gone.
    Source: Rajpurkar et al. 2016, section 6.1; the official script of SQuAD 2.0.

    >>> exact_match(["The Eiffel Tower", "Rome"], [["Eiffel tower"], ["Paris", "Lyon"]])
    0.5
    """
    right, rows = exact_matches(predictions, references)
    return right / rows


def token_f1(predictions, references) -> float:
    """F1 of an answer's words against its best reference, both normalised; the mean over rows.

    F1 = 2 P R / (P + R),   P = common words / the prediction's,   R = common words / the reference's

    Common words count each as often as on the side that has fewer. Where one side has no words, the score is
    1 if both have none, else 0. References as in `exact_match`.
    Range: 0 to 1, higher is better.
    Use: answers that are spans of text, whose ends may differ.
    Lies: order and negation do not count: "not guilty" scores 2/3 for "guilty".
    Source: Rajpurkar et al. 2016, section 6.1; the official script of SQuAD 2.0.

    >>> token_f1(["not guilty"], ["guilty"])
    0.6666666666666666
    """
    units, rows = token_f1s(predictions, references)
    return exact.mean(units, rows)


def exact_matches(predictions, references) -> Totals:
    """Rows that are right, and rows."""
    if isinstance(predictions, Totals):
        return predictions
    rows = _normalized(predictions, references)
    return Totals(sum(prediction in own for prediction, own in rows), len(rows))


def token_f1s(predictions, references) -> Totals:
    """The exact sum of the rows' F1, and the rows."""
    if isinstance(predictions, Totals):
        return predictions
    rows = _normalized(predictions, references)
    scores = [max(_f1(prediction.split(), r.split()) for r in own) for prediction, own in rows]
    return Totals(exact.total(scores), len(rows))


def _normalized(predictions, references) -> list[tuple[str, list[str]]]:
    predictions, references = text_rows(predictions, references, "predictions")
    rows = []
    for prediction, own in zip(predictions, references, strict=True):
        own = [answer for text in own if (answer := normalize_answer(text))]
        rows.append((normalize_answer(prediction), own or [""]))
    return rows


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    common = (Counter(prediction) & Counter(reference)).total()
    P, R = common / len(prediction), common / len(reference)
    return 2 * P * R / (P + R) if common else 0.0
