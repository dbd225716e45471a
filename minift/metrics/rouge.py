"""ROUGE: overlap of words, of word pairs, and of the longest common subsequence.

    P = overlap / size of the prediction,   R = overlap / size of the reference,   F1 = 2 P R / (P + R)
    rouge1 to rouge9: overlap = sum over n-grams of the smaller of the two counts; size in n-grams
    rougeL: overlap = length of the longest common subsequence (LCS) of words
    rougeLsum: overlap = sum over the reference's lines of the words in the union of the line's LCSs with
        each line of the prediction, each word at most as often as the prediction has it

Words are runs of a-z and 0-9 after lower-casing, as in rouge-score; text in other scripts has no words and
scores 0. Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sections 2 and 3.
"""

import re
from collections import Counter
from itertools import chain

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import flag, text_rows
from minift.metrics.porter import stem
from minift.metrics.subsequence import lcs_length, lcs_places, places
from minift.metrics.totals import Rows, Totals

VARIANTS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_words = re.compile("[a-z0-9]+").findall


def rouge(predictions, references, use_stemmer=False, per_row: bool = False, variants=VARIANTS) -> dict:
    """ROUGE-1, -2, -L and -Lsum: (precision, recall, F1) of the words that a text shares with its reference.

    P = overlap / size of the prediction,   R = overlap / size of the reference,   F1 = 2 P R / (P + R)

    Each the mean over rows; the overlaps stand at the head of this file. Of several references to a row the
    one with the best F1 counts, for each variant apart. `use_stemmer` compares words of more than three
    letters by their stems (porter.py). `variants` are rouge1 to rouge9, rougeL, rougeLsum; the last takes
    lines, split at newlines only, for sentences. `per_row` gives arrays (rows, 3) instead of means.
    Range: 0 to 1, higher is better.
    Use: summaries and short answers whose wording should follow the reference.
    Lies: a true paraphrase scores near 0, a negated copy near 1; text without Latin letters always 0; and
    without newlines rougeLsum is rougeL.
    Source: Lin 2004, sections 2 and 3; words, stems, ties and clipping of rouge-score 0.1.2.

    >>> rouge(["the cat sat"], ["the cat was here"], variants=["rouge1", "rouge2"])["rouge2"]
    (0.5, 0.3333333333333333, 0.4)
    """
    variants = _known(variants)
    statistics = rouge_rows(predictions, references, use_stemmer, per_row, variants)
    if per_row:
        (scores,) = statistics
        return {variant: scores[:, i] for i, variant in enumerate(variants)}
    rows, *units = statistics
    means = [exact.mean(total, rows) for total in units]
    return {variant: tuple(means[3 * i : 3 * i + 3]) for i, variant in enumerate(variants)}


def rouge_rows(predictions, references, use_stemmer=False, per_row=False, variants=VARIANTS) -> Totals | Rows:
    """Rows, and the exact sums of each variant's P, R, F1; with `per_row`, Rows of (rows, variants, 3)."""
    if isinstance(predictions, (Totals, Rows)):
        return predictions
    variants = _known(variants)
    flag(use_stemmer, "use_stemmer")
    predictions, references = text_rows(predictions, references, "predictions")
    scores = np.empty((len(predictions), len(variants), 3))
    for row, (prediction, own) in enumerate(zip(predictions, references, strict=True)):
        lines = _lines(prediction, use_stemmer)
        each = [_scores(lines, _lines(reference, use_stemmer), variants) for reference in own]
        scores[row] = [max(of_variant, key=lambda s: s[2]) for of_variant in zip(*each, strict=True)]
    if per_row:
        return Rows(scores)
    return Totals(len(scores), *map(exact.total, scores.reshape(len(scores), -1).T))


def _known(variants) -> tuple:
    variants = (variants,) if isinstance(variants, str) else tuple(variants)
    for variant in variants:
        if not re.fullmatch("rouge([1-9]|L|Lsum)", str(variant)):
            raise ValueError(f"variant {variant!r} is not one of rouge1 to rouge9, rougeL, rougeLsum")
    if not variants:
        raise ValueError(f"variants is empty; give at least one, as {VARIANTS}")
    return variants


def _lines(text: str, use_stemmer: bool) -> list[list[str]]:
    """The words of each line that has any."""
    lines = [words for line in text.lower().split("\n") if (words := _words(line))]
    if use_stemmer:
        return [[stem(word) if len(word) > 3 else word for word in line] for line in lines]
    return lines


def _scores(prediction: list, reference: list, variants) -> list[tuple[float, float, float]]:
    """(P, R, F1) of each variant."""
    p, r = (list(chain.from_iterable(lines)) for lines in (prediction, reference))
    longest = lcs_length(p, r) if "rougeL" in variants or "rougeLsum" in variants else 0
    scores = []
    for variant in variants:
        n = 1
        if variant == "rougeL" or (variant == "rougeLsum" and len(prediction) < 2 and len(reference) < 2):
            overlap = longest
        elif variant == "rougeLsum":
            overlap = _union_lcs(prediction, reference, p)
        else:
            n = int(variant[-1])
            overlap = _shared(_ngrams(p, n), _ngrams(r, n))
        P, R = overlap / max(1, len(p) - n + 1), overlap / max(1, len(r) - n + 1)
        scores.append((P, R, 2 * P * R / (P + R) if overlap else 0.0))
    return scores


def _ngrams(words: list[str], n: int):
    return words if n == 1 else zip(*(words[i:] for i in range(n)), strict=False)


def _shared(a, b) -> int:
    """Items in common, each as often as in the one that has fewer."""
    left, shared = Counter(b), 0
    for item in a:
        if left.get(item):
            left[item] -= 1
            shared += 1
    return shared


def _union_lcs(prediction: list, reference: list, words: list[str]) -> int:
    """Words of the reference in an LCS of their line with some line of the prediction.

    Of several LCSs of a pair of lines the union takes rouge-score's, see lcs_places.
    """
    common = []
    for line in reference:
        bits, union = places(line), 0
        for other in prediction:
            union |= lcs_places(bits, len(line), other)
        common += [word for i, word in enumerate(line) if union >> i & 1]
    return _shared(common, words)
