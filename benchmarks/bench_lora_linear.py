"""lora_linear: x W^T + scaling (x A^T) B^T, W dense or NF4, and its backward to x, A and B.

r = 16, A and B in fp32 as they are trained. Beside torch's products over the same W dense and, for NF4,
bitsandbytes' Linear4bit in training mode with the same two products after it. Gate: every side against the
formula in fp64, with the W that it stands for in x's dtype, within harness.BOUNDS. Limit: W, x, y, A and B
move once; 2 M (N K + r (N + K)) operations forward, and as many and 2 M r (N + K) more for the backward.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import backend, peer, products
from benchmarks.weights import (
    copies,
    dtypes,
    labels,
    linear4bit,
    nbytes,
    pack,
    random,
    row_counts,
    shapes,
    stands_for,
)
from minift.kernels.dequantize_4bit import dequantize_4bit_ref
from minift.kernels.lora_linear import lora_linear
from minift.kernels.matmul_4bit import matmul_4bit

R, SCALING = 16, 2.0


def ours(x, A, B, weight):
    return lora_linear(x, weight, A, B, SCALING)


def separately(x, A, B, base):
    """The products one after the other, in x's dtype."""
    return base(x) + SCALING * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def exactly(W):
    return lambda x, A, B: x @ W.double().t() + SCALING * (x @ A.t()) @ B.t()


def sides_of(w, kind: str, left_out: dict) -> tuple[dict, int]:
    """The sides, and the bytes of minift's weight."""
    weight = w if kind == "dense" else pack(w, "nf4", True)
    W = w if kind == "dense" else dequantize_4bit_ref(weight, torch.empty_like(w))

    exact = exactly(W)
    torch_side = [partial(separately, base=partial(F.linear, weight=each)) for each in copies(W)]
    sides = {
        "minift": ([partial(ours, weight=each) for each in copies(weight)], exact),
        "torch dense": (torch_side, exact),
    }
    if kind == "nf4":
        with peer("bitsandbytes", left_out):
            layers = [linear4bit(w, True, train=True) for _ in copies(weight)]
            calls = [partial(separately, base=layer) for layer in layers]
            sides["bitsandbytes train"] = (calls, exactly(stands_for(layers[0])))
    return sides, nbytes(weight)


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for N, K in shapes(quick):
            w = random(N, K, dtype=dtype, scale=0.02)
            A = random(R, K, dtype=torch.float32, scale=K**-0.5).requires_grad_()
            B = random(N, R, dtype=torch.float32, scale=0.02, seed=1).requires_grad_()
            for kind in ("dense", "nf4"):
                sides, size = sides_of(w, kind, left_out)
                for M in row_counts(quick):
                    x = random(M, K, dtype=dtype, seed=M).requires_grad_()
                    moved = size + nbytes(x, A, B) + M * N * w.element_size()
                    base, low_rank = 2 * M * N * K, 2 * M * R * (N + K)
                    flops = (base + low_rank, 2 * base + 3 * low_rank) if M >= 256 else (base + low_rank,)
                    row = labels("lora_linear", w, weight=kind, M=M)
                    rows += products(row, sides, (x, A, B), moved, flops, quick, left_out)
    base = backend(partial(matmul_4bit, x, pack(w, "nf4", True)))
    ran = f"{backend(partial(lora_linear, x, w, A, B, SCALING))}, of the NF4 product {base}"
    return rows, {"backend": ran, "left out": left_out}
