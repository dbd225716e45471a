"""TER: the edits that turn a translation into its reference, where moving a block of words is one edit.

    TER = 100 sum over rows of least edits(hypothesis, reference) / sum over rows of references' mean length
    edits: insertions, deletions, substitutions and shifts of words, as shifts.py searches them

Words are what whitespace separates, in lower case, after the rules of Tercom's tokenizer where asked for.
Source: Snover et al. 2006, "A Study of Translation Edit Rate with Targeted Human Annotation", section 2; the
conventions of sacrebleu 2.6.0.
"""

import re
from collections import Counter
from dataclasses import dataclass

from minift.metrics import exact
from minift.metrics.checks import text_rows
from minift.metrics.shifts import edits
from minift.metrics.signature import Result, case, signature, yes
from minift.metrics.tokenizers import ENTITIES
from minift.metrics.totals import Totals

WESTERN = [  # pattern, replacement, in this order; compiled at first use
    (pattern, new)
    for pattern, new in (
        (r"([!\"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])", r" \1 "),
        (r"'s ", " 's "),
        (r"([^0-9])([.,])", r"\1 \2 "),  # but not after a digit
        (r"([.,])([^0-9])", r" \1 \2"),  # nor before one
        (r"([0-9])-", r"\1 - "),
    )
]
PUNCTUATION = str.maketrans("", "", '.,?:;!"()')
# Brackets, stops and middle dots of Chinese and Japanese, and the full-width forms of the Latin ones.
ASIAN_PUNCTUATION = "\u3001\u3002\u3008-\u3011\u3014-\u301f\uff61-\uff65\u30fb．，？：；！＂（）"
# Blocks of characters that stand for words; not hiragana and katakana.
ASIAN_WORDS = "\u2e80-\u2eff\u31c0-\u31ef\u3200-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f"
ASIAN = f"([{ASIAN_WORDS}{ASIAN_PUNCTUATION}])"
ASIAN_DROPPED = f"[{ASIAN_PUNCTUATION}]"


@dataclass(frozen=True)
class Ter(Result):
    """A score of 0 upwards, 100 for an edit a word, and how it was computed."""

    score: float
    num_edits: int
    ref_length: float
    signature: str

    def __str__(self) -> str:
        return f"TER = {self.score:.2f}"


def ter(
    hypotheses,
    references,
    normalized: bool = False,
    no_punct: bool = False,
    asian_support: bool = False,
    case_sensitive: bool = False,
) -> Ter:
    """Translation edit rate: edits, with moves of blocks, from hypotheses to references, per 100 words.

    TER = 100 sum over rows of least edits / sum over rows of the mean length of the row's references

    `references` holds a string or a list of strings for each row. `normalized` separates punctuation by
    Tercom's rules, `no_punct` drops it, `asian_support` does either also for Chinese and Japanese, whose
    ideographs it then separates. Where all references are empty it is 100, or 0 if the hypotheses are too.
    The result has score, num_edits, ref_length and a signature.
    Range: 0 upwards, lower is better; above 100 where there is more to correct than to keep.
    Use: how much work a translator has left with a translation.
    Lies: one wrong letter costs a word; the search is greedy and limited, so a row may have more edits than
    needed; and scores with and without `normalized` do not compare.
    Source: Snover et al. 2006, section 2; search, tokens and signature of sacrebleu 2.6.0.

    >>> print(ter(["on the mat the cat sat"], ["the cat sat on the mat"]))
    TER = 16.67
    """
    options = (normalized, no_punct, asian_support, case_sensitive)
    number, length, numbers = ter_counts(hypotheses, references, *options)
    length = exact.value(length)
    score = 100 * (number / length) if length else 100.0 * bool(number)
    line = signature(
        numbers,
        case=case(not case_sensitive),
        tok="tercom",
        norm=yes(normalized),
        punct=yes(not no_punct),
        asian=yes(asian_support),
    )
    return Ter(score, number, length, line)


def ter_counts(
    hypotheses,
    references,
    normalized: bool = False,
    no_punct: bool = False,
    asian_support: bool = False,
    case_sensitive: bool = False,
) -> Totals:
    """Edits, the exact sum of the references' mean lengths, and a Counter of rows by number of references."""
    if isinstance(hypotheses, Totals):
        return hypotheses
    hypotheses, references = text_rows(hypotheses, references)
    options = (normalized, no_punct, asian_support, case_sensitive)
    number, lengths = 0, []
    for hypothesis, own in zip(hypotheses, references, strict=True):
        h, *own = (words(text, *options) for text in (hypothesis, *own))
        own = [words(" ".join(r), *options) for r in own]  # twice, which can matter: "2's。"; so is sacrebleu
        number += min(edits(h, r) for r in own)
        lengths.append(sum(map(len, own)) / len(own))
    return Totals(number, exact.total(lengths), Counter(map(len, references)))


def words(
    text: str, normalized=False, no_punct=False, asian_support=False, case_sensitive=False
) -> list[str]:
    """The words of a text by the rules of Tercom's tokenizer."""
    text = text.rstrip()
    if not case_sensitive:
        text = text.lower()
    if normalized:
        text = text.replace("\n-", "").replace("\n", " ")  # joins words that were broken
        for entity, character in ENTITIES:
            text = text.replace(entity, character)
        text = f" {text} "
        for pattern, new in WESTERN:
            text = re.sub(pattern, new, text)
        if asian_support:
            text = re.sub(ASIAN, r" \1 ", text)
    if no_punct:
        text = text.translate(PUNCTUATION)
        if asian_support:
            text = re.sub(ASIAN_DROPPED, "", text)
    return text.split()
