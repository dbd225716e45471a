"""The contract of quantized weights: what a Format computes and where a Layout puts its bytes.

A weight of n elements, flattened, is cut into blocks of `block_size` (the last may be short, and a block may
straddle rows). Each block keeps absmax = max |w|, and each element the code of a number in [-1, 1]:

    code = encode(w / absmax),   dequantized = codebook[code] * absmax, in fp32, rounded once to the dtype

A block whose absmax is below 2^-126, the smallest normal fp32, is a block of zeros: absmax 0, codes of zero.
4-bit codes are packed two to a byte, the first in the high nibble; an odd one has the code of zero after it.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod

import torch

from minift.kernels.dequantize_4bit import BLOCK_SIZES, dequantize_4bit
from minift.kernels.dequantize_int8 import dequantize_int8
from minift.kernels.packed import NESTED_BLOCK, Packed
from minift.kernels.quantize_4bit import quantize_4bit

CHUNK = 2**18  # elements in flight where a format is computed in torch


class NotFinite(ValueError):
    """A number that would destroy its block and, under double quantization, the whole tensor."""


@dataclass(frozen=True)
class Format:
    """A table of numbers. A new 4-bit format is a name and 16 of them; 8-bit ones have their own `encode`.

    The work is done by the ops of minift.kernels, which take the table as an argument.
    """

    name: str
    bits: int  # 4 or 8
    codebook: tuple[float, ...]  # code -> value in [-1, 1], rounded to fp32

    def __post_init__(self):
        count = 2**self.bits if self.bits in (4, 8) else 0
        if len(self.codebook) != count or 0 not in self.codebook:
            raise ValueError(
                f"format {self.name}: {self.bits} bits with {len(self.codebook)} numbers; a format has 16 "
                "numbers for 4 bits or 256 for 8, and zero is one of them"
            )

    def quantize(self, flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """flat (n,), fp32, bf16 or fp16 -> packed (ceil(n bits / 8),) uint8, absmax (blocks,) fp32.

        The nearest value of the table; on a midpoint, the fp32 mean of two neighbours, the lower one.
        """
        packed, absmax = self.encode(flat, block_size)
        if not torch.isfinite(absmax).all():
            raise NotFinite
        return packed, absmax

    def encode(self, flat, block_size):
        """`quantize`, with an infinite or NaN absmax where a block holds such a number."""
        return quantize_4bit(flat, self.values(flat.device), block_size)

    def dequantize(self, packed: Packed, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Elements `first` (of a block) and on of the flattened weight into out, any floating dtype."""
        return (dequantize_4bit if self.bits == 4 else dequantize_int8)(packed, out, first)

    def __hash__(self):  # of a key of caches that every product looks into
        return hash(self.name)

    @property
    def bound(self) -> float:
        """Largest |w - dequantized| / absmax in exact arithmetic: half of the widest gap in [-1, 1]."""
        values = sorted(self.values("cpu").double().tolist())
        return max([(b - a) / 2 for a, b in pairwise(values)] + [values[0] + 1, 1 - values[-1]])

    def bytes(self, shape, block_size: int = 64, double_quant: bool = True) -> int:
        """The storage law: what a weight of this shape takes."""
        return sum(Layout(self, tuple(shape), block_size, double_quant).sizes().values())

    @cache  # noqa: B019
    def values(self, device) -> torch.Tensor:
        """The codebook as fp32; made outside inference mode, so that training may keep it later."""
        with torch.inference_mode(False):
            return torch.tensor(self.codebook, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Layout:
    """What a quantized weight is stored as. Everything is 1-D uint8, fp32 numbers as their bytes.

    uint8 parameters shard under FSDP2 unchanged, and no policy for mixed precision rounds the scales.
    """

    format: Format
    shape: tuple[int, ...]
    block_size: int
    double_quant: bool

    def __post_init__(self):
        if type(self.double_quant) is not bool:
            raise ValueError(f"double_quant is {self.double_quant!r}; it is True or False")
        if self.block_size not in BLOCK_SIZES or type(self.block_size) is not int:
            raise ValueError(
                f"block_size is {self.block_size!r}; supported: {', '.join(map(str, BLOCK_SIZES))}"
            )

    @property
    def n(self) -> int:
        return prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block_size)

    def sizes(self) -> dict[str, int]:
        """Tensor -> bytes. packed: the codes. absmax: fp32, or one code a block under double quantization.

        NF4 in blocks of 64, double quantization: n/2 + n/64 + 4 n / (64 * 256) + 4, each rounded up.
        """
        packed = -(-self.n * self.format.bits // 8)
        if not self.double_quant:
            return {"packed": packed, "absmax": 4 * self.blocks}
        groups = -(-self.blocks // NESTED_BLOCK)
        return {"packed": packed, "absmax": self.blocks, "nested_absmax": 4 * groups, "offset": 4}
