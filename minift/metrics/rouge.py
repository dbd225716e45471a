"""ROUGE: overlap of words, of word pairs, and of the longest common subsequence.

    P = overlap / size of the prediction,   R = overlap / size of the reference,   F1 = 2 P R / (P + R)
    rouge1, rouge2: overlap = sum over n-grams of the smaller of the two counts
    rougeL: overlap = length of the longest common subsequence of words

Words are runs of a-z and 0-9 after lower-casing, as in rouge-score; text in other scripts has no words and
scores 0. Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sections 2 and 3.
"""

import re
from collections import Counter

import numpy as np

VARIANTS = ("rouge1", "rouge2", "rougeL")


def rouge(predictions, references, per_row: bool = False) -> dict:
    """rouge1, rouge2, rougeL -> (precision, recall, f1), each the mean over rows.

    One prediction and one reference text for each row. `per_row` gives arrays (rows, 3) instead of means.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references are lists of texts, one for each row")
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references; give one reference "
            "for each prediction, and at least one row"
        )
    scores = np.array(
        [
            [_score(_words(p), _words(r), variant) for variant in VARIANTS]
            for p, r in zip(predictions, references, strict=True)
        ]
    )  # (rows, variants, 3)
    if per_row:
        return {variant: scores[:, i] for i, variant in enumerate(VARIANTS)}
    return {variant: tuple(scores[:, i].mean(axis=0).tolist()) for i, variant in enumerate(VARIANTS)}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _score(prediction: list[str], reference: list[str], variant: str) -> tuple[float, float, float]:
    if variant == "rougeL":
        overlap, n = lcs_length(prediction, reference), 1
    else:
        n = int(variant.removeprefix("rouge"))
        counts = [
            Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (prediction, reference)
        ]
        overlap = (counts[0] & counts[1]).total()
    P = overlap / max(1, len(prediction) - n + 1)
    R = overlap / max(1, len(reference) - n + 1)
    return P, R, 2 * P * R / (P + R) if overlap else 0.0


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, in O(len(a) len(b)).

    best[j] is the length for the words of `a` so far and the first j of `b`; one row of the table at a time:
    new[j] = max(best[j], best[j - 1] + match), then a running maximum stands for new[j - 1].
    """
    ids = {word: i for i, word in enumerate(set(b))}
    target = np.array([ids[word] for word in b], dtype=np.int64)
    best = np.zeros(len(b) + 1, dtype=np.int64)
    for word in a:
        matched = best[:-1] + (target == ids.get(word, -1))
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], matched))
    return int(best[-1])
