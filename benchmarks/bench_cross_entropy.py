"""cross_entropy: the loss of a dense head and its gradients, without the logits of all positions.

The heads of SmolLM2 (49152 x 576) and, on a GPU, of Llama 3 (128256 x 4096); n positions. A frozen head has
the gradient of the hidden states, a trained one its own as well. Beside torch: the logits, converted to fp32,
and its cross-entropy. Gate: loss and gradients against `cross_entropy_ref` in fp64, within harness.BOUNDS.
Limit: the products, 2 n V D operations for the loss and as many for each gradient; head and hidden states
move once forward and once backward. On a GPU the memory that a call takes at its peak is given as well.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import backend, products
from benchmarks.limits import DEVICE
from benchmarks.weights import dtypes, labels, nbytes, random
from minift.kernels.cross_entropy import cross_entropy, cross_entropy_ref

HEADS = ((49152, 576), (128256, 4096))


def sizes(quick: bool) -> list[tuple[int, int, int]]:
    """(n, V, D)"""
    if DEVICE == "cuda":
        return [(n, *head) for head in HEADS[quick:] for n in ((2048,) if quick else (512, 2048, 8192))]
    return [(n, *HEADS[0]) for n in ((64,) if quick else (128, 512))]


def whole(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def sides_of(weight, targets, trained: bool) -> dict:
    """The calls take hidden and, to train it, the weight."""
    rest = {"targets": targets} if trained else {"targets": targets, "weight": weight}

    def exact(hidden, weight=weight):
        return cross_entropy_ref(hidden, weight.double(), targets)

    return {
        name: ([partial(call, **rest)], exact) for name, call in (("minift", cross_entropy), ("torch", whole))
    }


def peak(call, inputs) -> float:
    """MiB that loss and gradients take beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(call(*inputs), inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for n, V, D in sizes(quick):
            weight = random(V, D, dtype=dtype, scale=D**-0.5)
            hidden = random(n, D, dtype=dtype, seed=1).requires_grad_()
            targets = torch.randint(V, (n,), device=DEVICE)
            for trained in (False,) if quick else (False, True):
                inputs = (hidden, weight.requires_grad_()) if trained else (hidden,)
                sides = sides_of(weight, targets, trained)
                row = labels("cross_entropy", weight, n=n, head="trained" if trained else "frozen")
                flops = (2 * n * V * D, (6 if trained else 4) * n * V * D)
                made = products(row, sides, inputs, nbytes(weight, hidden), flops, quick, left_out)
                if DEVICE == "cuda":
                    peaks = {name: peak(calls[0], inputs) for name, (calls, _) in sides.items()}
                    made[-1]["peak MiB"] = ", ".join(f"{name} {mib:.0f}" for name, mib in peaks.items())
                rows += made
    ran = backend(partial(cross_entropy, hidden.detach(), weight.detach(), targets))
    return rows, {"backend": ran, "left out": left_out}
