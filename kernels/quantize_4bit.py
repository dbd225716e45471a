"""quantize_4bit: blocks of a weight as codes of 4 bits and one fp32 scale each.

    absmax[b] = max |w| over block b;   code i = number of midpoints of the codebook below w[i] / absmax

and so the nearest number of the codebook, on a midpoint the lower one, all in fp32. Whole blocks are
multiplied by 1/absmax, correctly rounded, and a short last block is divided. Below 2^-126, the smallest
normal number, absmax is stored as 0 and the block has the codes of zero. Codes are two to a byte, the first
in the high nibble; an odd one has the code of zero after it. w has n elements.
Limit: n numbers are read and n/2 bytes written, once. On GPUs the search for the code takes longer, 34
instructions a weight (benchmarks/results/machine_code.md); a weight is quantized once.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; bit for bit what bitsandbytes computes on CPUs.
"""

import torch
import torch.nn.functional as F

from minift.kernels import library
from minift.kernels.dequantize_4bit import BLOCK_SIZES, DTYPES, describe
from minift.kernels.runtime import choose, tl, triton

CHUNK = 2**18  # elements in flight in torch
CELLS = 4096  # of [-1, 1]; FP4's nearest midpoints are 5 cells apart
TINY = torch.finfo(torch.float32).tiny


def quantize_4bit_ref(w, codebook, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w (n,), codebook (16,) fp32 in any order -> packed (ceil(n / 2),) uint8, absmax (blocks,) fp32.

    A number that is not finite makes the absmax of its block infinite or NaN, and its codes mean nothing.
    """
    midpoints, order = boundaries(codebook)
    scaled, absmax = over_absmax(w, block_size)
    scaled = F.pad(scaled, (0, scaled.numel() % 2))
    codes = order[torch.bucketize(scaled, midpoints)]
    return codes[0::2] << 4 | codes[1::2], absmax


def boundaries(codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints of the sorted codebook, (15,) fp32; number of midpoints below -> code, (16,) uint8."""
    values, order = codebook.sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


def over_absmax(w, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w (n,) / absmax of its block, (n,) fp32, and absmax, (blocks,) fp32; zeros in a block below 2^-126."""
    n = w.numel()
    blocks = F.pad(w.float(), (0, -n % block_size)) if n % block_size else w.float()
    blocks = blocks.view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    absmax[absmax < TINY] = 0
    divisor = absmax.masked_fill(absmax == 0, float("inf"))[:, None]
    scaled = blocks * (1 / divisor)
    if n % block_size:
        scaled[-1] = blocks[-1] / divisor[-1]
    return scaled.view(-1)[:n], absmax


@triton.jit
def over_absmax_of_tile(w, left, BLOCK_SIZE: tl.constexpr, EVEN: tl.constexpr):
    """`over_absmax` of a tile, [TILE] and [BLOCKS]. Of w [TILE] `left` elements are there, then zeros."""
    BLOCKS: tl.constexpr = w.shape[0] // BLOCK_SIZE
    w = w.to(tl.float32).reshape(BLOCKS, BLOCK_SIZE)
    bits = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # |w|; as integers infinity and NaN are the largest
    bits = tl.max(bits, axis=1)  # [BLOCKS]
    absmax = tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)  # 2^-126
    divisor = tl.where(absmax == 0, float("inf"), absmax)[:, None]
    scaled = w * tl.div_rn(1.0, divisor)
    if not EVEN:  # noqa: SIM102 (known when the kernel is compiled; the next is not)
        if left < BLOCKS * BLOCK_SIZE:  # only the last tile pays for the division
            whole = (tl.arange(0, BLOCKS) + 1) * BLOCK_SIZE <= left
            scaled = tl.where(whole[:, None], scaled, tl.div_rn(w, divisor))
    return scaled.reshape(BLOCKS * BLOCK_SIZE), absmax


@triton.jit
def quantize_4bit_kernel(
    w_ptr,
    midpoints_ptr,
    order_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # elements of a program
    VECTOR: tl.constexpr,  # that are 16 bytes of w
    EVEN: tl.constexpr,  # n is whole tiles: no masks
):
    """A thread takes VECTOR elements at a time, packs them and stores VECTOR / 2 bytes."""
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - start, TILE).to(tl.int32)
    element = tl.max_contiguous(tl.arange(0, TILE), VECTOR)
    byte = tl.max_contiguous(tl.arange(0, TILE // 2), VECTOR // 2)
    block = tl.arange(0, TILE // BLOCK_SIZE)
    if EVEN:
        w = tl.load(w_ptr + start + element)  # [TILE]
    else:
        w = tl.load(w_ptr + start + element, mask=element < left, other=0)
    scaled, absmax = over_absmax_of_tile(w, left, BLOCK_SIZE, EVEN)
    tl.store(absmax_ptr + start // BLOCK_SIZE + block, absmax, mask=block * BLOCK_SIZE < left)

    # how many of the 15 midpoints are below: four steps of a binary search
    midpoints = tl.load(midpoints_ptr + tl.arange(0, 16), mask=tl.arange(0, 16) < 15)
    below = tl.zeros([TILE], tl.int32)
    for i in tl.static_range(4):
        half = 8 >> i
        below += tl.where(scaled > tl.gather(midpoints, below + (half - 1), 0), half, 0)
    code = tl.gather(tl.load(order_ptr + tl.arange(0, 16)).to(tl.int32), below, 0)
    high, low = tl.split(code.reshape(TILE // 2, 2))
    mask = None if EVEN else byte * 2 < left
    tl.store(packed_ptr + start // 2 + byte, (high << 4 | low).to(tl.uint8), mask=mask)


def quantize_4bit(w, codebook, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `quantize_4bit_ref`; nothing of the weight's own size is made but the result."""
    check("quantize_4bit", w, block_size)
    if codebook.dtype != torch.float32 or codebook.shape != (16,) or codebook.device != w.device:
        raise ValueError(
            f"quantize_4bit: codebook is {describe(codebook)}; it must be torch.float32 (16,) on {w.device}"
        )
    n, backend = w.numel(), choose("quantize_4bit", w.device, ("triton", "c", "torch"))
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    if backend == "torch":
        quantize_torch(w, codebook, block_size, packed, absmax)
    elif backend == "c":
        midpoints, order = boundaries(codebook)
        midpoints = F.pad(midpoints, (0, 1), value=float("inf"))
        library.quantize(w, block_size, midpoints, order.int(), packed, absmax)
    elif n:
        midpoints, order = boundaries(codebook)
        grid, constants = cover(w, block_size)
        with torch.cuda.device_of(w):  # Triton launches on the current device
            quantize_4bit_kernel[grid](w, midpoints, order, packed, absmax, n, **constants)
    return packed, absmax


def quantize_torch(w, codebook, block_size, packed, absmax) -> None:
    """`quantize_4bit` in torch, CHUNK elements at a time.

    [-1, 1] is cut into CELLS equal cells. Where none has two midpoints in it, a look-up (how many midpoints
    lie in lower cells) and a comparison (with the one in this cell) find what a search would find.
    """
    midpoints, order = boundaries(codebook)
    cells = cell_of(midpoints)
    in_order = bool((codebook.diff() > 0).all())
    searched = bool((cells.diff() < 1).any())
    below = torch.bucketize(torch.arange(CELLS + 1, device=w.device), cells).to(torch.uint8)
    midpoint = torch.full((CELLS + 1,), float("inf"), device=w.device).index_copy_(0, cells.long(), midpoints)
    for start in range(0, w.numel(), CHUNK):
        scaled, scales = over_absmax(w[start : start + CHUNK], block_size)
        if scaled.numel() % 2:
            scaled = F.pad(scaled, (0, 1))
        if searched:
            rank = torch.bucketize(scaled, midpoints).to(torch.uint8)
        else:
            cell = cell_of(scaled)
            rank = below.index_select(0, cell)
            rank += (scaled > midpoint.index_select(0, cell)).view(torch.uint8)
        codes = (rank if in_order else order.index_select(0, rank.int())).view(-1, 2)
        torch.add(codes[:, 1], codes[:, 0], alpha=16, out=packed[start // 2 : start // 2 + codes.shape[0]])
        absmax[start // block_size : start // block_size + scales.numel()] = scales


def cell_of(scaled) -> torch.Tensor:
    """Number -> cell, 0 to CELLS, int32. Each step is monotone, so cells are intervals; NaN has one too."""
    return ((scaled + 1) * (CELLS / 2)).int().clamp_(0, CELLS)


def cover(w, block_size: int):
    """The grid and the constants of a launch."""
    n, TILE = w.numel(), 4096
    constants = {
        "BLOCK_SIZE": block_size,
        "TILE": TILE,
        "VECTOR": 16 // w.element_size(),
        "EVEN": n % TILE == 0,
        "num_warps": 4,
        "enable_fp_fusion": False,  # int8 rounds 127 w / absmax before it rounds to an integer
    }
    return (triton.cdiv(n, TILE),), constants


def check(op: str, w, block_size: int) -> None:
    """Refuses a weight that the kernels cannot read."""
    if w.dtype not in DTYPES or w.dim() != 1 or not w.is_contiguous():
        raise ValueError(f"{op}: w is {describe(w)}; it must be flat, contiguous, and fp32, bf16 or fp16")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{op}: block_size is {block_size}; supported: {', '.join(map(str, BLOCK_SIZES))}")
