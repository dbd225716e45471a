"""Causal attention with grouped queries, trained on CPUs at the speed of its matrix products.

    P = softmax(q k^T / sqrt(hd) + bias),   o = P v,   bias 0 where attended and -inf elsewhere
    dv = P^T do,   dP = do v^T,   dS = P * (dP - rowsum(do * o)),   dq = dS k / sqrt(hd),   dk = dS^T q / sqrt(hd)

B batch, H query heads, KV key-value heads (H = G * KV), T queries, S keys, hd head size.
The forward is torch's fused `scaled_dot_product_attention` everywhere, and so is the backward on GPUs.
torch's own backward on CPUs runs bf16 through scalar-converted blocks (benchmarks/bench_attention.py has
the measured ratio), so there the formulas above run as dense products over slabs of query rows.
Source: FlashAttention, Dao et al. 2022, arXiv:2205.14135, section 3.1 and appendix B.2 (recomputed P).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SLAB = 2**24  # score elements in flight in backward: 64 MiB in fp32, whatever the sequence length


def causal_mask(T: int, S: int, device=None) -> torch.Tensor:
    """(T, S) bool, true where query t may see key s; the last query sees the last key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_ref(q, k, v, mask=None):
    """q (B, H, T, hd), k and v (B, KV, S, hd), mask bool broadcastable to (B, 1, T, S) -> (B, H, T, hd).

    True in `mask` means attended; None means causal, aligned to the last key.
    """
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)      # (B, H, S, hd)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                    # (B, H, T, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def attention(q, k, v, mask=None):
    """Same contract as `attention_ref`."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trains and q.device.type == "cpu":
        return CPUAttention.apply(q, k, v, mask)
    return _fused(q, k, v, mask)


def _fused(q, k, v, mask):
    T, S = q.shape[2], k.shape[2]
    square = mask is None and T == S
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)


class CPUAttention(torch.autograd.Function):
    """Keeps q, k, v, o and recomputes P slab by slab; softmax and sums in fp32 (fp64 for fp64)."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        o = _fused(q, k, v, mask)
        ctx.save_for_backward(q, k, v, o, mask)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, mask = ctx.saved_tensors
        (B, H, T, hd), (KV, S) = q.shape, k.shape[1:3]
        wide = torch.promote_types(q.dtype, torch.float32)
        if mask is None:
            mask = causal_mask(T, S, q.device)
        mask = mask.expand(B, 1, T, S)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        slab = max(1, min(T, SLAB // (B * H * S)))
        for t in range(0, T, slab):
            rows = slice(t, min(t + slab, T))
            dq[:, :, rows], dk_rows, dv_rows = _backward_rows(
                q[:, :, rows], k, v, o[:, :, rows], do[:, :, rows], mask[:, :, rows])
            dk += dk_rows
            dv += dv_rows
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _backward_rows(q, k, v, o, do, mask):
    """The formulas of the module docstring for some query rows; products in q's dtype."""
    (B, H, T, hd), (KV, S) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = hd**-0.5

    def grouped(x):
        return x.reshape(B, KV, H // KV * T, x.shape[-1])                    # heads of a group share k and v

    def by_head(x):
        return x.view(B, H, T, S)

    delta = (do.to(wide) * o.to(wide)).sum(-1, keepdim=True)                 # (B, H, T, 1)
    P = by_head(grouped(q) @ k.transpose(-1, -2)).to(wide).mul_(scale)
    P = P.masked_fill_(~mask, float("-inf")).softmax(dim=-1)                 # (B, H, T, S)
    dP = by_head(grouped(do) @ v.transpose(-1, -2)).to(wide)
    dS = grouped(dP.sub_(delta).mul_(P).mul_(scale).to(q.dtype))
    dv = grouped(P.to(q.dtype)).transpose(-1, -2) @ grouped(do)
    return (dS @ k).view(B, H, T, hd), dS.transpose(-1, -2) @ grouped(q), dv
