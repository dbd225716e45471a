"""The tables of the formats: code -> value in [-1, 1]. The only copy of NF4 and FP4.

NF4: 7 negative and 8 positive quantiles of the normal distribution, evenly spaced in probability, and zero;
each side scaled so that its extreme is 1 in size. Even for normal weights, and not symmetric.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.

FP4: sign, two bits of exponent, one of mantissa, largest value 1. The code is the bit pattern, so the table
is not sorted, and code 8 (minus zero) is stored as zero.

Dynamic 8-bit: sign, then a unary decimal exponent, the rest of the bits a linear fraction of its decade.
Source: Dettmers 2016, arXiv:1511.04561, section 3; Dettmers et al. 2022, arXiv:2110.02861, section 1.3.
"""

import torch

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(x / 12 for x in _FP4_TWELFTHS), 0.0, *(-x / 12 for x in _FP4_TWELFTHS[1:]))

# Two's complement bytes: 0 to 127, then -128 (never written) to -1.
INT8 = tuple((code if code < 128 else code - 256) / 127 for code in range(256))


def dynamic_map() -> tuple[float, ...]:
    """256 values, ascending. Decade 10^(i - 6) holds the middles of 2^i equal parts of [0.1, 1], i = 0 to 6.

    Zero and one complete the table, so that the smallest value is -0.99297 and not -1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        decade = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*decade.tolist(), *(-decade).tolist()]
    return tuple(sorted(values))
