"""Diversity of generated texts: different n-grams, and how much a text repeats the others.

    distinct-n = different n-grams / all n-grams
    self-BLEU = mean over texts of the BLEU of the text with all others as its references

Self-BLEU would compare every text with every other. It does not: among all texts but one, the largest count
of an n-gram is the largest of all, or the second largest where that one text alone holds the largest.
Source: Li et al. 2016, "A diversity-promoting objective function for neural conversation models", section
5; Zhu et al. 2018, "Texygen: a benchmarking platform for text generation models", section 2.3.
"""

from bisect import bisect_left
from collections import Counter

import numpy as np

from minift.metrics.bleu import score_of, smoothing, tokenizer
from minift.metrics.checks import texts as checked_texts
from minift.metrics.checks import warn, whole
from minift.metrics.exact import mean, total
from minift.metrics.ngrams import ngrams, numbered, several, starts, tally
from minift.metrics.totals import Totals


def distinct_n(texts, n: int = 2) -> float:
    """The share of a set of texts' n-grams that are different from each other.

    distinct-n = different n-grams / n-grams, counted over all texts together

    Words are what stands between whitespace. 0 with a warning where no text has n words.
    Range: 0 to 1, higher is more diverse.
    Use: generated texts that become alike, or repeat themselves; n = 1 and 2 are usual.
    Lies: it falls with the amount of text, as words recur; compare sets of the same size only. Random words
    score highest.
    Source: Li et al. 2016, section 5; there the n-grams are scaled by the number of tokens.

    >>> distinct_n(["the cat sat", "the cat ran"], n=2)
    0.75
    """
    (counts,) = distinct_counts(texts, n)
    if not counts:
        warn(f"no text has {n} words, and distinct_n is taken as 0")
        return 0.0
    return len(counts) / counts.total()


def distinct_counts(texts, n: int = 2) -> Totals:
    """How often each n-gram of words occurs in all texts."""
    if isinstance(texts, Totals):
        return texts
    whole(n, "n")
    counts = Counter()
    for text in checked_texts(texts, "texts"):
        words = text.split()
        counts.update(zip(*(words[i:] for i in range(n)), strict=False))
    return Totals(counts)


def self_bleu(
    texts,
    tokenize: str = "13a",
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    lowercase: bool = False,
    effective_order: bool = True,
    max_ngram_order: int = 4,
) -> float:
    """How much the texts of a set repeat each other: the mean BLEU of each against all others.

    self-BLEU = mean over texts of sentence_bleu(text, all other texts)

    Time and memory grow with the number of words, not with the number of pairs of texts.
    Range: 0 to 100, lower is more diverse.
    Use: samples of one model for one kind of prompt.
    Lies: it rises with the number of texts, since more references match more; compare sets of one size.
    Noise scores 0, so look at quality beside it.
    Source: Zhu et al. 2018, section 2.3; BLEU as `sentence_bleu`.

    >>> round(self_bleu(["the cat sat on the mat", "the cat sat on the mat", "dogs bark at night"]), 2)
    66.67
    """
    value = smoothing(smooth_method, smooth_value)
    cut = tokenizer(tokenize, lowercase, max_ngram_order)
    texts = checked_texts(texts, "texts")
    if len(texts) < 2:
        raise ValueError("self_bleu of one text has nothing to compare it with; give at least two texts")
    tokens = list(map(cut, texts))
    lengths = np.array(list(map(len, tokens)))
    grams = ngrams(numbered([t for text in tokens for t in text]), lengths, max_ngram_order, len(texts))
    correct = np.transpose([_matches(*of_order, len(texts)) for of_order in grams])  # (texts, orders)
    totals = several(lengths, max_ngram_order).T
    near = _nearest(lengths.tolist())
    scores = [
        score_of(*counts, smooth_method, value, effective_order)[0]
        for counts in zip(correct.tolist(), totals.tolist(), lengths.tolist(), near, strict=True)
    ]
    return mean(total(scores), len(scores))


def _matches(gram: np.ndarray, bound: int, text: np.ndarray, texts: int) -> np.ndarray:
    """For each text its n-grams that another has too, each at most as often as one other; int64 (texts,)."""
    cell, count = tally(gram * texts + text)
    gram, text = np.divmod(cell, texts)
    first = starts(gram)
    size = np.diff(first, append=len(gram))
    most = np.repeat(np.maximum.reduceat(count, first), size)
    holders = np.repeat(np.add.reduceat(count == most, first, dtype=np.int64), size)
    second = np.repeat(np.maximum.reduceat(np.where(count < most, count, 0), first), size)
    elsewhere = np.where((count == most) & (holders == 1), second, most)
    return np.bincount(text, np.minimum(count, elsewhere), texts).astype(np.int64)


def _nearest(lengths: list[int]) -> list[int]:
    """For each length the nearest among the others, the shorter of two."""
    times = Counter(lengths)
    known = sorted(times)

    def nearest(length: int) -> int:
        if times[length] > 1:
            return length
        at = bisect_left(known, length)
        return min(known[max(at - 1, 0) : at] + known[at + 1 : at + 2], key=lambda n: (abs(n - length), n))

    return [nearest(length) for length in lengths]
