"""quantize_int8: blocks of a weight as 8-bit integers and one fp32 scale each.

    absmax[b] = max |w| over block b;   code i = round(127 * (w[i] / absmax)), ties to even, -127 to 127

in fp32, every operation rounded; codes are two's complement bytes. Whole blocks are multiplied by 1/absmax, a
short last block is divided, and small blocks are zeros, as in quantize_4bit.py.
Limit: memory. n numbers are read and n bytes written, once.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (absmax quantization), here in blocks.
"""

import torch

from minift.kernels import library
from minift.kernels.quantize_4bit import CHUNK, check, cover, over_absmax, over_absmax_of_tile
from minift.kernels.runtime import choose, tl, triton


def quantize_int8_ref(w, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w (n,) -> packed (n,) uint8, absmax (blocks,) fp32.

    A number that is not finite makes the absmax of its block infinite or NaN, and its codes mean nothing.
    """
    scaled, absmax = over_absmax(w, block_size)
    return (scaled * 127).round().to(torch.int8).view(torch.uint8), absmax


@triton.jit
def quantize_int8_kernel(
    w_ptr,
    packed_ptr,
    absmax_ptr,
    n,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # elements of a program
    VECTOR: tl.constexpr,  # that are 16 bytes of w
    EVEN: tl.constexpr,  # n is whole tiles: no masks
):
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(n - start, TILE).to(tl.int32)
    element = tl.max_contiguous(tl.arange(0, TILE), VECTOR)
    block = tl.arange(0, TILE // BLOCK_SIZE)
    if EVEN:
        w = tl.load(w_ptr + start + element)  # [TILE]
    else:
        w = tl.load(w_ptr + start + element, mask=element < left, other=0)
    scaled, absmax = over_absmax_of_tile(w, left, BLOCK_SIZE, EVEN)
    tl.store(absmax_ptr + start // BLOCK_SIZE + block, absmax, mask=block * BLOCK_SIZE < left)

    # 1.5 * 2^23 leaves no room for a fraction: the sum is rounded to an integer, which its low byte holds
    code = (scaled * 127 + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    tl.store(packed_ptr + start + element, code, mask=None if EVEN else element < left)


def quantize_int8(w, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `quantize_int8_ref`; nothing of the weight's own size is made but the result."""
    check("quantize_int8", w, block_size)
    n, backend = w.numel(), choose("quantize_int8", w.device, ("triton", "c", "torch"))
    packed = torch.empty(n, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    if backend == "torch":
        for start in range(0, n, CHUNK):
            part = quantize_int8_ref(w[start : start + CHUNK], block_size)
            packed[start : start + CHUNK] = part[0]
            absmax[start // block_size : start // block_size + part[1].numel()] = part[1]
    elif backend == "c":
        library.quantize(w, block_size, None, None, packed, absmax)
    elif n:
        grid, constants = cover(w, block_size)
        with torch.cuda.device_of(w):  # Triton launches on the current device
            quantize_int8_kernel[grid](w, packed, absmax, n, **constants)
    return packed, absmax
