"""dequantize_int8: an 8-bit weight, or a slab of it, as numbers.

    out[i] = (code i / 127) * absmax[i // block_size]         codes are two's complement bytes
    out[i] = codebook[code i] * absmax[i // block_size]       with a table of 256 numbers
    absmax[b] = nested_codebook[code of b] * nested_absmax[b // 256] + offset   under double quantization

In fp32, every operation rounded, and once more to out's dtype. i counts the elements of the flattened weight.
Limit: memory. One byte a weight is read and one number written, 3.02 bytes a weight to bf16.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (absmax quantization), here in blocks.
"""

import torch

from minift.kernels import library
from minift.kernels.decode import block_scales
from minift.kernels.dequantize_4bit import check, cover, dequantize_torch, implementations
from minift.kernels.packed import Packed
from minift.kernels.runtime import INTERPRETED, choose, tl, triton


def dequantize_int8_ref(weight: Packed, out: torch.Tensor, first: int = 0, stride: int = 0) -> torch.Tensor:
    """Fills out and returns it, as `dequantize_4bit_ref` does, which says what `first` and `stride` mean."""
    scales = weight.scales().repeat_interleave(weight.block_size)[: weight.packed.numel()]
    values = numbers(weight)[weight.packed.int()] * scales  # (n,)
    if stride:
        return out.copy_(values.as_strided(out.shape, (stride, 1), first))
    return out.copy_(values[first : first + out.numel()].view(out.shape))


def numbers(weight: Packed) -> torch.Tensor:
    """Byte -> the number it stands for, (256,) fp32."""
    if weight.codebook is not None:
        return weight.codebook
    codes = torch.arange(256, dtype=torch.uint8, device=weight.packed.device).view(torch.int8)
    return codes.float() / 127


@triton.jit
def divided_by_127(code):
    """code / 127, correctly rounded, of integers from -128 to 127, without a division.

    1/127 = 129/2^14 + 1/(127 * 2^14). The first product is exact and the second small, so that the rounding
    of the sum is the quotient's; a test has all 256 codes.
    """
    x = code.to(tl.float32)
    return x * (129 / 16384) + x * (1 / (127 * 16384))


@triton.jit
def dequantize_int8_kernel(
    packed_ptr,
    absmax_ptr,
    codebook_ptr,  # None: code / 127
    nested_absmax_ptr,  # None without double quantization, like the next two
    offset_ptr,
    nested_codebook_ptr,
    out_ptr,
    first,
    stride,
    C,
    n,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
):
    """As `dequantize_4bit_kernel`, which explains the arguments, with one number to a byte."""
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE
    source = first + row * stride + column  # in the weight; a multiple of block_size
    target = row * C + column  # in out
    left = tl.minimum(C - column, n - target).to(tl.int32)

    element, block = tl.max_contiguous(tl.arange(0, TILE), VECTOR), tl.arange(0, BLOCKS)
    mask = None if EVEN else element < left
    packed = tl.load(packed_ptr + source + element, mask=mask, eviction_policy="evict_first")  # [TILE]
    if codebook_ptr is None:
        value = divided_by_127(packed.to(tl.int8, bitcast=True))
    else:
        value = tl.gather(tl.load(codebook_ptr + tl.arange(0, 256)), packed.to(tl.int32), 0)

    inside = None if EVEN else block * BLOCK_SIZE < left
    absmax = block_scales(
        source // BLOCK_SIZE + block, inside, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr
    )  # [BLOCKS]
    value = (value.reshape(BLOCKS, BLOCK_SIZE) * absmax[:, None]).reshape(TILE)
    tl.store(out_ptr + target + element, value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_int8(weight: Packed, out: torch.Tensor, first: int = 0, stride: int = 0) -> torch.Tensor:
    """Same contract as `dequantize_int8_ref`; one launch on GPUs, no scratch of the weight's size on CPUs."""
    check("dequantize_int8", weight, 8, out, first, stride)
    backend = choose("dequantize_int8", out.device, implementations(out.dtype))
    if not out.numel():
        return out
    if backend == "c":
        return library.dequantize(weight, out, first, stride)
    if backend == "torch":
        return dequantize_torch(weight, numbers(weight).view(256, 1), out, first, stride)
    if INTERPRETED and out.dtype == torch.bfloat16:  # to which the interpreter truncates
        wide = torch.empty_like(out, dtype=torch.float32)
        return out.copy_(dequantize_int8(weight, wide, first, stride))
    grid, rows, constants = cover(weight, out, first, stride)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        dequantize_int8_kernel[grid](
            weight.packed,
            weight.absmax,
            weight.codebook,
            weight.nested_absmax,
            weight.offset,
            weight.nested_codebook,
            out,
            *rows,
            **constants,
            VECTOR=16 // out.element_size(),
        )
    return out
