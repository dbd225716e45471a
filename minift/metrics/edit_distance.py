"""Edit distance, and the error rates of recognised speech and handwriting that count by it.

D[i, j] = least number of insertions, deletions and substitutions from the first i items of `a` to the first
j of `b`. Along a row it changes by -1, 0 or 1, so a row is two integers of a bit for each item of `b`: `up`
where it grows, `down` where it falls. The next row follows from the places of the next item alone.

Source: Levenshtein 1966, "Binary codes capable of correcting deletions, insertions, and reversals"; Myers
1999, "A fast bit-vector algorithm for approximate string matching based on dynamic programming", section 3,
in the form of Hyyro 2003, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances".
"""

from minift.metrics.checks import same_rows, texts
from minift.metrics.subsequence import places
from minift.metrics.totals import Totals


def edit_distance(a, b) -> int:
    """The Levenshtein distance: insertions, deletions and substitutions from one sequence to the other.

    D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + (a_i != b_j)),   D[i, 0] = i,   D[0, j] = j

    Two strings, or two sequences of items that compare with == and hash, as words or ids of tokens.
    Range: 0 (equal) to the longer length; a metric in the mathematical sense.
    Use: how much typing lies between two texts.
    Lies: swapping two letters costs 2, moving a paragraph its whole length; and a string's letters are code
    points, so "é" in two of them differs from "é" in one.
    Source: Levenshtein 1966; computed as Myers 1999.

    >>> edit_distance("rain", "shine")
    3
    """
    if isinstance(a, str) != isinstance(b, str):
        raise ValueError(f"a is {type(a).__name__} and b {type(b).__name__}; give both strings or both lists")
    a, b = (side if isinstance(side, str) else list(side) for side in (a, b))
    if len(a) < len(b):
        a, b = b, a
    full = (1 << len(b)) - 1
    bits, row = places(b), (full, 0)
    for item in a:
        row = next_row(*row, bits.get(item, 0), full)
    return len(a) + row[0].bit_count() - row[1].bit_count()


def next_row(up: int, down: int, M: int, full: int) -> tuple[int, int]:
    """The row D[i] from D[i-1], with M the places in `b` of a's item i.

    Bit j - 1 of `keeps` says D[i, j] = D[i-1, j-1]; of `more` and `less`, D[i, j] = D[i-1, j] + 1 and - 1.
    """
    keeps = (((M & up) + up) ^ up) | M | down
    more = (down | ~(keeps | up)) << 1 | 1  # both now for j - 1, and D[i, 0] = D[i-1, 0] + 1
    less = (up & keeps) << 1
    return (less | ~(keeps | more)) & full, more & keeps & full


def word_error_rate(hypotheses, references) -> float:
    """Edits of words from the hypotheses to the references, for each word of the references.

    WER = sum over rows of edit_distance(words) / sum over rows of the reference's words

    Words are what whitespace separates; case and punctuation count, so normalise both sides first. A
    reference may be empty, but not all.
    Range: 0 upwards, lower is better; above 1 where much is inserted.
    Use: transcripts of speech.
    Lies: "a" for "the" costs what "can't" for "can" costs; spelling of numbers can be most of it.
    Source: as the mean of jiwer and of the NIST evaluations, over the corpus and not over rows.

    >>> word_error_rate(["the cat sat mat"], ["the cat sat on the mat"])
    0.3333333333333333
    """
    return _rate(word_errors(hypotheses, references), "words")


def character_error_rate(hypotheses, references) -> float:
    """Edits of characters from the hypotheses to the references, for each character of the references.

    CER = sum over rows of edit_distance(characters) / sum over rows of the reference's characters

    Characters are code points; spaces count, but not those around a text. A reference may be empty, but not
    all.
    Range: 0 upwards, lower is better; above 1 where much is inserted.
    Use: transcripts in scripts without spaces, handwriting, names.
    Lies: a text in another Unicode normal form is full of errors that nobody sees.
    Source: as `word_error_rate`.

    >>> character_error_rate(["wird"], ["word"])
    0.25
    """
    return _rate(character_errors(hypotheses, references), "characters")


def word_errors(hypotheses, references) -> Totals:
    """Edits, and the references' words."""
    return _errors(hypotheses, references, str.split)


def character_errors(hypotheses, references) -> Totals:
    """Edits, and the references' characters."""
    return _errors(hypotheses, references, str.strip)


def _errors(hypotheses, references, items) -> Totals:
    if isinstance(hypotheses, Totals):
        return hypotheses
    hypotheses, references = texts(hypotheses, "hypotheses"), texts(references, "references")
    same_rows(hypotheses, references, ("hypotheses", "references"))
    pairs = [(items(h), items(r)) for h, r in zip(hypotheses, references, strict=True)]
    return Totals(sum(edit_distance(h, r) for h, r in pairs), sum(len(r) for _, r in pairs))


def _rate(totals: Totals, what: str) -> float:
    edits, length = totals
    if not length:
        raise ValueError(f"the references have no {what}; give at least one that has")
    return edits / length
