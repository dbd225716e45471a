"""lora_linear: a frozen matrix and its low-rank branch as one op, forward and backward.

    y = x W^T + scaling * h B^T,   h = x A^T            x (M, K), W (N, K), A (r, K), B (N, r)
    dh = scaling * dy B,   dx = dy W + dh A,   dA = dh^T x,   dB = scaling * dy^T h

W is dense or `Packed`. A and B may have another dtype than x; they are rounded to x's for the products, and
so is h. Side by side the branch costs a second reading of x, a reading and writing of y, and in the backward
one more sum over dx: at K = N = 4096, r = 16 about 14 % of the base product's time on an H200, by counting
bytes. Here

- the fused kernel (`runtime.using(path="fused")`, dense W) reads a tile of x once for both products: each
  program computes its rows of h beside its tile of y, r / BLOCK_N more arithmetic, and adds h B^T before y is
  written. The backward is the same kernel with W, A and B transposed: dx = dy W + scaling * (dy B) A.
- otherwise the base product is the op of the base, so that a layer starts with its bits, and the branch is
  added to its fresh result in place.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; the split at the thin product: LoRAFusion,
arXiv:2510.00206, section 4.
"""

import torch

from minift.kernels.decode import rounded
from minift.kernels.dequantize_4bit import dequantize_4bit_ref
from minift.kernels.dequantize_int8 import dequantize_int8_ref
from minift.kernels.linear import linear
from minift.kernels.matmul_4bit import matmul_4bit
from minift.kernels.matmul_int8 import matmul_int8
from minift.kernels.packed import Packed
from minift.kernels.runtime import INTERPRETED, choose, dot_dtype, setting, tl, triton

FUSED_RANK = 128
FUSED_DTYPES = (torch.bfloat16, torch.float16) + (torch.float32,) * INTERPRETED  # tensor cores have no fp32
CONFIG = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}


def lora_linear_ref(x, weight, lora_A, lora_B, scaling: float):
    """x (M, K), weight (N, K) dense or Packed, lora_A (r, K), lora_B (N, r) -> (M, N) in x's dtype."""
    if isinstance(weight, Packed):
        dequantize = dequantize_4bit_ref if weight.bits == 4 else dequantize_int8_ref
        weight = dequantize(weight, torch.empty(weight.shape, dtype=x.dtype, device=x.device))
    h = x @ lora_A.to(x.dtype).t()  # (M, r)
    return x @ weight.t() + scaling * (h @ lora_B.to(x.dtype).t())


@triton.jit
def lora_linear_kernel(
    x_ptr,
    W_ptr,
    A_ptr,
    B_ptr,
    h_ptr,
    out_ptr,
    M,
    N,
    K,
    r,
    scaling,
    W_n,  # strides: of W along its two dimensions, of A, of B
    W_k,
    A_r,
    A_k,
    B_n,
    B_r,
    DOT: tl.constexpr,
    RANK: tl.constexpr,  # r as tl.dot takes it
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of y, and the same rows of h = x A^T; the programs of the first column store h (M, r)."""
    X: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rank = tl.arange(0, RANK).to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        row, column = k[:, None], k[None, :]  # of W^T and A^T, and of x
        x = tl.load(x_ptr + m * K + column, mask=(m < M) & (column < K), other=0.0).to(DOT)
        w = tl.load(W_ptr + row * W_k + n * W_n, mask=(row < K) & (n < N), other=0.0).to(DOT)
        a = tl.load(A_ptr + row * A_k + rank * A_r, mask=(row < K) & (rank < r), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        h = tl.dot(x, rounded(a.to(tl.float32), X, DOT), h, input_precision="ieee")
    h = rounded(h, X, DOT)  # [BLOCK_M, RANK]
    row = tl.trans(rank)  # of B^T
    b = tl.load(B_ptr + row * B_r + n * B_n, mask=(row < r) & (n < N), other=0.0)  # [RANK, BLOCK_N]
    branch = tl.dot(h, rounded(b.to(tl.float32), X, DOT), input_precision="ieee")
    total += scaling * branch  # [BLOCK_M, BLOCK_N]
    tl.store(out_ptr + m * N + n, total.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))
    if tl.program_id(1) == 0:
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + m * r + rank, h, mask=(m < M) & (rank < r))


def fused(x, weight, lora_A, lora_B, scaling: float):
    """One launch: (x W^T + scaling h B^T, h = x A^T). The matrices may be transposed views."""
    (M, K), (N, r) = x.shape, lora_B.shape
    dtype = torch.float32 if INTERPRETED else x.dtype  # which truncates to bf16
    out, h = (torch.empty(M, size, dtype=dtype, device=x.device) for size in (N, r))
    grid = (triton.cdiv(M, CONFIG["BLOCK_M"]), triton.cdiv(N, CONFIG["BLOCK_N"]))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        lora_linear_kernel[grid](
            x,
            weight,
            lora_A,
            lora_B,
            h,
            out,
            M,
            N,
            K,
            r,
            scaling,
            *weight.stride(),
            *lora_A.stride(),
            *lora_B.stride(),
            DOT=dot_dtype(x),
            RANK=max(16, triton.next_power_of_2(r)),
            **CONFIG,
        )
    return out.to(x.dtype), h.to(x.dtype)


def base_product(x, weight, transposed: bool = False):
    """x W^T, or x W: of a dense matrix or a quantized one."""
    if not isinstance(weight, Packed):
        return x @ weight if transposed else x @ weight.t()
    return (matmul_4bit if weight.bits == 4 else matmul_int8)(x, weight, transposed)


def lora_linear(x, weight, lora_A, lora_B, scaling: float):
    """Same contract as `lora_linear_ref`; trains in x, lora_A and lora_B, and W is frozen."""
    _check(x, weight, lora_A, lora_B)
    product = base_product if torch.is_grad_enabled() or isinstance(weight, Packed) else linear
    return _LoRALinear.apply(x, lora_A, lora_B, scaling, weight, product)


class _LoRALinear(torch.autograd.Function):
    """Keeps x, A, B, the thin h, and W as it is stored."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, scaling, weight, product):
        if _fuses(x, weight, lora_A):
            y, h = fused(x, weight, lora_A, lora_B, scaling)
        else:
            y, h = product(x, weight), x @ lora_A.to(x.dtype).t()  # (M, N), (M, r)
            y.addmm_(h, lora_B.to(x.dtype).t(), alpha=scaling)
        quantized = isinstance(weight, Packed)
        kept = weight._replace(shape=None, block_size=None) if quantized else (weight,)
        ctx.save_for_backward(x, lora_A, lora_B, h, *kept)
        ctx.layout = (weight.shape, weight.block_size) if quantized else None
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("lora_linear has no second derivative; use lora_linear_ref for one")
        x, lora_A, lora_B, h, *kept = ctx.saved_tensors
        weight, dy = kept[0], dy.contiguous()
        if ctx.layout:
            weight = Packed(*kept)._replace(shape=ctx.layout[0], block_size=ctx.layout[1])
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        if need_x and _fuses(dy, weight, lora_A):
            dx, dh = fused(dy, weight.t(), lora_B.t(), lora_A.t(), ctx.scaling)
            dh = dh * ctx.scaling
        else:
            dh = (dy @ lora_B.to(dy.dtype)) * ctx.scaling  # (M, r)
            dx = base_product(dy, weight, transposed=True) if need_x else None
            if need_x:
                dx.addmm_(dh, lora_A.to(dy.dtype))
        dA = (dh.t() @ x).to(lora_A.dtype) if need_A else None  # (r, K)
        dB = (dy.t() @ h * ctx.scaling).to(lora_B.dtype) if need_B else None  # (N, r)
        return dx, dA, dB, None, None, None


def _fuses(x, weight, lora_A) -> bool:
    """Whether the kernel runs. It does not unless it is asked for: a layer must start with the bits of its
    base, which are the dense library's, and which of the two is faster is not measured.
    """
    if isinstance(weight, Packed):
        return False  # its own op chooses
    backend = choose("lora_linear", x.device, ("torch",) if x.dtype == torch.float64 else ("triton", "torch"))
    if setting("path") != "fused" or not x.shape[0]:
        return False
    reason = None
    if backend != "triton":
        reason = "only Triton has a fused kernel"
    elif lora_A.shape[0] > FUSED_RANK:
        reason = f"the rank is {lora_A.shape[0]}, above {FUSED_RANK}"
    elif x.dtype not in FUSED_DTYPES:
        reason = f"x is {x.dtype}; tensor cores multiply bf16 and fp16"
    if reason:
        raise RuntimeError(f"lora_linear: path 'fused' was asked for and cannot run: {reason}")
    return True


def _check(x, weight, lora_A, lora_B):
    X, W, A, B = (tuple(matrix.shape) for matrix in (x, weight, lora_A, lora_B))
    matrices = len(X) == len(W) == len(A) == len(B) == 2
    if not (matrices and X[1] == W[1] == A[1] and W[0] == B[0] and A[0] == B[1]):
        raise ValueError(
            f"lora_linear: x {X}, weight {W}, lora_A {A}, lora_B {B}; "
            "they are (M, K), (N, K), (r, K) and (N, r)"
        )
    if not x.is_floating_point():
        raise ValueError(f"lora_linear: x is {x.dtype}; it must be of a floating-point dtype")
    dense = () if isinstance(weight, Packed) else (weight,)
    for name, tensor in zip(("x", "weight"), (x, *dense), strict=False):
        if not tensor.is_contiguous():
            raise ValueError(f"lora_linear: {name} is not contiguous; call .contiguous() on it")
    if dense and weight.dtype != x.dtype:
        raise ValueError(f"lora_linear: x is {x.dtype} and weight {weight.dtype}; they have the same dtype")
    if dense and weight.requires_grad:
        raise ValueError("lora_linear: weight requires a gradient, which is not computed; freeze it")
    if len({tensor.device for tensor in (x, *dense, lora_A, lora_B)}) > 1:
        raise ValueError(
            "lora_linear: x, weight, lora_A and lora_B are on different devices; move them to one"
        )
