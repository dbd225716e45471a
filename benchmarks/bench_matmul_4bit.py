"""matmul_4bit: x W^T with W in NF4, and its backward to x.

Beside torch with the same W dense, bitsandbytes' Linear4bit in training mode and after eval() (on a CPU it
repacks the weight then, and computes in bf16), and torchao's linear_nf4. Gate: every side against the product
in fp64 of x and the W that it stands for, in x's dtype (`dequantize_4bit_ref`), within harness.BOUNDS. Limit:
the packed weight, x and y move once; 2 M N K operations, and as many for the backward.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import backend, peer, products
from benchmarks.limits import DEVICE
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
from minift.kernels import runtime
from minift.kernels.dequantize_4bit import dequantize_4bit_ref
from minift.kernels.matmul_4bit import matmul_4bit


def exactly(W):
    return lambda x: x @ W.double().t()


def along(path: str, x, weight):
    with runtime.using(path=path):
        return matmul_4bit(x, weight)


def sides_of(w, weight, left_out: dict) -> dict:
    packed, W = copies(weight), dequantize_4bit_ref(weight, torch.empty_like(w))
    exact = exactly(W)
    sides = {
        "minift": ([partial(matmul_4bit, weight=each) for each in packed], exact),
        "torch dense": ([partial(F.linear, weight=each) for each in copies(W)], exact),
    }
    if DEVICE == "cuda":  # where minift takes one of them
        for path in runtime.PATHS:
            sides[path] = ([partial(along, path, weight=each) for each in packed], exact)
    with peer("bitsandbytes", left_out):
        layers = {m: [linear4bit(w, weight.nested, m == "train") for _ in packed] for m in ("train", "eval")}
        truth = exactly(stands_for(layers["train"][0]))
        sides |= {f"bitsandbytes {mode}": (calls, truth) for mode, calls in layers.items()}
    if weight.nested:
        with peer("torchao", left_out):
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

            tensors = [to_nf4(w) for _ in packed]
            truth = exactly(tensors[0].get_original_weight())
            sides["torchao"] = ([partial(linear_nf4, weight=each) for each in tensors], truth)
    return sides


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for N, K in shapes(quick):
            w = random(N, K, dtype=dtype, scale=0.02)
            for nested in (True,) if quick else (False, True):
                weight = pack(w, "nf4", nested)
                sides = sides_of(w, weight, left_out)
                for M in row_counts(quick):
                    x = random(M, K, dtype=dtype, seed=M).requires_grad_()
                    row = labels("matmul_4bit", w, scales="nested" if nested else "fp32", M=M)
                    moved = nbytes(weight, x) + M * N * w.element_size()
                    flops = (2 * M * N * K, 4 * M * N * K) if M >= 256 else (2 * M * N * K,)
                    rows += products(row, sides, (x,), moved, flops, quick, left_out)
    return rows, {"backend": backend(partial(matmul_4bit, x, weight)), "left out": left_out}
