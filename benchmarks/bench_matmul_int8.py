"""matmul_int8: x W^T with W in 8 bits, blocks of 64, fp32 scales, and its backward to x.

Beside torch with the same W dense, bitsandbytes' blockwise dequantization and torch's product, and torchao's
weight-only int8 with a scale for each 64 weights of a row. (bitsandbytes' LLM.int8 quantizes x as well, which
is another product.) Gate: every side against the product in fp64 of x and the W that it stands for, in x's
dtype (`dequantize_int8_ref`), within harness.BOUNDS. Limit: the packed weight, x and y move once; 2 M N K
operations, and as many for the backward.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import backend, peer, products
from benchmarks.limits import DEVICE
from benchmarks.weights import (
    BLOCK_SIZE,
    copies,
    dtypes,
    int8_of,
    labels,
    nbytes,
    pack,
    random,
    row_counts,
    shapes,
)
from minift.kernels import runtime
from minift.kernels.dequantize_int8 import dequantize_int8_ref
from minift.kernels.matmul_int8 import matmul_int8


def exactly(W):
    return lambda x: x @ W.double().t()


def weight_only(w):
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig(granularity=PerGroup(BLOCK_SIZE)))
    return layer


def along(path: str, x, weight):
    with runtime.using(path=path):
        return matmul_int8(x, weight)


def sides_of(w, weight, left_out: dict) -> dict:
    packed, W = copies(weight), dequantize_int8_ref(weight, torch.empty_like(w))
    exact = exactly(W)
    sides = {
        "minift": ([partial(matmul_int8, weight=each) for each in packed], exact),
        "torch dense": ([partial(F.linear, weight=each) for each in copies(W)], exact),
    }
    if DEVICE == "cuda":  # where minift takes one of them
        for path in runtime.PATHS:
            sides[path] = ([partial(along, path, weight=each) for each in packed], exact)
    with peer("bitsandbytes", left_out):
        from bitsandbytes.functional import dequantize_blockwise

        weights = [partial(dequantize_blockwise, *int8_of(w)) for _ in packed]
        calls = [lambda x, weight=weight: F.linear(x, weight()) for weight in weights]
        sides["bitsandbytes"] = (calls, exactly(weights[0]()))
    with peer("torchao", left_out):
        layers = [weight_only(w) for _ in packed]
        sides["torchao"] = (layers, exactly(layers[0].weight.dequantize()))
    return sides


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for N, K in shapes(quick):
            w = random(N, K, dtype=dtype, scale=0.02)
            weight = pack(w, "int8", False)
            sides = sides_of(w, weight, left_out)
            for M in row_counts(quick):
                x = random(M, K, dtype=dtype, seed=M).requires_grad_()
                moved = nbytes(weight, x) + M * N * w.element_size()
                flops = (2 * M * N * K, 4 * M * N * K) if M >= 256 else (2 * M * N * K,)
                rows += products(labels("matmul_int8", w, M=M), sides, (x,), moved, flops, quick, left_out)
    return rows, {"backend": backend(partial(matmul_int8, x, weight)), "left out": left_out}
