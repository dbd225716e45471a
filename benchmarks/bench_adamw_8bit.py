"""adamw_8bit: one step over the adapters of a model, or over whole matrices.

Beside bitsandbytes' and torchao's 8-bit AdamW (torchao's is compiled, which takes half a minute, so not with
--quick) and torch's fused one, whose moments are fp32. Adapters: fp32, A and B for r = 16 of seven square
layers in each block. A time is that of a whole step, launches and host included. Gates: three steps give the
numbers of `adamw_8bit_ref`; after one, the peers' parameters differ from ours by at most 8 fp32 roundings of
the update, which is at most lr, and two of p in its dtype on either side.

Limit: p, m and v are read and written and g is read, 16 bytes an element for fp32 and 10 for bf16.
"""

from functools import partial

import torch

from benchmarks.harness import backend, gate, gate_equal, peer, timed_row
from benchmarks.limits import DEVICE
from benchmarks.weights import nbytes, random
from minift.kernels.adamw_8bit import BLOCK, Moments, adamw_8bit, adamw_8bit_ref
from minift.optim.adamw_8bit import dynamic_maps

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def tensors(kind: str, quick: bool) -> list[torch.Tensor]:
    if kind == "matrices":
        side = 4096 if DEVICE == "cuda" else 1024 if quick else 2048
        sizes, dtype = [(side, side)] * (1 if quick else 4), torch.bfloat16
    else:
        blocks, width = (32, 4096) if DEVICE == "cuda" else (4 if quick else 30, 576)
        sizes, dtype = [(16, width), (width, 16)] * 7 * blocks, torch.float32
    return [random(*size, dtype=dtype, scale=0.02, seed=i) for i, size in enumerate(sizes)]


def zeros(p) -> Moments:
    sizes = ((p.numel(), torch.uint8), (-(-p.numel() // BLOCK), torch.float32)) * 2
    return Moments(*(torch.zeros(size, dtype=dtype, device=DEVICE) for size, dtype in sizes))


def steps(op, params, grads, maps, count: int) -> list[torch.Tensor]:
    """The parameters and then the states after some steps."""
    params, states = [p.clone() for p in params], [zeros(p) for p in params]
    for step in range(1, count + 1):
        op(params, grads, states, maps, step, **SETTINGS)
    return [*params, *(x for state in states for x in state)]


def optimizer(name, kind, params, grads, ours, **options):
    """The step of another's optimizer, its first one compared with ours."""
    tensors = [torch.nn.Parameter(p.clone()) for p in params]
    for p, g in zip(tensors, grads, strict=True):
        p.grad = g.clone()
    step = kind(tensors, **SETTINGS, **options).step
    step()
    for p, q in zip(ours, tensors, strict=True):
        bound = SETTINGS["lr"] * 2**-21 + 2 * torch.finfo(p.dtype).eps * p.abs().max().item()
        gate(name, (p - q).abs().max().item(), bound)
    return [step]


def peers(*tensors, quick: bool, left_out: dict) -> dict:
    sides = {"torch fused, fp32 state": optimizer("torch", torch.optim.AdamW, *tensors, fused=True)}
    with peer("bitsandbytes", left_out):
        import bitsandbytes as bnb

        sides["bitsandbytes"] = optimizer("bitsandbytes", bnb.optim.AdamW8bit, *tensors)
    if not quick:
        with peer("torchao", left_out):
            from torchao.optim import AdamW8bit

            sides["torchao"] = optimizer("torchao", AdamW8bit, *tensors)
    return sides


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out, maps = [], {}, dynamic_maps(torch.device(DEVICE))
    for kind, dtype in (("adapters", "float32"), ("matrices", "bfloat16")):
        params = tensors(kind, quick)
        grads = [random(*p.shape, dtype=p.dtype, scale=0.01, seed=7) for p in params]
        got, want = (steps(op, params, grads, maps, 3) for op in (adamw_8bit, adamw_8bit_ref))
        for one, other in zip(got, want, strict=True):
            gate_equal("adamw_8bit", one, other)
        once = steps(adamw_8bit, params, grads, maps, 1)[: len(params)]
        mine, states = [p.clone() for p in params], [zeros(p) for p in params]
        call = partial(adamw_8bit, mine, grads, states, maps, 100, **SETTINGS)
        sides = {"minift": [call], **peers(params, grads, once, quick=quick, left_out=left_out)}
        size = sum(p.numel() for p in params)
        moved = 3 * nbytes(*params) + 4 * size + 16 * size // BLOCK
        row = {"op": "adamw_8bit", "tensors": f"{len(params)} {kind}", "numbers": size, "dtype": dtype}
        rows.append(timed_row(row, sides, moved, 0, quick, graph=False))
    return rows, {"backend": backend(call), "left out": left_out}
