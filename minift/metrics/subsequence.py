"""The longest common subsequence (LCS) of words, a row of its table held as the bits of one integer.

L[i, j] = length of the LCS of the first i words of `a` and the first j of `b`. Down a column it grows by 0
or 1, so bit i - 1 of a row V_j says all: it is 0 where L[i, j] = L[i - 1, j] + 1. With M the places in `a`
of b's word j,

    U = V & M,   V <- (V + U) | (V - U)

and the length is the number of zeros. Source: Crochemore et al. 2001, "A fast and practical bit-vector
algorithm for the longest common subsequence problem"; Hyyro 2004, "Bit-parallel LCS-length computation
revisited", section 3.
"""


def places(words) -> dict:
    """word -> its places in `words`, as bits."""
    bits, bit = {}, 1
    for word in words:
        bits[word] = bits.get(word, 0) | bit
        bit <<= 1
    return bits


def lcs_length(a, b) -> int:
    """Length of the longest common subsequence of two sequences of words."""
    if len(a) < len(b):
        a, b = b, a
    bits, full = places(a), (1 << len(a)) - 1
    V = full
    for word in b:
        if M := bits.get(word):
            U = V & M
            V = (V + U) | (V - U)
    return len(a) - (V & full).bit_count()  # carries stand above


def lcs_places(bits: dict, size: int, b) -> int:
    """The places in `a` (of `size` words, `bits` its `places`) of one longest subsequence with `b`, as bits.

    Of several it is rouge-score's: from the ends of both, take words that are equal; else go back in `b`
    where L[i, j] = L[i - 1, j] + 1, and in `a` where not. So each word of `b` ends the walk through `a` at
    the last place, below the present one, that equals it or where the column grows.
    """
    full = (1 << size) - 1
    V, rows = full, []
    for word in b:
        M = bits.get(word, 0)
        U = V & M
        V = ((V + U) | (V - U)) & full
        rows.append((M, M | ~V))
    taken, below = 0, full
    for M, stops in reversed(rows):
        i = (stops & below).bit_length()
        last = 1 << i >> 1
        if M & last:
            taken |= last
            below = last - 1
        else:
            below = (1 << i) - 1
    return taken
