"""PiSSA: a start at the principal singular values of the weight.

    W = U S V^T,   B = U_r sqrt(S_r / s),   A = sqrt(S_r / s) V_r^T,   W_res = W - s B A   stays frozen

With s the scaling of LoRA. The layer starts as the base, up to rounding, and trains its r largest directions.
The residual is not stored: the wrapper takes the frozen start off instead (low_rank.py).
Source: Meng, Wang and Zhang 2024, arXiv:2404.02948, equations 2 to 4.
"""

import torch


def pissa(weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W (out, in) -> A (r, in) and B (out, r), fp32 (fp64 for fp64)."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
