"""chrF: F of the n-grams of characters, and with chrF++ of words, that a translation shares with a reference.

    P_n = shared n-grams / n-grams of the hypothesis,   R_n = shared n-grams / n-grams of the reference
    P, R = the means of P_n and R_n over the orders that both sides have
    chrF = 100 (1 + beta^2) P R / (beta^2 P + R)

The counts are sums over rows; of several references a row takes the one with its best F, the earlier of two.
A row whose reference has no n-gram of some order gives no n-grams of that order from its hypothesis either.
eps_smoothing takes the mean over all orders of F_n instead, with 1e-16 for a P_n or R_n without n-grams.

Source: Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation"; Popovic 2017, "chrF++:
words helping character n-grams"; the conventions of sacrebleu 2.6.0.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import isfinite
from string import punctuation

import numpy as np

from minift.metrics.checks import text_rows, whole
from minift.metrics.ngrams import blocks, clipped, numbered, several
from minift.metrics.signature import Result, case, signature, yes
from minift.metrics.totals import Totals

EPS = 1e-16
BLOCK = 1 << 13  # characters counted at a time, which bounds memory
PUNCTUATION = frozenset(punctuation)


@dataclass(frozen=True)
class Chrf(Result):
    """A score of 0 to 100, and how it was computed."""

    score: float
    char_order: int
    word_order: int
    beta: float
    signature: str

    def __str__(self) -> str:
        return f"chrF{self.beta}{'+' * self.word_order} = {self.score:.2f}"


def chrf(
    hypotheses,
    references,
    char_order: int = 6,
    word_order: int = 0,
    beta: float = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> Chrf:
    """F of the n-grams of characters that hypotheses share with references; chrF++ is word_order=2.

    chrF = 100 (1 + beta^2) P R / (beta^2 P + R), P and R the means over orders of P_n and R_n

    `references` holds a string or a list of strings for each row. Recall weighs beta times as much as
    precision. Characters are taken without whitespace unless `whitespace`. The result has score and a
    signature.
    Range: 0 to 100, higher is better.
    Use: languages with rich endings, or without spaces between words, where whole words rarely match.
    Lies: unrelated text of one language shares letters and scores 15 or so, not 0; and with beta = 2 an
    output that holds the reference and as much again still scores about 83.
    Source: Popovic 2015 and 2017; options, conventions and signature of sacrebleu 2.6.0.

    >>> print(chrf(["the cats sat"], ["the cat sat"]), chrf(["the cats sat"], ["the cat sat"], word_order=2))
    chrF2 = 74.78 chrF2++ = 64.44
    """
    options = (char_order, word_order, beta, lowercase, whitespace, eps_smoothing)
    counts, numbers = chrf_counts(hypotheses, references, *options)
    line = signature(
        numbers,
        case=case(lowercase),
        eff=yes(not eps_smoothing),
        nc=char_order,
        nw=word_order,
        space=yes(whitespace),
    )
    score = float(_f(counts[None], beta, eps_smoothing)[0])
    return Chrf(score, char_order, word_order, beta, line)


def sentence_chrf(
    hypothesis,
    references,
    char_order: int = 6,
    word_order: int = 0,
    beta: float = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> Chrf:
    """chrF of one sentence.

    chrF = 100 (1 + beta^2) P R / (beta^2 P + R), as `chrf` of a single row

    `references` is a string or a list of strings, of which the best counts.
    Range: 0 to 100, higher is better.
    Use: to rank single outputs; it needs no smoothing, as characters nearly always share something.
    Lies: its mean over sentences is not `chrf`; short texts move it by tens of points for one letter.
    Source: sacrebleu 2.6.0's sentence_score.

    >>> sentence_chrf("a cat", ["the cat", "a cat"]).score
    100.0
    """
    options = (char_order, word_order, beta, lowercase, whitespace, eps_smoothing)
    return chrf([hypothesis], [references], *options)


def chrf_counts(
    hypotheses,
    references,
    char_order=6,
    word_order=0,
    beta=2,
    lowercase=False,
    whitespace=False,
    eps_smoothing=False,
) -> Totals:
    """What chrF counts, of each row against its best reference.

    (int64 (orders, 3): n-grams of hypothesis and reference, shared; a Counter of rows by their references)
    """
    if isinstance(hypotheses, Totals):
        return hypotheses
    for name, order in (("char_order", char_order), ("word_order", word_order)):
        whole(order, name, 0)
    if not char_order + word_order:
        raise ValueError("char_order and word_order are both 0; give one of them n-grams to count")
    if not (isinstance(beta, (int, float)) and beta >= 0 and isfinite(beta)):
        raise ValueError(f"beta {beta!r} must be a finite number of at least 0")
    hypotheses, references = text_rows(hypotheses, references)
    counts = np.zeros((char_order + word_order, 3), np.int64)
    rows = [[h, *own] for h, own in zip(hypotheses, references, strict=True)]
    for block in blocks(rows, BLOCK):
        sizes = np.array(list(map(len, references[block])))
        texts = [text for h, *own in rows[block] for reference in own for text in (h, reference)]
        if lowercase:
            texts = [text.lower() for text in texts]
        kinds = [(*_characters(texts, whitespace), char_order)] if char_order else []
        kinds += [(*_words(texts), word_order)] if word_order else []
        pairs = np.concatenate([_shared(*kind) for kind in kinds], axis=1)
        # (pairs of hypothesis and reference, orders, 3)
        if sizes.max() > 1:
            pairs = pairs[_best(_f(pairs, beta, eps_smoothing), sizes)]
        counts += pairs.sum(axis=0)
    return Totals(counts, Counter(map(len, references)))


def _characters(texts: list[str], whitespace: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all characters (characters,) and the texts' lengths (texts,)."""
    if not whitespace:
        texts = ["".join(text.split()) for text in texts]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    occur = np.zeros(int(codes.max(initial=0)) + 1, np.int64)
    occur[codes] = 1
    return (np.cumsum(occur) - 1)[codes], np.array(list(map(len, texts)))


def _words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of all words (words,) and of the words of each text (texts,)."""
    words = [list(chain.from_iterable(map(_without_mark, text.split()))) for text in texts]
    return numbered(list(chain.from_iterable(words))), np.array(list(map(len, words)))


@lru_cache(maxsize=1 << 16)
def _without_mark(word: str) -> tuple[str, ...]:
    """The word and one mark of punctuation from its end or else from its start."""
    if len(word) > 1 and word[-1] in PUNCTUATION:
        return word[:-1], word[-1]
    if len(word) > 1 and word[0] in PUNCTUATION:
        return word[0], word[1:]
    return (word,)


def _shared(ids: np.ndarray, lengths: np.ndarray, order: int) -> np.ndarray:
    """n-grams of hypothesis and reference, and shared, for texts in pairs; int64 (pairs, order, 3)."""
    text = np.arange(len(lengths))
    own, other = several(lengths[0::2], order), several(lengths[1::2], order)  # (order, pairs)
    return np.stack((own * (other > 0), other, clipped(ids, lengths, text // 2, text % 2, order))).T


def _best(f: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The place of the first largest of each row's `sizes` entries of f."""
    first = np.cumsum(sizes) - sizes
    largest = np.flatnonzero(f == np.repeat(np.maximum.reduceat(f, first), sizes))
    return largest[np.searchsorted(largest, first)]


def _f(counts: np.ndarray, beta: float, eps_smoothing: bool) -> np.ndarray:
    """F of 0 to 100 from n-grams (rows, orders, 3); float64 (rows,)."""
    hypothesis, reference, shared = np.moveaxis(counts, 2, 0)  # (rows, orders)
    P = np.where(hypothesis > 0, shared / np.maximum(hypothesis, 1), EPS)
    R = np.where(reference > 0, shared / np.maximum(reference, 1), EPS)
    if eps_smoothing:
        return 100 * _sum(_f_beta(P, R, beta, EPS)) / counts.shape[1]
    both = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(both.sum(axis=1), 1)
    return 100 * _f_beta(_sum(np.where(both, P, 0)) / orders, _sum(np.where(both, R, 0)) / orders, beta, 0.0)


def _f_beta(P: np.ndarray, R: np.ndarray, beta: float, otherwise: float) -> np.ndarray:
    under = beta**2 * P + R
    return np.where(under > 0, (1 + beta**2) * P * R / np.where(under > 0, under, 1), otherwise)


def _sum(values: np.ndarray) -> np.ndarray:
    """Over orders, from the first on, as roundings decide between references of nearly equal F."""
    return np.cumsum(values, axis=1)[:, -1]
