"""matmul_int8: the product of a matrix with an 8-bit weight or, for the backward, with its transpose.

    y = x W^T       x (M, K), W (N, K), y (M, N)
    dx = dy W       dy (M, N), dx (M, K); transposed=True, from the same packed buffer
    W[n, k] = code[n, k] / 127 * absmax[(n K + k) // block_size], codes from -128 to 127
    W[n, k] = codebook[code[n, k]] * absmax[...] with a table of 256 numbers: always through slabs

Few rows are one fused launch, limited by reading W once, 1.02 bytes a weight under double quantization. An
H200 then has 8 instructions a weight to spend; the loops here have 4.9 and 6.8 (BUILDS in
tests/kernels/test_matmul_int8.py holds the figures). Codes are exact in bf16 and fp16: tensor cores multiply
x by them, and the sum over a block is multiplied by its absmax in fp32. The product with W itself sums over
n, along which absmax changes, so there each weight is scaled. Many rows: kernels/slabs.py.

What is rounded, to the dtype X of x, in a fused product; all sums are in fp32:

    scaled sums       nothing
    scaled weights    code * (absmax / 127), computed in fp32
    slabs             code / 127 * absmax, computed in fp32: the dequantized W, as in `matmul_int8_ref`

Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (absmax quantization), here in blocks.
"""

import torch
from torch.autograd.function import once_differentiable

from minift.kernels import library, runtime, slabs
from minift.kernels.decode import Config, block_scales, decode_int8, launch, rounded
from minift.kernels.dequantize_int8 import dequantize_int8, dequantize_int8_ref
from minift.kernels.packed import Packed
from minift.kernels.runtime import tl, triton

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, splits
CONFIGS = [
    *(Config(16, 128, 64, 4, 4, splits) for splits in (1, 2, 4, 8, 16)),
    *(Config(32, 128, 64, 4, 4, splits) for splits in (1, 4, 8)),
    *(Config(64, 128, 64, 4, 3, splits) for splits in (1, 4, 8)),
]
TRANSPOSED_CONFIGS = [
    *(Config(16, 32, 256, 4, 4, splits) for splits in (1, 2, 4, 8, 16)),
    *(Config(64, 64, 128, 4, 3, splits) for splits in (1, 2, 4, 8)),
]


def matmul_int8_ref(x: torch.Tensor, weight: Packed, transposed: bool = False) -> torch.Tensor:
    """x (M, K) -> x W^T (M, N); transposed: x (M, N) -> x W (M, K). W is rounded once, to x's dtype."""
    W = dequantize_int8_ref(weight, torch.empty(weight.shape, dtype=x.dtype, device=x.device))
    return x @ W if transposed else x @ W.t()


@triton.jit
def matmul_int8_kernel(
    x_ptr,
    words_ptr,  # W's codes, four to an int32
    absmax_ptr,
    nested_absmax_ptr,  # None without double quantization, like the next two
    offset_ptr,
    nested_codebook_ptr,
    out_ptr,
    M,
    N,
    K,
    steps,  # of a split, BLOCK_K of the sum each
    BLOCK_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, m, n] = sum over the split's k of x[m, k] W[n, k]. BLOCK_K divides BLOCK_SIZE and K."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows after the last repeat it and are not stored
    x_rows = x_ptr + m.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    words = words_ptr + row * tl.multiple_of(K // 4, 8) + tl.arange(0, BLOCK_K // 4)[None, :]

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * steps * BLOCK_K
    for k in tl.range(first, min(K, first + steps * BLOCK_K), BLOCK_K):
        x = tl.load(x_rows + k, mask=m[:, None] < M, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_K]
        codes = decode_int8(tl.load(words + k // 4), DECODE).to(DOT)  # [BLOCK_N, BLOCK_K], exact
        block = row * (K // BLOCK_SIZE) + k // BLOCK_SIZE  # [BLOCK_N, 1]
        scale = block_scales(block, None, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr)
        total += tl.dot(codes, tl.trans(x), input_precision="ieee") * scale
    total = tl.trans(total) * (1 / 127)
    out = out_ptr + (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def matmul_int8_transposed_kernel(
    x_ptr,
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    offset_ptr,
    nested_codebook_ptr,
    out_ptr,
    M,
    N,
    K,
    steps,  # of a split, BLOCK_N of the sum each
    BLOCK_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, m, k] = sum over the split's n of x[m, n] W[n, k]. BLOCK_K divides K."""
    X: tl.constexpr = x_ptr.dtype.element_ty
    SCALES: tl.constexpr = max(1, BLOCK_K // BLOCK_SIZE)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K
    split = tl.program_id(2)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * N
    words = words_ptr + k // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
    blocks = k // BLOCK_SIZE + tl.arange(0, SCALES)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = split * steps * BLOCK_N
    for step in tl.range(first, min(N, first + steps * BLOCK_N), BLOCK_N):
        n = step + tl.arange(0, BLOCK_N)
        inside = (m[:, None] < M) & (n[None, :] < N)
        x = tl.load(x_rows + n[None, :], mask=inside, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_N]
        row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows after the last repeat it; their x is 0
        codes = decode_int8(tl.load(words + row * tl.multiple_of(K // 4, 8)), DECODE)
        block = row * (K // BLOCK_SIZE) + blocks
        scale = block_scales(block, None, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr)
        w = codes.reshape(BLOCK_N, SCALES, BLOCK_K // SCALES) * (scale * (1 / 127))[:, :, None]
        w = rounded(w.reshape(BLOCK_N, BLOCK_K), X, DOT)
        total = tl.dot(x, w, total, input_precision="ieee")
    out = out_ptr + (split.to(tl.int64) * M + m)[:, None] * K + k + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)


def matmul_int8(x: torch.Tensor, weight: Packed, transposed: bool = False) -> torch.Tensor:
    """Same contract as `matmul_int8_ref`; x contiguous, fp32, bf16, fp16 or fp64. Trains in x."""
    slabs.check("matmul_int8", x, weight, 8, transposed)
    if torch.is_grad_enabled() and x.requires_grad:
        return MatmulInt8.apply(x, weight, transposed)
    return product(x, weight, transposed)


def product(x, weight, transposed):
    M, N, K = x.shape[0], *weight.shape
    if 0 in (M, N, K):
        return x.new_zeros(M, K if transposed else N)
    if slabs.path("matmul_int8", M, weight, x.dtype, transposed) == "slabs":
        return slabs.matmul_slabs(x, weight, dequantize_int8, transposed)
    if runtime.choose("matmul_int8", x.device, ("triton", "c")) == "c":
        return library.matmul(x, weight).to(x.dtype)
    if transposed:
        return launch(matmul_int8_transposed_kernel, TRANSPOSED_CONFIGS, x, weight, True)
    return launch(matmul_int8_kernel, CONFIGS, x, weight, False)


class MatmulInt8(torch.autograd.Function):
    """Keeps the packed tensors for the backward, which gives dx alone."""

    @staticmethod
    def forward(ctx, x, weight, transposed):
        slabs.save(ctx, weight)
        ctx.transposed = transposed
        return product(x, weight, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return product(dy.contiguous(), slabs.saved(ctx), not ctx.transposed), None, None
