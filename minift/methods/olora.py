"""OLoRA: a start at orthonormal directions of the weight.

    W = Q R,   B = Q_r (out, r), orthonormal columns,   A = R_r (r, in),   W_res = W - s B A   stays frozen

With s the scaling of LoRA. The layer starts as the base, up to rounding, and trains orthonormal directions.
The residual is not stored: the wrapper takes the frozen start off instead (low_rank.py).
Source: Bueyuekakyuez 2024, arXiv:2406.01775, algorithm 1.
"""

import torch


def olora(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W (out, in) -> A (r, in) and B (out, r), fp32 (fp64 for fp64)."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    Q, R = torch.linalg.qr(wide)
    return R[:r], Q[:, :r]
