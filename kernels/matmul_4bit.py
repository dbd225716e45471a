"""matmul_4bit: the product of a matrix with a 4-bit weight or, for the backward, with its transpose.

    y = x W^T       x (M, K), W (N, K), y (M, N)
    dx = dy W       dy (M, N), dx (M, K); transposed=True, from the same packed buffer
    W[n, k] = codebook[code[n, k]] * absmax[(n K + k) // block_size]

Few rows are one fused launch, limited by reading W once, 0.52 bytes a weight under double quantization. An
H200 (4.3 TB/s, 132 processors of 128 lanes at 1.98 GHz) then has 4 instructions a weight to spend; the loop
here has 5.1 (benchmarks/results/machine_code.md), so that decoding is the limit. Up to 64 rows tensor cores
multiply x by the unscaled codebook, and the sum over a block is multiplied by its absmax in fp32. The
product with W itself sums over n, along which absmax changes, so there, and for more rows, each weight is
scaled. Many rows: kernels/slabs.py.

What is rounded, to the dtype X of x, in a fused product; all sums are in fp32:

    scaled sums       codebook
    the C file        codebook, for bf16 x in blocks of 64 or more on processors with AVX-512 BF16 or AMX;
                      otherwise nothing
    scaled weights    codebook, absmax, and their product (in the forward too where block_size is 32)
    slabs             codebook * absmax, computed in fp32: the dequantized W, as in `matmul_4bit_ref`

Source: Dettmers et al. 2023, arXiv:2305.14314, equations 5 and 6.
"""

import torch
from torch.autograd.function import once_differentiable

from minift.kernels import library, runtime, slabs
from minift.kernels.decode import Config, block_scales, decode_4bit, launch, load_table, scaled
from minift.kernels.dequantize_4bit import dequantize_4bit, dequantize_4bit_ref
from minift.kernels.packed import Packed
from minift.kernels.runtime import tl, triton

# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, splits
CONFIGS = [
    *(Config(16, 128, 128, 4, 4, splits) for splits in (1, 2, 4, 8, 16)),
    *(Config(32, 128, 64, 4, 4, splits) for splits in (1, 4, 8)),
    *(Config(64, 128, 64, 4, 3, splits) for splits in (1, 4, 8)),
    Config(128, 128, 64, 8, 3, 1),
]
TRANSPOSED_CONFIGS = [
    *(Config(16, 32, 256, 4, 4, splits) for splits in (1, 2, 4, 8, 16)),
    *(Config(64, 64, 128, 4, 3, splits) for splits in (1, 2, 4, 8)),
]


def matmul_4bit_ref(x: torch.Tensor, weight: Packed, transposed: bool = False) -> torch.Tensor:
    """x (M, K) -> x W^T (M, N); transposed: x (M, N) -> x W (M, K). W is rounded once, to x's dtype."""
    W = dequantize_4bit_ref(weight, torch.empty(weight.shape, dtype=x.dtype, device=x.device))
    return x @ W if transposed else x @ W.t()


@triton.jit
def matmul_4bit_kernel(
    x_ptr,
    words_ptr,  # W's codes, eight to an int32
    absmax_ptr,
    nested_absmax_ptr,  # None without double quantization, like the next two
    offset_ptr,
    nested_codebook_ptr,
    out_ptr,
    M,
    N,
    K,
    steps,  # of a split, BLOCK_K of the sum each
    codebook_ptr,
    BLOCK_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, m, n] = sum over the split's k of x[m, k] W[n, k]. BLOCK_K divides BLOCK_SIZE and K."""
    X: tl.constexpr = x_ptr.dtype.element_ty
    # Costs BLOCK_M / BLOCK_K a weight, and scaling each 1/2. Triton 3.7 cannot compile it at 32 for sm_100.
    SCALE_SUMS: tl.constexpr = BLOCK_M <= 64 and BLOCK_K >= 64
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows after the last repeat it and are not stored
    x_rows = x_ptr + m.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    words = words_ptr + row * tl.multiple_of(K // 8, 4) + tl.arange(0, BLOCK_K // 8)[None, :]
    table = load_table(codebook_ptr, X, DOT, DECODE)

    total = tl.zeros((BLOCK_N, BLOCK_M) if SCALE_SUMS else (BLOCK_M, BLOCK_N), tl.float32)
    first = split * steps * BLOCK_K
    for k in tl.range(first, min(K, first + steps * BLOCK_K), BLOCK_K):
        x = tl.load(x_rows + k, mask=m[:, None] < M, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_K]
        w = decode_4bit(tl.load(words + k // 8), table, DOT, DECODE)  # [BLOCK_N, BLOCK_K]
        block = row * (K // BLOCK_SIZE) + k // BLOCK_SIZE  # [BLOCK_N, 1]
        scale = block_scales(block, None, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr)
        if SCALE_SUMS:
            total += tl.dot(w, tl.trans(x), input_precision="ieee") * scale
        else:
            total = tl.dot(x, tl.trans(scaled(w, scale, X, DOT)), total, input_precision="ieee")
    if SCALE_SUMS:
        total = tl.trans(total)
    out = out_ptr + (split.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def matmul_4bit_transposed_kernel(
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
    codebook_ptr,
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
    words = words_ptr + k // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    blocks = k // BLOCK_SIZE + tl.arange(0, SCALES)[None, :]
    table = load_table(codebook_ptr, X, DOT, DECODE)

    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first = split * steps * BLOCK_N
    for step in tl.range(first, min(N, first + steps * BLOCK_N), BLOCK_N):
        n = step + tl.arange(0, BLOCK_N)
        inside = (m[:, None] < M) & (n[None, :] < N)
        x = tl.load(x_rows + n[None, :], mask=inside, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_N]
        row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows after the last repeat it; their x is 0
        w = decode_4bit(tl.load(words + row * tl.multiple_of(K // 8, 4)), table, DOT, DECODE)
        block = row * (K // BLOCK_SIZE) + blocks
        scale = block_scales(block, None, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr)
        total = tl.dot(x, scaled(w, scale, X, DOT), total, input_precision="ieee")
    out = out_ptr + (split.to(tl.int64) * M + m)[:, None] * K + k + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=m[:, None] < M)


def matmul_4bit(x: torch.Tensor, weight: Packed, transposed: bool = False) -> torch.Tensor:
    """Same contract as `matmul_4bit_ref`; x contiguous, fp32, bf16, fp16 or fp64. Trains in x."""
    slabs.check("matmul_4bit", x, weight, 4, transposed)
    if torch.is_grad_enabled() and x.requires_grad:
        return Matmul4bit.apply(x, weight, transposed)
    return product(x, weight, transposed)


def product(x, weight, transposed):
    M, N, K = x.shape[0], *weight.shape
    if 0 in (M, N, K):
        return x.new_zeros(M, K if transposed else N)
    if slabs.path("matmul_4bit", M, weight, x.dtype, transposed) == "slabs":
        return slabs.matmul_slabs(x, weight, dequantize_4bit, transposed)
    if runtime.choose("matmul_4bit", x.device, ("triton", "c")) == "c":
        return library.matmul(x, weight).to(x.dtype)
    table = {"codebook_ptr": weight.codebook}
    if transposed:
        return launch(matmul_4bit_transposed_kernel, TRANSPOSED_CONFIGS, x, weight, True, **table)
    return launch(matmul_4bit_kernel, CONFIGS, x, weight, False, **table)


class Matmul4bit(torch.autograd.Function):
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
