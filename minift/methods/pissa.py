"""PiSSA: a start at the principal singular values of the weight.

    W = U S V^T,   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T,   W_res = W - s B A   stays frozen

With s the scaling of LoRA. The layer starts as the base and trains its r largest directions. The residual is
not stored: the wrapper takes the frozen start off instead (low_rank.py). W of a quantized layer is its
dequantized weight.
Source: Meng, Wang and Zhang 2024, arXiv:2404.02948, equations 2 to 4.
"""

import torch
from torch import nn

from minift.models.interface import dense_weight
from minift.models.wrappers import innermost


def pissa(
    layer: nn.Module, r: int, scaling: float, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r), fp32 (fp64 for fp64)."""
    return principal(dense_weight(innermost(layer)), r, scaling)


def principal(W: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) with scaling * B A the best approximation of W (out, in) of rank r."""
    wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
