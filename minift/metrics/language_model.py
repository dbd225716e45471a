"""How well a language model predicts a text: nats per token, perplexity, bits per byte.

All come from two sums over the predicted tokens, the negative log-likelihood and a count:

    nats = sum over tokens of -ln p(token | tokens before it)

A token counts when it was predicted: neither padding nor the first one. Sums of batches may come as two
lists; they are added before anything is divided, so that a batch weighs what it has tokens.
"""

import math

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import choice, same_rows
from minift.metrics.totals import Totals

# Nats per token below which a sum is no rounding of a sure prediction but has the other sign.
NEGATIVE = -0.01


def cross_entropy(nats, tokens) -> float:
    """The mean negative log-likelihood of a token, in nats.

    H = nats / tokens

    nats and tokens: a sum and a count, or one of each for each batch. Infinite where a token had no
    probability, nan where the model's output was.
    Range: 0 to infinity, lower is better; ln V is what guessing among V tokens scores.
    Use: to compare models that share a tokenizer, on the same tokens.
    Lies: the mean of batches' means is another number; padding that counts as a token lowers it.
    Source: Shannon 1951, "Prediction and entropy of printed English".

    >>> cross_entropy([3.0, 9.0], [1, 9])
    1.2
    """
    return _mean(nll(nats, tokens), "tokens")


def perplexity(total, tokens, base: str = "nats") -> float:
    """exp of the mean negative log-likelihood of a token: as if choosing evenly among that many tokens.

    PPL = exp(nats / tokens) = 2^(bits / tokens)

    `base` says what `total` is a sum of, "nats" or "bits"; else as `cross_entropy`. Infinite where it is
    beyond the largest double.
    Range: 1 to infinity, lower is better; V is what guessing among V tokens scores.
    Use: to compare models that share a tokenizer, on the same tokens.
    Lies: a coarser vocabulary has fewer and harder tokens, so perplexities of two tokenizers do not compare
    (`bits_per_byte` do); strides without context raise it; the mean of batches' is another number.
    Source: Jelinek et al. 1977, "Perplexity - a measure of the difficulty of speech recognition tasks".

    >>> perplexity([20.0, 10.0], [7, 3], base="bits")
    8.0
    """
    choice(base, ("nats", "bits"), "base")
    mean = _mean(nll(total, tokens), "tokens")
    try:
        return math.exp(mean) if base == "nats" else 2.0**mean
    except OverflowError:
        return math.inf


def bits_per_byte(nats, bytes) -> float:
    """The mean negative log-likelihood of a byte of the text, in bits.

    BPB = nats / (bytes ln 2)

    bytes: the text's length in UTF-8, of all that the tokens in `nats` spell; else as `cross_entropy`.
    Range: 0 to infinity, lower is better; 8 is what guessing bytes scores.
    Use: to compare models whatever their tokenizers.
    Lies: a first token that was not predicted has bytes and no nats; three bytes a letter score low.
    Source: Gao et al. 2020, "The Pile", section 3.1.

    >>> round(bits_per_byte(100.0, len("naïve".encode()) * 12), 4)
    2.0037
    """
    return _mean(nll(nats, bytes), "bytes") / math.log(2)


def bits_per_character(nats, characters) -> float:
    """The mean negative log-likelihood of a character of the text, in bits.

    BPC = nats / (characters ln 2)

    characters: the text's length in code points; else as `bits_per_byte`.
    Range: 0 to infinity, lower is better; English is near 1 for people.
    Use: to compare models of one language whatever their tokenizers.
    Lies: as `bits_per_byte`; and a letter with its accent may be one code point or two.
    Source: Graves 2013, "Generating sequences with recurrent neural networks", section 3.

    >>> round(bits_per_character(100.0, len("naïve") * 12), 4)
    2.4045
    """
    return _mean(nll(nats, characters), "characters") / math.log(2)


def nll(total, count) -> Totals:
    """The exact sum of the finite totals, the sum of the others, and the sum of the counts."""
    if isinstance(total, Totals):
        return total
    totals, counts = np.atleast_1d(total), np.atleast_1d(count)
    if totals.ndim > 1 or counts.ndim > 1 or totals.dtype.kind not in "iuf":
        raise ValueError(f"total is {total!r}; give one sum, or a list with one for each batch")
    same_rows(totals, counts, ("the list of totals", "that of counts"))
    if counts.size and (counts.dtype.kind not in "iu" or (counts < 0).any()):
        raise ValueError(f"count is {count!r}; give integers of at least 0")
    totals = totals.astype(np.float64)
    if (wrong := totals < NEGATIVE * counts).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"a total of {totals[row]} over {counts[row]} is a log-likelihood; give the negative one, and of "
            "no tokens 0"
        )
    finite = np.isfinite(totals)
    if (wrong := finite & (counts == 0) & (totals > 0)).any():
        raise ValueError(f"a total of {totals[np.argmax(wrong)]} is of no tokens; count what it is a sum of")
    return Totals(exact.total(totals[finite]), float(totals[~finite].sum()), int(counts.sum()))


def _mean(sums: Totals, what: str) -> float:
    units, infinite, count = sums
    if count < 1:
        raise ValueError(f"a mean over {count} {what} is undefined; count at least one")
    return exact.mean(units, count) + infinite
