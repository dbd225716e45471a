"""linear: the product with a dense matrix; for few rows of bf16 on CPUs, as fast as the matrix can be read.

    y = x W^T + bias        x (..., K), W (N, K), bias (N,), y (..., N)

M rows of x meet N K weights with 2 M operations each: for few rows the limit is reading W, once, and torch's
products of bf16 take a multiple of that (benchmarks/bench_linear.py). The C file sums in fp32 and rounds y
once, after the bias; a row's bits do not depend on the other rows. Its AMX tiles take subnormal numbers as 0.
All else is torch's product: more rows, other dtypes, other devices, and what trains.
"""

import torch
import torch.nn.functional as F

from minift.kernels import library, runtime

# As many rows as an AMX tile has; without tiles, more than a few rows cost more than reading W.
ROWS, ROWS_WITHOUT_TILES = 16, 4


def linear_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K), weight (N, K), bias (N,) -> x W^T + bias (..., N)."""
    y = x @ weight.t()
    return y if bias is None else y + bias


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Same contract as `linear_ref`. Trains."""
    if few_rows(x, weight, bias):
        tensors = (x, weight) if bias is None else (x, weight, bias)
        if runtime.takes_c("linear", *tensors):
            return library.linear(x.contiguous(), weight, bias)
    return F.linear(x, weight, bias)


def few_rows(x, weight, bias) -> bool:
    """Whether the C file has this product."""
    most = ROWS if library.LEVELS[library.LEVEL] == "amx" else ROWS_WITHOUT_TILES
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and weight.ndim == 2
        and 0 < x.numel() <= most * x.shape[-1]
        and x.shape[-1] == weight.shape[1]
        and weight.is_contiguous()
        and weight.numel() > 0
        and (bias is None or (bias.dtype == torch.bfloat16 and bias.shape == weight.shape[:1]))
        and (bias is None or bias.is_contiguous())
    )
