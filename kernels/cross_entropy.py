"""Cross-entropy of a dense head, forward and backward, never with the logits of all positions.

    z = W h_i,   lse_i = log sum_v exp(z_v),   loss = sum_i lse_i - z_{t_i}          in nats
    dz = softmax(z) - onehot(t_i),   dh_i = W^T dz,   dW = sum_i dz h_i^T

n supervised positions, D model, V vocabulary. The logits of ROWS positions exist at a time, rounded to the
dtype of hidden as a dense head rounds them; the loss and dz are computed from them in fp32 (fp64 for fp64)
and dz is rounded to the same dtype, in their place. Gradients are made in the forward, while the logits are
there, so that each is computed once; the backward multiplies them by the gradient of the loss.
What limits it: the products, 2 n V D operations for the loss and as many for each of dh and dW. Memory:
ROWS * V numbers, and with dW its sum over chunks, V * D in fp32.
Source: Hsu et al. 2024, arXiv:2410.10989 (chunks, and gradients in the forward); Milakov and Gimelshein 2018,
arXiv:1805.02867, algorithm 3 (the largest logit and the sum in one pass).
"""

import torch

from minift.kernels import runtime
from minift.kernels.runtime import tl, triton

ROWS = 1024  # positions whose logits exist at a time
CACHED = 2**19  # logits that plain torch turns into gradients at a time, so that they stay in a CPU's cache
BLOCK_V = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cross_entropy_ref(hidden, weight, targets):
    """hidden (n, D), weight (V, D) of the same dtype, targets (n,) int64 from 0 to V - 1 -> the sum of nats.

    A scalar, fp32 (fp64 for fp64). Trains in hidden and in weight.
    """
    logits = hidden @ weight.t()  # (n, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.logsumexp(dim=1) - logits.gather(1, targets[:, None])[:, 0]).sum()


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (rows, stride), -inf from column V on; becomes dz
    targets_ptr,
    losses_ptr,
    V,
    stride,
    TRAINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program takes one row: the largest logit and the sum of exponentials, then dz."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    target = tl.where(known, target, 0).to(tl.int32)
    largest, total = float("-inf"), 0.0
    for start in range(0, stride, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        z = tl.load(logits_ptr + column, mask=column < stride, other=float("-inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(z))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest))
    lse = tl.where(known, largest + tl.log(total), float("nan"))
    tl.store(losses_ptr + row, lse - tl.load(logits_ptr + target).to(tl.float32))
    if TRAINS:
        for start in range(0, stride, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + column, mask=column < stride).to(tl.float32)
            dz = tl.exp(z - lse) - tl.where(column == target, 1.0, 0.0)
            tl.store(logits_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < stride)


def cross_entropy(hidden, weight, targets):
    """Same contract as `cross_entropy_ref`, in chunks; weight trains only if it requires a gradient.

    A target outside 0 to V - 1 is an error on CPUs. On GPUs, where finding it would stop the queue, it makes
    the loss and the gradient of its row NaN.
    """
    _check(hidden, weight, targets)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return CrossEntropy.apply(hidden, weight, targets)
    return _chunks(hidden, weight, targets, False, False)[0]


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        loss, dh, dW = _chunks(hidden, weight, targets, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(dh, dW)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():  # dh and dW are numbers here, whose own derivatives are lost
            raise RuntimeError("cross_entropy has no second derivative; use cross_entropy_ref for one")
        return *(None if d is None else d * dloss for d in ctx.saved_tensors), None


def _chunks(hidden, weight, targets, trains_hidden, trains_weight):
    """The loss and, where asked for, the gradients of it."""
    (n, _), V = hidden.shape, weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    has = ("torch",) if hidden.dtype == torch.float64 else ("triton", "torch")
    rows = {"triton": _rows_triton, "torch": _rows_torch}[runtime.choose("cross_entropy", hidden.device, has)]
    buffer = hidden.new_empty(min(n, ROWS), -(-V // 16) * 16)  # rows that start on 16 bytes
    buffer[:, V:] = 0  # oneDNN's bf16 products read an odd K's neighbour, times zero: it must not be NaN
    losses = hidden.new_empty(n, dtype=wide)
    dh = torch.empty_like(hidden) if trains_hidden else None
    one = 0 < n <= ROWS  # then dW is one product, and there is nothing to sum in fp32
    dW = torch.zeros_like(weight, dtype=wide) if trains_weight and not one else None
    for start in range(0, n, ROWS):
        part = slice(start, start + ROWS)
        h = hidden[part]
        logits = buffer[: len(h), :V]
        torch.mm(h, weight.t(), out=logits)
        rows(logits, targets[part], losses[part], trains_hidden or trains_weight)
        if trains_hidden:
            torch.mm(logits, weight, out=dh[part])
        if trains_weight and one:
            dW = logits.t() @ h
        elif trains_weight:
            dW += logits.t() @ h
    loss = losses.sum(dtype=torch.float64).to(wide)
    return loss, dh, dW.to(weight.dtype) if trains_weight else None


def _rows_triton(logits, targets, losses, trains):
    """Fills losses and, to train, overwrites the logits (a view of wider rows) with dz."""
    (rows, V), stride = logits.shape, logits.stride(0)
    whole = logits.as_strided((rows, stride), (stride, 1))
    if stride > V:
        whole[:, V:] = float("-inf")
    work = whole.float() if runtime.INTERPRETED else whole  # the interpreter truncates to bf16
    block = min(BLOCK_V, triton.next_power_of_2(stride))
    with torch.cuda.device_of(work):  # Triton launches on the current device
        cross_entropy_kernel[(rows,)](
            work, targets, losses, V, stride, TRAINS=trains, BLOCK_V=block, num_warps=8
        )
    if work is not whole:
        whole.copy_(work)


def _rows_torch(logits, targets, losses, trains):
    """The same, in pieces that fit into a cache."""
    (rows, V), step = logits.shape, max(1, CACHED // logits.shape[1])
    scratch = torch.empty(min(step, rows), V, dtype=losses.dtype, device=logits.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        z, target = logits[part], targets[part, None]
        known = (target >= 0) & (target < V)
        target = target.where(known, 0)
        x = scratch[: len(z)].copy_(z)
        at_target = x.gather(1, target)
        largest = x.amax(dim=1, keepdim=True).where(known, float("nan"))
        total = x.sub_(largest).exp_().sum(dim=1, keepdim=True)
        losses[part] = (largest + total.log() - at_target)[:, 0]
        if trains:
            x.mul_(1 / total).scatter_add_(1, target, torch.full_like(at_target, -1))
            z.copy_(x)


def _check(hidden, weight, targets):
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(f"{shapes}: hidden is (n, D) and weight (V, D), V at least 1")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"{shapes} {targets.dtype}: there is one int64 target for each row of hidden")
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}; both are fp32, bf16, fp16 or fp64"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}; all "
            "must be on one device"
        )
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not x.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous, its strides are {x.stride()}; call .contiguous() on it"
            )
    if hidden.device.type == "cpu" and len(targets):
        low, high = targets.aminmax()
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"targets go from {low} to {high}; they are tokens from 0 to {len(weight) - 1}: leave out "
                "positions that have none"
            )
