"""What more than one architecture uses: linear layers, RMSNorm, rotary positions, the KV cache."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from minift.kernels.linear import linear
from minift.kernels.rms_norm import rms_norm


class Linear(nn.Linear):
    """y = x W^T + bias, through the op that is fast on few rows."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        if torch.is_grad_enabled():
            return Normalize.apply(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


class Normalize(torch.autograd.Function):
    """RMSNorm with its own backward, which keeps x and one number a row; fp32 inside (fp64 for fp64).

    n = x * rstd,   g = dy * weight,   dx = rstd * (g - n * mean(g * n)),   dweight = sum over rows of dy * n
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))  # (B, T, 1)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        n = x * rstd
        dweight = (dy * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        g = dy.to(n.dtype).mul_(weight) if dy.dtype != n.dtype else dy * weight
        mean = (g * n).mean(dim=-1, keepdim=True)
        return g.sub_(n.mul_(mean)).mul_(rstd).to(dy.dtype), dweight, None


def rotary_frequencies(head_dim: int, theta: float, device=None) -> torch.Tensor:
    """theta^(-2i/hd) for the pairs i of a head: (hd/2,) fp32. Source: Su et al. 2021, section 3.2.2."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return theta**-exponent


def rotary_tables(position_ids, frequencies, dtype):
    """cos and signed sin of position * frequency for `rotate`: (B, T) -> two (B, 1, T, hd), from fp32.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, hd/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + hd/2}), the split-half layout: x (B, H, T, hd) -> the same shape.

    y_i = x_i cos - x_{i + hd/2} sin,   y_{i + hd/2} = x_{i + hd/2} cos + x_i sin
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class KVCache:
    """Keys and values of every block for at most `capacity` tokens, in storage allocated once.

    Bytes: 2 * blocks * B * KV * capacity * hd * element size.
    """

    def __init__(self, B: int, capacity: int, dims, dtype, device):
        shape = (2, dims.blocks, B, dims.kv_heads, capacity, dims.head_dim)
        self.keys, self.values = torch.empty(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0  # tokens that every block has seen, virtual ones included
        self.virtual = None  # (B, P) bool: which of the virtual tokens before the text each text sees

    def of(self, block: int):
        """All places of one block: keys and values (B, KV, capacity, hd)."""
        return self.keys[block], self.values[block]

    def update(self, block: int, k, v):
        """Append k and v (B, KV, T, hd) of one block; returns all of its keys and values (B, KV, S, hd)."""
        S = self.length + k.shape[2]
        if self.capacity < S:
            raise ValueError(f"the KV cache holds {self.capacity} tokens and {S} were given; make it larger")
        self.keys[block, :, :, self.length : S] = k
        self.values[block, :, :, self.length : S] = v
        return self.keys[block, :, :, :S], self.values[block, :, :, :S]

    def advance(self, T: int) -> None:
        """All blocks have appended their T tokens."""
        self.length += T

    def reorder(self, rows) -> None:
        """Text i goes on from what text rows[i] was; other storage is allocated only for another number."""
        blocks, B, *rest = self.keys.shape  # (blocks, B, KV, capacity, hd)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old if len(rows) == B else old.new_empty(blocks, len(rows), *rest)
            new[..., : self.length, :] = old[:, rows, :, : self.length]
            setattr(self, name, new)
        self.virtual = None if self.virtual is None else self.virtual[rows]


class CrossCache(KVCache):
    """Those of a decoder, beside keys and values of what an encoder made of each text."""

    def __init__(self, B: int, capacity: int, dims, dtype, device):
        super().__init__(B, capacity, dims, dtype, device)
        self.encoded = None  # of each block keys and values, each (B, H, S, hd)
        self.seen = None  # (B, 1, 1, S) bool: the real ones among them, or None for all
        self.texts = torch.arange(B, device=device)  # whose states a row has

    def reorder(self, rows):
        super().reorder(rows)
        texts, before = self.texts[rows], self.texts
        self.texts = texts
        if self.encoded is None or torch.equal(texts, before):  # as beams of one text do, at every step
            return
        self.encoded = [(k[rows], v[rows]) for k, v in self.encoded]
        self.seen = None if self.seen is None else self.seen[rows]
