"""Attention, forward and backward: minift.kernels.attention beside torch's and the plain formula.

Shapes of SmolLM2-135M (9 query heads, 3 key-value heads of 64), bf16, causal, batch 4. Gate: minift's
gradients are no further from fp64 than 4 roundings of bf16 (2^-8) of the largest one; the table has the error
of every side.

The limit is arithmetic: 4 B H T^2 hd flops forward (half of them masked) and 10 B H T^2 hd backward with P
recomputed; on a GPU both sides are the same call.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import alternate, gate, quantiles
from minift.kernels.attention import attention, attention_ref


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def run(quick: bool) -> tuple[list[dict], dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides, rows = {"minift": attention, "torch fused": fused, "plain formula": attention_ref}, []
    for T in (128, 256) if quick else (128, 256, 512, 1024):
        B, H, KV, hd = 4, 9, 3, 64
        torch.manual_seed(0)
        q = torch.randn(B, T, H, hd, device=device).bfloat16().transpose(1, 2).detach().requires_grad_()
        k, v = (torch.randn(B, KV, T, hd, device=device).bfloat16().requires_grad_() for _ in range(2))
        do = torch.randn(B, H, T, hd, device=device).bfloat16()
        exact = torch.autograd.grad(attention_ref(*(x.double() for x in (q, k, v))), (q, k, v), do.double())
        error = {}
        for name, side in sides.items():
            got = torch.autograd.grad(side(q, k, v), (q, k, v), do)
            error[name] = max(
                ((g.double() - e.double()).abs().max() / e.abs().max()).item()
                for g, e in zip(got, exact, strict=True)
            )
        gate(f"minift, T = {T}", error["minift"], 2**-6)
        inputs = (q, k, v)

        def step(side, inputs=inputs, do=do):
            return torch.autograd.grad(side(*inputs), inputs, do)

        calls = {name: partial(step, side) for name, side in sides.items()}
        times = alternate(calls, repeats=10 if quick else 30)
        for name, seconds in times.items():
            t = quantiles(seconds)
            rows.append(
                {
                    "T": T,
                    "side": name,
                    "median ms": 1e3 * t["median"],
                    "p20": 1e3 * t["p20"],
                    "p80": 1e3 * t["p80"],
                    "Gflop/s": round(14 * B * H * T * T * hd / t["median"] / 1e9),
                    "largest error": error[name],
                    "speed against torch": quantiles(times["torch fused"])["median"] / t["median"],
                }
            )
    return rows, {}
