"""Products of few rows with dense bf16 matrices: minift.kernels.linear beside torch's.

One call goes over copies of a matrix that together do not fit into the caches, as a model's layers do when
one token is generated. The limit is reading them once; torch's products of more rows are minift's.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import backend, products
from benchmarks.limits import DEVICE
from minift.kernels.linear import linear

BYTES = 2**28  # of all copies
SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 4096)]


def over(product, weights):
    """x -> its product with the last matrix, after those with all others."""

    def call(x):
        for W in weights:
            y = product(x, W)
        return y

    return call


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for N, K in SHAPES[1:2] if quick else SHAPES:
        count = max(1, BYTES // (2 * N * K))
        weights = [torch.randn(N, K, device=DEVICE).bfloat16() for _ in range(count)]
        exact = over(lambda x, W: x @ W.to(x.dtype).t(), weights[-1:])
        sides = {"minift": ([over(linear, weights)], exact), "torch": ([over(F.linear, weights)], exact)}
        for M in (1, 8) if quick else (1, 2, 4, 8, 16):
            x = torch.randn(M, K, device=DEVICE).bfloat16()
            labels = {"op": "linear", "M": M, "N": N, "K": K, "matrices": count, "dtype": "bfloat16"}
            moved, flops = 2 * N * K * count, 2 * M * N * K * count
            rows += products(labels, sides, (x,), moved, (flops,), quick, left_out)
    x = torch.randn(1, 64, device=DEVICE).bfloat16()
    with torch.no_grad():
        ran = backend(lambda: linear(x, x))
    return rows, {"backend": ran, "left out": left_out}
