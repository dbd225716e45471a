"""OLoRA: a start at orthonormal directions of the weight.

    W = Q R,   B = Q_r (out, r), orthonormal columns,   A = R_r (r, in),   W_res = W - s B A   stays frozen

With s the scaling of LoRA. The layer starts as the base and trains orthonormal directions. The residual is
not stored: the wrapper takes the frozen start off instead (low_rank.py). W of a quantized layer is its
dequantized weight.
Source: Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
"""

import torch
from torch import nn

from minift.models.interface import dense_weight
from minift.models.wrappers import innermost


def olora(
    layer: nn.Module, r: int, scaling: float, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r), fp32 (fp64 for fp64)."""
    W = dense_weight(innermost(layer)).detach()
    Q, R = torch.linalg.qr(W.to(torch.promote_types(W.dtype, torch.float32)))
    return R[:r], Q[:, :r]
