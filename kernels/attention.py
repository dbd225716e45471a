"""Attention with grouped queries, causal or not, trained on CPUs at the speed of its matrix products.

    P = softmax(q k^T / sqrt(hd) + bias),   o = P v,   bias 0 where attended and -inf elsewhere
    dv = P^T do,   dP = do v^T,   dS = P * (dP - rowsum(P * dP))
    dq = dS k / sqrt(hd),   dk = dS^T q / sqrt(hd)

B batch, H query heads, KV key-value heads (H = G * KV), T queries, S keys, hd head size.
The forward is torch's fused `scaled_dot_product_attention` everywhere, and so is the backward on GPUs.
torch's own backward on CPUs runs bf16 through scalar-converted blocks (benchmarks/bench_attention.py has
the measured ratio), so there the formulas above run as dense products over slabs of query rows.
Source: FlashAttention, Dao et al. 2022, arXiv:2205.14135, section 3.1 and appendix B.2 (recomputed P).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Backward works on at most ROWS query rows and SLAB scores at a time, whatever the sequence length.
ROWS = 128
SLAB = 2**24


def causal_mask(T: int, S: int, device=None) -> torch.Tensor:
    """(T, S) bool, true where query t may see key s; the last query sees the last key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_ref(q, k, v, mask=None, causal=True):
    """q (B, H, T, hd), k and v (B, KV, S, hd), mask bool broadcastable to (B, 1, T, S) -> (B, H, T, hd).

    True in `mask` means attended; None means causal, aligned to the last key, or everything.
    """
    G = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)  # (B, H, S, hd)
    if mask is None:
        T, S = q.shape[2], k.shape[2]
        mask = causal_mask(T, S, q.device) if causal else torch.ones(T, S, dtype=torch.bool, device=q.device)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def attention(q, k, v, mask=None, causal=True):
    """Same contract as `attention_ref`."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if trains and q.device.type == "cpu":
        return CPUAttention.apply(q, k, v, mask, causal)
    return _fused(q, k, v, mask, causal)


def _fused(q, k, v, mask, causal):
    T, S = q.shape[2], k.shape[2]
    causal = causal and mask is None
    square = causal and T == S
    if causal and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)


class CPUAttention(torch.autograd.Function):
    """Keeps q, k, v and recomputes P for some query rows at a time, in q's dtype.

    Without a mask, rows t0 to t1 see only the first t1 + S - T keys, which saves almost half of the work.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, causal):
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal = causal and mask is None
        return _fused(q, k, v, mask, causal)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, mask = ctx.saved_tensors
        (B, H, T, _), S = q.shape, k.shape[2]
        if mask is None:
            mask = causal_mask(T, S, q.device) if ctx.causal else q.new_ones(1, S, dtype=torch.bool)
        bias = _bias(mask, q.dtype).expand(B, 1, T, S)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        rows = max(1, min(ROWS, SLAB // (B * H * S)))
        for start in range(0, T, rows):
            stop = min(start + rows, T)
            seen = stop + S - T if ctx.causal else S
            part = _backward_rows(
                q[:, :, start:stop],
                k[:, :, :seen],
                v[:, :, :seen],
                do[:, :, start:stop],
                bias[:, :, start:stop, :seen],
            )
            dq[:, :, start:stop] = part[0]
            dk[:, :, :seen] += part[1]
            dv[:, :, :seen] += part[2]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _bias(mask, dtype):
    """0 where attended, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _backward_rows(q, k, v, do, bias):
    """The formulas of the module docstring for some query rows; the heads of a group share k and v."""
    (B, H, T, hd), (KV, S) = q.shape, k.shape[1:3]
    q = (q * hd**-0.5).reshape(B, KV, H // KV * T, hd)
    do = do.reshape(B, KV, H // KV * T, hd)
    P = (q @ k.transpose(-1, -2)).view(B, H, T, S).add_(bias).softmax(dim=-1).view(B, KV, H // KV * T, S)
    dP = do @ v.transpose(-1, -2)
    dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)  # P * (dP - rowsum(P * dP))
    dq = (dS @ k).mul_(hd**-0.5).view(B, H, T, hd)
    return dq, dS.transpose(-1, -2) @ q, P.transpose(-1, -2) @ do
