"""What more than one architecture uses: RMSNorm, rotary positions, the KV cache."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_tables(position_ids, head_dim: int, theta: float, dtype):
    """cos and sin of position * theta^(-2i/hd): (B, T) -> two (B, 1, T, hd/2), computed in fp32.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    device = position_ids.device
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponent           # (B, 1, T, hd/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + hd/2}), the split-half layout: x (B, H, T, hd) -> the same shape."""
    x1, x2 = x.chunk(2, dim=-1)                                                  # (B, H, T, hd/2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class KVCache:
    """Keys and values of every block for at most `capacity` tokens, in storage allocated once.

    Bytes: 2 * blocks * B * KV * capacity * hd * element size.
    """

    def __init__(self, blocks: int, B: int, KV: int, capacity: int, hd: int, dtype, device):
        self.keys, self.values = torch.empty(2, blocks, B, KV, capacity, hd, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0       # tokens that every block has seen

    def update(self, block: int, k, v):
        """Append k and v (B, KV, T, hd) of one block; returns all of its keys and values (B, KV, S, hd)."""
        S = self.length + k.shape[2]
        if S > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens and {S} were given; make it larger")
        self.keys[block, :, :, self.length:S] = k
        self.values[block, :, :, self.length:S] = v
        return self.keys[block, :, :, :S], self.values[block, :, :, :S]

    def advance(self, T: int) -> None:
        """All blocks have appended their T tokens."""
        self.length += T
