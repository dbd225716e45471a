"""METEOR without synonyms: words aligned by form and by stem, and a penalty for each break of the order."""

from minift.metrics import exact
from minift.metrics.checks import text_rows
from minift.metrics.porter import stem
from minift.metrics.totals import Totals


def meteor(predictions, references, alpha: float = 0.9, beta: float = 3.0, gamma: float = 0.5) -> float:
    """METEOR of exact words and stems: a mean of precision and recall, less a penalty for broken order.

    P = matched words / the prediction's,   R = matched words / the reference's
    F = P R / (alpha P + (1 - alpha) R)
    METEOR = F (1 - gamma (chunks / matched words)^beta);   0 where nothing matches

    A chunk is a run of matched words that follow each other in both texts. Words are matched first by form,
    then by Porter's stem (porter.py), as NLTK does: each stage goes through the prediction from its end, and
    takes the last word of the reference that is free. Words are what whitespace separates, in lower case, so
    separate the punctuation first. Of several references the best counts; the mean over rows.
    Range: 0 to 1, higher is better; a copy of n words scores 1 - gamma / n^beta.
    Use: translations, sentence by sentence, where recall counts more than precision.
    Lies: without WordNet's synonyms it is below the published METEOR; stems are English; and the greedy
    choice among repeated words can break an order that another alignment keeps.
    Source: Lavie and Agarwal 2007, "METEOR: An Automatic Metric for MT Evaluation with High Levels of
    Correlation with Human Judgments", section 2; defaults and alignment of NLTK's meteor_score.

    >>> meteor(["on the mat sat the cat"], ["the cat sat on the mat"])
    0.5
    """
    for name, value, most in (("alpha", alpha, 1), ("beta", beta, float("inf")), ("gamma", gamma, 1)):
        if not 0 <= value <= most:
            raise ValueError(f"{name} {value!r} is not a number from 0 to {most}")
    units, rows = meteor_rows(predictions, references, alpha, beta, gamma)
    return exact.mean(units, rows)


def meteor_rows(predictions, references, alpha: float = 0.9, beta: float = 3.0, gamma: float = 0.5) -> Totals:
    """The exact sum of the rows' scores, and the rows."""
    if isinstance(predictions, Totals):
        return predictions
    predictions, references = text_rows(predictions, references, "predictions")
    scores = []
    for prediction, own in zip(predictions, references, strict=True):
        p = prediction.lower().split()
        scores.append(max(_score(p, reference.lower().split(), alpha, beta, gamma) for reference in own))
    return Totals(exact.total(scores), len(scores))


def _score(p: list[str], r: list[str], alpha: float, beta: float, gamma: float) -> float:
    pairs = align(p, r)
    if not pairs:
        return 0.0
    P, R = len(pairs) / len(p), len(pairs) / len(r)
    F = P * R / (alpha * P + (1 - alpha) * R)
    chunks = sum((i - 1, j - 1) not in pairs for i, j in pairs)
    return (1 - gamma * (chunks / len(pairs)) ** beta) * F


def align(p: list[str], r: list[str]) -> set[tuple[int, int]]:
    """(place in p, place in r) of words matched by form, then of those left matched by stem."""
    pairs, p, r = set(), dict(enumerate(p)), dict(enumerate(r))
    for form in (str, stem):
        free = {}  # form -> places in r
        for j, word in r.items():
            free.setdefault(form(word), []).append(j)
        for i, word in reversed(list(p.items())):
            if places := free.get(form(word)):
                j = places.pop()
                pairs.add((i, j))
                del p[i], r[j]
    return pairs
