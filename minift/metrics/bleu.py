"""BLEU: n-grams that a translation shares with its references.

    p_n = sum over rows of clipped n-grams / sum over rows of n-grams of the hypothesis
    clipped: each n-gram counts as often as the hypothesis has it, but no more often than the reference that
             has it most
    bp = min(1, exp(1 - references' length / hypotheses' length)), of each row the reference nearest in
         length, the shorter of two
    BLEU = 100 bp exp(mean over n of log p_n)

smooth_method, for a p_n without a match ("add-k": for all n > 1), where the row or corpus has any match:
    "none"   p_n = 0, so BLEU = 0
    "floor"  p_n = smooth_value / n-grams
    "add-k"  p_n = (matches + smooth_value) / (n-grams + smooth_value)
    "exp"    p_n = 1 / (2^k n-grams) for the k-th such n

Source: Papineni et al. 2002, "BLEU: a method for automatic evaluation of machine translation", section 2;
Chen and Cherry 2014 (smoothing methods 1, 2, 3); the conventions of sacrebleu 2.6.0 (Post 2018).
"""

from collections import Counter
from dataclasses import dataclass
from math import exp, isfinite, log

import numpy as np

from minift.metrics.checks import choice, flag, text_rows, warn, whole
from minift.metrics.ngrams import blocks, clipped, numbered, several
from minift.metrics.signature import Result, case, signature, yes
from minift.metrics.tokenizers import TOKENIZERS
from minift.metrics.totals import Totals

SMOOTHING = {"exp": None, "floor": 0.1, "add-k": 1, "none": None}  # method -> default value
BLOCK = 1 << 16  # characters counted at a time, which bounds memory
TOKENIZED = 100  # hypotheses that end in " ." look like tokens, not text


@dataclass(frozen=True)
class Bleu(Result):
    """A score of 0 to 100, the numbers behind it, and how it was computed."""

    score: float
    precisions: list[float]
    bp: float
    sys_len: int
    ref_len: int
    counts: list
    totals: list
    signature: str

    def __str__(self) -> str:
        precisions = "/".join(f"{p:.1f}" for p in self.precisions)
        ratio = self.sys_len / self.ref_len if self.ref_len else 0
        return (
            f"BLEU = {self.score:.2f} {precisions} (BP = {self.bp:.3f} ratio = {ratio:.3f} "
            f"hyp_len = {self.sys_len} ref_len = {self.ref_len})"
        )


def bleu(
    hypotheses,
    references,
    tokenize: str = "13a",
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    lowercase: bool = False,
    effective_order: bool = False,
    max_ngram_order: int = 4,
) -> Bleu:
    """BLEU of a corpus: n-grams that hypotheses share with their references, with a penalty for brevity.

    BLEU = 100 bp exp(mean over n = 1 to max_ngram_order of log p_n), bp = min(1, exp(1 - ref_len / sys_len))

    p_n is a share of the n-grams of all rows together. `references` holds a string or a list of strings for
    each row. `effective_order` leaves out orders that no hypothesis is long enough for. Without any match
    the score is 0. The result has score, precisions, bp, sys_len, ref_len, counts, totals and a signature.
    Range: 0 to 100, higher is better.
    Use: systems on one test set with the same references, tokenizer and options, which the signature names.
    Lies: text that is tokenized before, or by another tokenizer, moves it by whole points; and the mean of
    sentences' scores is another number. A paraphrase without shared words scores 0.
    Source: Papineni et al. 2002, section 2; options, conventions and signature of sacrebleu 2.6.0.

    >>> print(bleu(["the cat sat on the mat"], ["the cat sat on a mat"]))
    BLEU = 53.73 83.3/60.0/50.0/33.3 (BP = 1.000 ratio = 1.000 hyp_len = 6 ref_len = 6)
    """
    value = smoothing(smooth_method, smooth_value)
    counts = bleu_counts(hypotheses, references, tokenize, lowercase, max_ngram_order)
    correct, total, lengths, numbers, tokenized = counts
    if tokenized >= TOKENIZED:
        warn(f"{tokenized} hypotheses end in ' .', as tokens do; BLEU cuts text into tokens itself")
    line = signature(
        numbers,
        case=case(lowercase),
        eff=yes(effective_order),
        tok=tokenize,
        smooth=smooth_method if value is None else f"{smooth_method}[{value:.2f}]",
    )
    score = score_of(
        correct.tolist(), total.tolist(), *lengths.tolist(), smooth_method, value, effective_order
    )
    return Bleu(*score, line)


def sentence_bleu(
    hypothesis,
    references,
    tokenize: str = "13a",
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    lowercase: bool = False,
    effective_order: bool = True,
    max_ngram_order: int = 4,
) -> Bleu:
    """BLEU of one sentence.

    BLEU = 100 bp exp(mean over n = 1 to max_ngram_order of log p_n), as `bleu` of a single row

    `references` is a string or a list of strings. Without `effective_order`, which sacrebleu's
    sentence_bleu has too, it warns, since a sentence of fewer words than max_ngram_order then scores 0.
    Range: 0 to 100, higher is better.
    Use: to find a system's worst sentences.
    Lies: smoothing decides a large part of it, and its mean over sentences is not `bleu`.
    Source: Chen and Cherry 2014; sacrebleu 2.6.0's sentence_score.

    >>> round(sentence_bleu("the cat", "the cat sat").score, 2)
    60.65
    """
    if not effective_order:
        warn("BLEU of a sentence shorter than max_ngram_order is 0; effective_order=True counts what it has")
    options = (tokenize, smooth_method, smooth_value, lowercase, effective_order, max_ngram_order)
    return bleu([hypothesis], [references], *options)


def bleu_counts(hypotheses, references, tokenize="13a", lowercase=False, max_ngram_order=4) -> Totals:
    """What BLEU counts.

    (clipped n-grams (orders,), n-grams (orders,), lengths (2,) of hypotheses and nearest references,
    a Counter of rows by their number of references, hypotheses that end in " .")
    """
    if isinstance(hypotheses, Totals):
        return hypotheses
    cut = tokenizer(tokenize, lowercase, max_ngram_order)
    hypotheses, references = text_rows(hypotheses, references)
    matches = np.zeros((2, max_ngram_order), np.int64)
    lengths = np.zeros(2, np.int64)
    rows = [[h, *own] for h, own in zip(hypotheses, references, strict=True)]
    for block in blocks(rows, BLOCK):
        tokens = [[cut(text) for text in row] for row in rows[block]]
        new_matches, new_lengths = _count(tokens, max_ngram_order)
        matches += new_matches
        lengths += new_lengths
    numbers = Counter(map(len, references))
    return Totals(*matches, lengths, numbers, sum(text.endswith(" .") for text in hypotheses))


def _count(rows: list[list[list[str]]], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Of rows of (hypothesis, references ...) as tokens: matches and n-grams (2, order), lengths (2,)."""
    row = np.repeat(np.arange(len(rows)), list(map(len, rows)))  # (texts,)
    side = np.concatenate([np.arange(len(texts)) for texts in rows])
    lengths = np.array([len(text) for texts in rows for text in texts])
    ids = numbered([token for texts in rows for text in texts for token in text])
    own = lengths[side == 0]
    matches = np.array([clipped(ids, lengths, row, side, order).sum(axis=1), several(own, order).sum(axis=1)])
    near = [
        min(map(len, others), key=lambda n: (abs(n - len(hypothesis)), n)) for hypothesis, *others in rows
    ]
    return matches, np.array([own.sum(), sum(near)])


def tokenizer(tokenize: str, lowercase: bool, max_ngram_order: int):
    """The function from a text to its tokens."""
    choice(tokenize, TOKENIZERS, "tokenize")
    whole(max_ngram_order, "max_ngram_order")
    flag(lowercase, "lowercase")
    cut = TOKENIZERS[tokenize]
    return lambda text: cut((text.lower() if lowercase else text).rstrip())


def smoothing(method: str, value: float | None) -> float | None:
    """The value that the method smooths with."""
    choice(method, SMOOTHING, "smooth_method")
    if value is None:
        return SMOOTHING[method]
    if SMOOTHING[method] is None:
        raise ValueError(f"smooth_value {value!r} is for 'floor' and 'add-k'; {method!r} takes none")
    if not (isinstance(value, (int, float)) and value >= 0 and isfinite(value)):
        raise ValueError(f"smooth_value {value!r} must be a finite number of at least 0")
    return value


def score_of(correct: list, total: list, sys_len: int, ref_len: int, method: str, value, effective: bool):
    """score, precisions, bp, sys_len, ref_len, and the counts, to which "add-k" adds."""
    bp = 1.0 if sys_len >= ref_len else exp(1 - ref_len / sys_len) if sys_len else 0.0
    precisions, orders, missed = [0.0] * len(correct), len(correct), 0
    numbers = (precisions, bp, sys_len, ref_len, correct, total)
    if not any(correct):
        return 0.0, *numbers
    for n in range(len(correct)):
        if method == "add-k" and n:
            correct[n] += value
            total[n] += value
        if not total[n]:
            break
        if effective:
            orders = n + 1
        if correct[n]:
            precisions[n] = 100 * correct[n] / total[n]
        elif method == "floor":
            precisions[n] = 100 * value / total[n]
        elif method == "exp":
            missed += 1
            precisions[n] = 100 / (2**missed * total[n])
    if not all(precisions[:orders]):
        return 0.0, *numbers
    return bp * exp(sum(map(log, precisions[:orders])) / orders), *numbers
