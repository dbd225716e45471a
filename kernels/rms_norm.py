"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension; in one pass on CPUs.

    x (..., D), weight (D,), y (..., D); in fp32 (fp64 for fp64), rounded once, at the end

The C file runs where no gradients are recorded: for one token a chain of torch's operators costs many times
the 3 D numbers that it moves. The norm with a backward of its own is in minift/models/layers.py.
Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
"""

import torch

from minift.kernels import library, runtime


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # (..., 1)
    return (x * torch.rsqrt(norm.square() / x.shape[-1] + eps) * weight).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Same contract as `rms_norm_ref`."""
    here = x.dtype == weight.dtype and x.dtype in library.DTYPES and weight.shape == x.shape[-1:]
    if here and x.numel() and weight.is_contiguous() and runtime.takes_c("rms_norm", x, weight):
        return library.rms_norm(x.contiguous(), weight, eps)
    return rms_norm_ref(x, weight, eps)
