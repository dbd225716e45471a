"""Products with a quantized matrix: which of two ways, and the one that dequantizes a slab at a time.

    fused     W is decoded in registers and never written (kernels/decode.py). For few rows of x (ROWS), on
              GPUs and, for x W^T, in the C file: the product is limited by reading W, in its 4 or 8 bits.
    slabs     SLAB elements of W at a time are dequantized into one buffer and multiplied by a dense product:
              rows of W for x W^T, columns for x W, so that no product is split along its sum and the numbers
              are those of a dense layer with the dequantized weight. For many rows, where a dense product
              takes longer than the 2.5 bytes a weight that dequantizing moves.

M rows of x, W (N, K). Columns are whole blocks only where K % block_size == 0; otherwise x W dequantizes W
whole, once.
"""

from math import gcd

import torch

from minift.kernels import runtime
from minift.kernels.dequantize_4bit import DTYPES, describe, implementations
from minift.kernels.dequantize_4bit import check as check_weight
from minift.kernels.packed import Packed

SLAB = {"cpu": 2**22, "cuda": 2**23}  # elements; 16 MB of bf16 stay in a large GPU's L2 cache
ROWS = {"triton": 64, "c": 16}  # up to here a product is fused, where PATHS does not say otherwise
PATHS: dict[tuple, str] = {}  # (op, transposed, bucket of M, N, K) -> "fused" or "slabs", where measured


def path(op: str, M: int, weight: Packed, dtype: torch.dtype, transposed: bool = False) -> str:
    """ "fused" or "slabs": what `op` does for M rows of a dtype; raises where the asked one cannot run."""
    asked, backend = runtime.setting("path"), runtime.choose(op, weight.packed.device, implementations(dtype))
    reason = why_not_fused(backend, weight, dtype, transposed)
    if asked == "fused" and reason:
        raise RuntimeError(f"{op}: path 'fused' was asked for and cannot run: {reason}")
    if reason:
        return "slabs"
    usual = "slabs" if ROWS[backend] < M else "fused"
    return asked or PATHS.get((op, transposed, bucket(M), *weight.shape), usual)


def bucket(M: int) -> int:
    """M rounded up to a power of two, at least 16: what PATHS knows of it."""
    return max(16, 1 << (M - 1).bit_length())


def why_not_fused(backend: str, weight: Packed, dtype: torch.dtype, transposed: bool) -> str | None:
    (_, K), size = weight.shape, weight.block_size
    if backend == "torch":
        return "plain torch has no fused products"
    if backend == "c" and transposed:
        return "the C file has no transposed products"
    if backend == "triton" and dtype == torch.float32 and not runtime.INTERPRETED:
        return "tensor cores do not multiply fp32; use bf16 or fp16"
    if weight.bits == 8 and weight.codebook is not None:
        return "8-bit codes are multiplied without a codebook alone"
    if K % size:
        return f"in_features {K} is no multiple of the block size, {size}"
    if backend == "triton" and weight.packed.data_ptr() % 16:
        return "the codes do not start at a multiple of 16 bytes"
    return None


def matmul_slabs(x: torch.Tensor, weight: Packed, dequantize, transposed: bool = False) -> torch.Tensor:
    """x (M, K) -> x W^T (M, N); transposed: x (M, N) -> x W (M, K). `dequantize` is the op for the format."""
    (N, K), size = weight.shape, weight.block_size
    if transposed and K % size:
        return x @ dequantize(weight, x.new_empty(N, K))
    outputs, length = (K, N) if transposed else (N, K)
    step = slab_width(outputs, length, size if transposed else size // gcd(K, size), SLAB[x.device.type])
    y = x.new_empty(x.shape[0], outputs)
    buffer = x.new_empty(step * length)
    for start in range(0, outputs, step):
        stop = min(outputs, start + step)
        if transposed:
            slab = dequantize(weight, buffer[: N * (stop - start)].view(N, -1), start, K)  # (N, columns)
        else:
            slab = dequantize(weight, buffer[: (stop - start) * K].view(-1, K), start * K).t()  # (K, rows)
        torch.mm(x, slab, out=y[:, start:stop])
    return y


def slab_width(outputs: int, length: int, unit: int, elements: int) -> int:
    """Rows, or columns, of a slab: whole units, and whole tiles of 128 where there are several."""
    width = max(unit, elements // length // unit * unit)
    tile = unit * 128 // gcd(unit, 128)
    return min(outputs, width // tile * tile if width > tile else width)


def check(op: str, x: torch.Tensor, weight: Packed, bits: int, transposed: bool) -> None:
    """Refuses what the products do not take, with the reason."""
    if x.dtype not in (*DTYPES, torch.float64) or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{op}: x is {describe(x)}; it must be fp32, bf16, fp16 or fp64, 2-D and contiguous")
    check_weight(op, weight, bits, x.new_empty(0), 0, 0)
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: the weight has shape {tuple(weight.shape)}; a product needs a matrix (N, K)")
    columns = weight.shape[0 if transposed else 1]
    if x.shape[1] != columns:
        product = "x W takes x (M, N)" if transposed else "x W^T takes x (M, K)"
        raise ValueError(f"{op}: x is {tuple(x.shape)} and W (N, K) is {tuple(weight.shape)}; {product}")


def save(ctx, weight: Packed) -> None:
    """Keeps a weight for the backward: its tensors as autograd wants them, None where it has none."""
    ctx.save_for_backward(*weight._replace(shape=None, block_size=None))
    ctx.layout = weight.shape, weight.block_size


def saved(ctx) -> Packed:
    return Packed(*ctx.saved_tensors)._replace(shape=ctx.layout[0], block_size=ctx.layout[1])
