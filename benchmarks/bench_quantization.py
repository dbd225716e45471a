"""NF4 on a CPU beside bitsandbytes: quantize, dequantize, and a linear layer's forward and backward.

Blocks of 64, fp32 scales, so that both sides do the same work; bitsandbytes in training mode, where it
dequantizes and multiplies as we do, and after eval(), where it repacks the weight for AVX-512. Gates: packed
bytes and scales equal; dequantized numbers equal; products, and gradients, within 2^-6 (bf16: 4 roundings) or
2^-16 (fp32: 256 roundings, where sqrt(4096) are expected) of the largest exact entry.

Limits: quantize reads 4 (fp32) or 2 bytes and writes 0.56 for each weight; dequantize reads 0.56 and writes 4
or 2; a product is 2 M N K flops forward and as many for dx. `x` is the median ratio of the two sides' pairs.
"""

import statistics
from functools import partial

import torch

from benchmarks.harness import alternate, gate, quantiles, report
from minift.quant import quantize_weight
from minift.quant.linear import QuantizedLinear

SHAPES = ((4096, 4096), (11008, 4096))
BOUNDS = {torch.bfloat16: 2**-6, torch.float32: 2**-16}


def theirs(weight):
    """bitsandbytes' layer in training mode, on the CPU."""
    import bitsandbytes as bnb

    N, K = weight.shape
    options = {"quant_type": "nf4", "compress_statistics": False}
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, **options)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **options)
    return layer.to("cpu").train()


def compare(rows, what, weight, M, ours, peer, repeats):
    """Time two calls in turn; one row."""
    times = alternate({"minift": ours, "bitsandbytes": peer}, repeats)
    pairs = [b / a for a, b in zip(times["minift"], times["bitsandbytes"], strict=True)]
    mine, other = quantiles(times["minift"]), quantiles(times["bitsandbytes"])
    rows.append(
        {
            "what": what,
            "N x K": f"{weight.shape[0]} x {weight.shape[1]}",
            "dtype": str(weight.dtype).removeprefix("torch."),
            "M": M or "-",
            "minift ms": 1e3 * mine["median"],
            "bitsandbytes ms": 1e3 * other["median"],
            "x": statistics.median(pairs),
            "minift p20 - p80": f"{1e3 * mine['p20']:.1f} - {1e3 * mine['p80']:.1f}",
        }
    )


def close(name, got, exact, dtype):
    gate(name, ((got.double() - exact).abs().max() / exact.abs().max()).item(), BOUNDS[dtype])


def products(rows, weight, ours, layer, M, repeats):
    """Forward; forward and backward; and, for few rows, their repacked inference."""
    N, K = weight.shape
    torch.manual_seed(M)
    x = torch.randn(M, K).to(weight.dtype).requires_grad_()
    dy = torch.randn(M, N).to(weight.dtype)
    W = ours.dequantize().double()
    if M <= 16:
        layer.eval()  # repacks the weight for good, so these rows come last
        x = x.detach()
        exact = x.double() @ W.t()
        with torch.inference_mode():
            for name, side in (("minift", ours), ("bitsandbytes", layer)):
                close(f"{name} after eval()", side(x), exact, torch.bfloat16)  # theirs computes in bf16
            compare(rows, "forward, eval()", weight, M, partial(ours, x), partial(layer, x), repeats)
        return
    exact, exact_dx = x.detach().double() @ W.t(), dy.double() @ W
    for name, side in (("minift", ours), ("bitsandbytes", layer)):
        close(f"{name} forward", side(x).detach(), exact, weight.dtype)
        close(f"{name} backward", torch.autograd.grad(side(x), x, dy)[0], exact_dx, weight.dtype)

    def both(side):
        return torch.autograd.grad(side(x), x, dy)

    compare(rows, "forward", weight, M, partial(ours, x), partial(layer, x), repeats)
    compare(rows, "forward + backward", weight, M, partial(both, ours), partial(both, layer), repeats)


def run(quick: bool) -> None:
    import bitsandbytes.functional as F

    rows, repeats = [], 3 if quick else 15
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((1024, 1024),) if quick else SHAPES:
            torch.manual_seed(0)
            weight = (0.02 * torch.randn(shape)).to(dtype)
            quantized = quantize_weight(weight, "nf4", 64, double_quant=False)
            packed, state = F.quantize_4bit(weight, quant_type="nf4", blocksize=64)
            gate("packed", (quantized.packed != packed.view(-1)).sum().item(), 0)
            gate("absmax", (quantized.absmax != state.absmax).sum().item(), 0)
            gate("dequantized", (quantized.dequantize() != F.dequantize_4bit(packed, state)).sum().item(), 0)
            mine = partial(quantize_weight, weight, "nf4", 64, False)
            peer = partial(F.quantize_4bit, weight, quant_type="nf4", blocksize=64)
            compare(rows, "quantize", weight, 0, mine, peer, max(3, repeats // 3))
            peer = partial(F.dequantize_4bit, packed, state)
            compare(rows, "dequantize", weight, 0, quantized.dequantize, peer, repeats)
            ours, layer = QuantizedLinear.from_weight(quantized), theirs(weight)
            for M in (256, 512, 1, 16):
                products(rows, weight, ours, layer, M, repeats)
    report("quantization", rows, {}, write=not quick)
