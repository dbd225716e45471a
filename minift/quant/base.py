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

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256  # of the second quantization, as in bitsandbytes
CHUNK = 2**18  # elements quantized at a time
CELLS = 4096  # of [-1, 1]; FP4's nearest midpoints are 0.0026 apart, 5 cells
TINY = torch.finfo(torch.float32).tiny


class NotFinite(ValueError):
    """A number that would destroy its block and, under double quantization, the whole tensor."""


@dataclass(frozen=True)
class Format:
    """A table of numbers. A new 4-bit format is a name and 16 of them; 8-bit ones have their own `encode`."""

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

    def encode(self, blocks: torch.Tensor, absmax: torch.Tensor, short: bool) -> torch.Tensor:
        """Codes (uint8) of fp32 blocks (b, size): the nearest value; on a midpoint, the lower one.

        A midpoint is the fp32 mean of two neighbours. A cell of [-1, 1] holds at most one of them, so a
        look-up and one comparison count the midpoints below a number exactly.
        """
        scaled = self.scale(blocks, absmax, short).view(-1)
        below, midpoint, order = self.cells(scaled.device)
        cell = _cell(scaled)
        index = below.index_select(0, cell)
        index += (scaled > midpoint.index_select(0, cell)).view(torch.uint8)
        if order is not None:
            index = order.index_select(0, index.int())
        return index.view(blocks.shape)

    @cache  # noqa: B019 (formats live as long as the process)
    def cells(self, device):
        """Cell -> midpoints in lower cells (uint8); -> the midpoint in it, or infinity (fp32).

        And, for a table that is not sorted, how many values are smaller -> code (uint8).
        """
        values, order = self.values("cpu").sort(stable=True)
        midpoints = (values[:-1] + values[1:]) / 2
        cell = _cell(midpoints)
        if (cell.diff() < 1).any():
            raise ValueError(
                f"format {self.name}: two midpoints lie in one of {CELLS} equal cells of [-1, 1]; such a "
                "format needs an encode of its own"
            )
        midpoint = torch.full((CELLS + 1,), float("inf"), dtype=torch.float32, device="cpu")
        midpoint[cell.long()] = midpoints
        below = torch.zeros(CELLS + 2, dtype=torch.uint8, device="cpu")
        below[cell.long() + 1] = 1
        below = below.cumsum(0)[:-1].to(device, torch.uint8)
        is_sorted = bool((order.diff() > 0).all())
        return below, midpoint.to(device), None if is_sorted else order.to(device, torch.uint8)

    @staticmethod
    def scale(blocks: torch.Tensor, absmax: torch.Tensor, short: bool) -> torch.Tensor:
        """w / absmax, zero in blocks of zeros.

        As bitsandbytes on CPUs: whole blocks are multiplied by 1/absmax, a short one is divided.
        """
        divisor = absmax.masked_fill(absmax == 0, float("inf"))[:, None]
        return blocks / divisor if short else blocks * (1 / divisor)

    def quantize(self, flat: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """flat (n,), any floating dtype -> packed (ceil(n bits / 8),) uint8, absmax (blocks,) fp32."""
        n = flat.numel()
        packed = torch.empty(-(-n * self.bits // 8), dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
        whole = n // block_size * block_size
        step = max(1, CHUNK // block_size) * block_size
        parts = [(start, min(whole, start + step)) for start in range(0, whole, step)]
        for start, stop in [*parts, (whole, n)] if whole < n else parts:
            short = stop - start < block_size
            blocks = flat[start:stop].float().view(-1, stop - start if short else block_size)
            largest = blocks.abs().amax(dim=1)
            if not torch.isfinite(largest).all():
                raise NotFinite
            largest.masked_fill_(largest < TINY, 0)
            absmax[start // block_size : -(-stop // block_size)] = largest
            codes = self.encode(blocks, largest, short).view(-1)
            packed[start * self.bits // 8 : -(-stop * self.bits // 8)] = self.pack(codes)
        return packed, absmax

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (n,) uint8 -> bytes."""
        if self.bits == 8:
            return codes
        if codes.numel() % 2:
            zero = self.codebook.index(0.0)
            codes = torch.cat((codes, codes.new_tensor([zero])))
        pairs = codes.view(-1, 2)
        return torch.add(pairs[:, 1], pairs[:, 0], alpha=16)

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
        """The codebook as fp32."""
        return torch.tensor(self.codebook, dtype=torch.float32, device=device)

    @cache  # noqa: B019
    def lookup(self, device) -> torch.Tensor:
        """Byte -> the values that it holds, (256, 8 / bits) fp32."""
        byte = torch.arange(256, device=device)
        codes = torch.stack((byte >> 4, byte & 15), dim=1) if self.bits == 4 else byte[:, None]
        return self.values(device)[codes].contiguous()


def _cell(scaled: torch.Tensor) -> torch.Tensor:
    """Number in [-1, 1] -> 0 to CELLS, int32. Each step is monotone, so cells are intervals."""
    return ((scaled + 1) * (CELLS / 2)).clamp_(0, CELLS).int()


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
        groups = -(-self.blocks // NESTED_BLOCK_SIZE)
        return {"packed": packed, "absmax": self.blocks, "nested_absmax": 4 * groups, "offset": 4}
