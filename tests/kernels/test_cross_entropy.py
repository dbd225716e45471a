"""minift.kernels.cross_entropy against fp64, within an a-priori bound, in any chunks; laws; mutants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import Build
from mutants import mutate, survives

from minift.kernels import cross_entropy as op
from minift.kernels import runtime
from minift.kernels.cross_entropy import cross_entropy, cross_entropy_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# n, V, D
SHAPES = [(0, 33, 8), (1, 1, 1), (1, 127, 64), (2, 200, 33), (3, 64, 8), (7, 33, 17), (16, 65, 1)]


def draw(shape, dtype=torch.float32, scale=1.0, seed=0, device="cpu"):
    """hidden, weight and targets, among them the first and the last token."""
    (n, V, D), g = shape, torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, D, generator=g) * scale, torch.randn(V, D, generator=g)
    targets = torch.randint(0, V, (n,), generator=g)
    targets[:2] = torch.tensor([0, V - 1])[:n]
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device)


def bounds(hidden, weight, targets):
    """loss, dh and dW in fp64, and componentwise bounds on their errors, for a gradient 1 of the loss.

    u is the rounding inside (2^-24), r that of stored numbers. A product over k terms: gamma(k) = k u / (1 -
    k u) of the absolute values, r for the result, r for partial sums that a library may store, and what
    underflows: 2^-126 for each term, which may be flushed, half a step of fp16 in the result. So z is off by
    at most S, the largest of its row. A term exp(z - largest): the argument is off by u |z - largest| for the
    difference and as much for the factor log2(e), and 2^x by 2 u; it is rescaled once a tile, off by 2 u each
    time. With X the range of a row and at most V tiles and additions, the logarithm of the sum is off by
    (4 V + 4 X + 8) u, and lse by e, which is that and u |lse|, and by S. The loss adds the error of z at the
    target and u |lse - z|. p = exp(z - lse): relative expm1(2 S + e + u (4 X + 8)). dz = p - onehot: rounded
    twice. dh and dW: products with one and two more roundings (Higham 2002, section 3.5).
    """
    u, r = (2.0**-53,) * 2 if hidden.dtype == torch.float64 else (2.0**-24, torch.finfo(hidden.dtype).eps / 2)
    half_step = 2.0**-25 if hidden.dtype == torch.float16 else 0.0
    h, W, V = hidden.double(), weight.double(), len(weight)

    def product(a, b, E_a, roundings):
        k = a.shape[1]
        bound = E_a @ b.abs() + (k * u / (1 - k * u) + roundings * r) * (a.abs() @ b.abs())
        return a @ b, bound + k * 2.0**-126 + half_step * roundings

    z, E_z = product(h, W.t(), torch.zeros_like(h), 2)
    S = E_z.amax(dim=1)
    lse, X = z.logsumexp(dim=1), z.amax(dim=1) - z.amin(dim=1) + 2 * S
    e = u * (4 * V + 4 * X + 8 + lse.abs())
    at_target = targets[:, None]
    nats = lse - z.gather(1, at_target)[:, 0]
    E_nats = 1.01 * (S + e + E_z.gather(1, at_target)[:, 0] + u * (nats + lse.abs()))
    p = z.softmax(dim=1)
    dz = p.scatter_add(1, at_target, -torch.ones_like(lse)[:, None])
    E_dz = p * torch.expm1(2 * S + e + u * (4 * X + 8))[:, None] + 1.01 * (u + r) * (dz.abs() + p) + half_step
    (dh, E_dh), (dW, E_dW) = product(dz, W, E_dz, 3), product(dz.t(), h, E_dz.t(), 4)
    return (nats.sum(), dh, dW), (E_nats.sum() + u * nats.sum(), E_dh, E_dW)


def check_one(module, inputs):
    """Loss and gradients of a module's op, with a gradient of 1, are within the bounds; inputs stay."""
    hidden, weight, targets = inputs
    kept = [x.detach().clone() for x in inputs]
    loss = module.cross_entropy(hidden, weight, targets)
    results = loss, *torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, kept, strict=True))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    assert loss.dtype == wide and loss.shape == () and results[1].dtype == results[2].dtype == hidden.dtype
    exact, allowed = bounds(*(x.detach().cpu() for x in inputs))
    for name, got, want, bound in zip(("loss", "dh", "dW"), results, exact, allowed, strict=True):
        error = (got.detach().cpu().double() - want).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.2f} of the bound"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("rows, cached", [(1024, 2**19), (5, 70)])
def test_torch_stays_within_the_bound(dtype, rows, cached, monkeypatch):
    monkeypatch.setattr(op, "ROWS", rows)
    monkeypatch.setattr(op, "CACHED", cached)
    with runtime.using("torch"):
        for shape in SHAPES:
            check_one(op, draw(shape, dtype))


@pytest.mark.triton
@pytest.mark.parametrize("dtype, rows, block", [*((d, 1024, 4096) for d in DTYPES), (DTYPES[0], 5, 32)])
def test_triton_stays_within_the_bound(dtype, rows, block, monkeypatch, device):
    monkeypatch.setattr(op, "ROWS", rows)
    monkeypatch.setattr(op, "BLOCK_V", block)
    for shape in SHAPES:
        check_one(op, draw(shape, dtype, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 8, 31, 33, 127, 1000, 4096, 11008, 50257])
def test_the_whole_grid(dtype, V):
    for n in (1, 2, 3, 7, 16, 17, 64, 127, 128, 129, 2048):
        for D in (1, 31, 64, 192) if n * V <= 2**23 else ():
            check_one(op, draw((n, V, D), dtype, device="cuda"))


@pytest.mark.triton
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("V", [16, 100])
def test_the_kernel_writes_only_its_rows_and_marks_unknown_targets(trains, V, device, monkeypatch):
    monkeypatch.setattr(op, "BLOCK_V", 32)
    kernel_on_rows(op, trains, V, device)


def kernel_on_rows(module, trains, V, device):
    """Six rows between rows of sentinels, the losses NaN before; two targets that do not exist."""
    buffer = torch.full((8, -(-V // 16) * 16), 77.0, device=device)
    losses = torch.full((8,), 77.0, device=device)
    z, logits = torch.randn(6, V), buffer[1:-1, :V]
    logits.copy_(z)
    losses[1:-1] = float("nan")
    targets = torch.tensor([0, V, 1, -1, V - 1, 2], device=device)
    module._rows_triton(logits, targets, losses[1:-1], trains)
    assert (losses[[0, -1]] == 77).all() and (buffer[[0, -1]] == 77).all()
    assert losses[[2, 4]].isnan().all() and logits[[1, 3]].isnan().all() == trains
    known = torch.tensor([0, 2, 4, 5])
    z, right = z.double()[known], targets.cpu()[known, None]
    want = z.logsumexp(dim=1) - z.gather(1, right)[:, 0]
    dz = z.softmax(dim=1).scatter_add(1, right, -torch.ones(4, 1, dtype=torch.float64))
    # |z| < 8: in `bounds`, X < 16 and |lse| < 16, and what is subtracted is off by as much again
    atol = 2 * (4 * V + 4 * 16 + 8 + 16) * 2.0**-24
    torch.testing.assert_close(losses[1:-1].cpu()[known].double(), want, rtol=0, atol=atol)
    torch.testing.assert_close(logits.cpu()[known].double(), dz if trains else z, rtol=0, atol=atol)


SPECIAL = {
    "zeros": lambda h, W: h.zero_(),
    "large": lambda h, W: h.mul_(1e4),
    "subnormal": lambda h, W: h.mul_(1e-39),
    "one large row": lambda h, W: W[1].mul_(1e4),
}


@pytest.mark.triton
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_values(kind, backend, device):
    inputs = draw((5, 40, 6), device=device)
    with torch.no_grad():
        SPECIAL[kind](*inputs[:2])
    with runtime.using(backend):
        check_one(op, inputs)


@pytest.mark.triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_triton_does_not_hide_what_is_not_finite(bad, device):
    hidden, weight, targets = draw((5, 40, 6), device=device)
    with torch.no_grad():
        hidden[3, 2] = bad
    loss = cross_entropy(hidden, weight, targets)
    (dh,) = torch.autograd.grad(loss, hidden)
    assert not loss.isfinite() and not dh[3].isfinite().any() and dh[[0, 1, 2, 4]].isfinite().all()


def test_gradcheck_and_no_second_derivative(monkeypatch):
    monkeypatch.setattr(op, "ROWS", 3)
    hidden, weight, targets = draw((7, 11, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda h, W: cross_entropy(h, W, targets), (hidden, weight))
    with pytest.raises(RuntimeError, match="cross_entropy has no second derivative"):
        torch.autograd.grad(cross_entropy(hidden, weight, targets), hidden, create_graph=True)


def test_only_what_needs_a_gradient_gets_one_and_it_scales():
    hidden, weight, targets = draw((6, 9, 4))
    cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None and weight.grad is None
    loss = cross_entropy(hidden.detach(), weight, targets)
    loss.backward(retain_graph=True)
    (loss / 4).backward(retain_graph=True)  # the gradient of the loss is a factor, and it may come twice
    assert torch.equal(weight.grad, 1.25 * torch.autograd.grad(loss, weight)[0])
    with torch.no_grad():
        assert torch.equal(cross_entropy(hidden, weight, targets), loss)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 6), st.integers(0, 99))
def test_the_loss_is_that_of_the_reference_and_shifting_all_logits_leaves_it(n, V, D, seed):
    hidden, weight, targets = (x.detach() for x in draw((n, V, D), torch.float64, seed=seed))
    loss, near = cross_entropy(hidden, weight, targets), bounds(hidden, weight, targets)[1][0]
    assert (loss - cross_entropy_ref(hidden, weight, targets)).abs() <= 2 * near  # the bound of each
    parts = sum(cross_entropy(hidden[i : i + 1], weight, targets[i : i + 1]) for i in range(n))  # n roundings
    assert (loss - parts).abs() <= 2 * near + n * 2.0**-53 * parts
    other = weight + torch.randn(D, dtype=torch.float64)  # rounded, which moves z and lse of each row
    shifted, more = cross_entropy(hidden, other, targets), bounds(hidden, other, targets)[1][0]
    assert (loss - shifted).abs() <= near + more + 2.0**-52 * (hidden.abs() @ other.abs().t()).amax(1).sum()


ERRORS = [
    ("targets go from 0 to 9;", lambda h, W, t: (h, W, torch.tensor([0, 9, 1]))),
    ("targets go from -100 to 1", lambda h, W, t: (h, W, torch.tensor([0, -100, 1]))),
    ("one int64 target for each row", lambda h, W, t: (h, W, t.int())),
    (r"weight \(V, D\)", lambda h, W, t: (h, W[:, 1:].contiguous(), t)),
    (r"hidden is \(n, D\)", lambda h, W, t: (h[None], W, t)),
    ("weight torch.bfloat16; both", lambda h, W, t: (h, W.bfloat16(), t)),
    ("hidden is not contiguous", lambda h, W, t: (h.t().contiguous().t(), W, t)),
    ("weight is not contiguous", lambda h, W, t: (h, W[:1].expand(9, 4), t)),
    ("must be on one device", lambda h, W, t: (h, W.to("meta"), t)),
]


@pytest.mark.parametrize("match, broken", ERRORS)
def test_what_it_cannot_take_is_an_error(match, broken):
    with pytest.raises(ValueError, match=match):
        cross_entropy(*broken(*draw((3, 9, 4))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_may_start_anywhere(dtype):
    hidden, weight, targets = draw((5, 40, 6), dtype)
    for x in (hidden, weight):
        x.data = torch.cat((x.data.view(-1)[:1], x.data.view(-1)))[1:].view(x.shape)
    check_one(op, (hidden, weight, targets))


def check(module):
    module.ROWS, module.BLOCK_V, module.CACHED = 3, 32, 80
    check_one(module, draw((7, 37, 5), scale=3))


def check_triton(module):
    check(module)
    for trains in (True, False):
        kernel_on_rows(module, trains, 37, "cpu" if runtime.INTERPRETED else "cuda")


MUTANTS = [
    ("part = slice(start, start + ROWS)", "part = slice(start, start + ROWS - 1)"),
    ("torch.mm(h, weight.t(), out=logits)", "torch.mm(h, weight.roll(1, 0).t(), out=logits)"),
    ("out=dh[part]", "out=dh[:len(h)]"),
    ("dW += logits.t() @ h", "dW = logits.t() @ h"),
    ("d * dloss", "2 * d * dloss"),
    ("trains_hidden or trains_weight", "False"),
]
TORCH_MUTANTS = [
    ("largest + total.log()", "total.log()"),
    ("x.mul_(1 / total)", "x.mul_(1)"),
    ("torch.full_like(at_target, -1)", "torch.full_like(at_target, -1.001)"),
    ("x.sub_(largest).exp_()", "x.exp_()"),
    ("z.copy_(x)", "z[:, 1:].copy_(x[:, 1:])"),
    ("at_target = x.gather(1, target)", "at_target = x[:, :1].clone()"),
    ("part = slice(start, start + step)", "part = slice(start, start + 1)"),
]
TRITON_MUTANTS = [
    ("total * tl.exp(before - largest)", "total"),
    ("largest + tl.log(total)", "tl.log(total)"),
    ('mask=column < stride, other=float("-inf"))', "mask=column < stride, other=0.0)"),
    ("logits_ptr += row * stride", "logits_ptr += row * V"),
    ('whole[:, V:] = float("-inf")', "whole[:, V:] = 0"),
    ("(target < V)\n    target = tl", "(target <= V)\n    target = tl"),
    ("(target >= 0) & (target < V)\n    target = tl", "(target < V)\n    target = tl"),
    ("lse - tl.load(", "largest - tl.load("),
    ("tl.exp(z - lse)", "tl.exp(z - largest)"),
    ("TRAINS=trains", "TRAINS=True"),
    ("1.0, 0.0)", "1.001, 0.0)"),
]


@pytest.mark.parametrize("old, new", MUTANTS + TORCH_MUTANTS)
def test_mutants_are_noticed(old, new):
    with runtime.using("torch"):
        assert not survives(check, op, old, new)


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS + TRITON_MUTANTS)
def test_mutants_of_the_kernel_are_noticed(old, new):
    assert not survives(check_triton, op, old, new)


@pytest.mark.triton
def test_the_check_for_mutants_passes_on_a_copy():
    check_triton(mutate(op, "ROWS = 1024", "ROWS = 1024"))


def build(dtype, trains, *promises):
    signature = {"targets_ptr": "*i64", "losses_ptr": "*fp32", "V": "i32", "stride": "i32"}
    aligned = ("logits_ptr", "targets_ptr", "losses_ptr", "stride")
    return Build(
        f"{dtype}, {'trains' if trains else 'loss only'}",
        op.cross_entropy_kernel,
        {"logits_ptr": f"*{dtype}", **signature},
        {"TRAINS": trains, "BLOCK_V": 4096},
        **{"warps": 8, "aligned": aligned, "elements": 16, "budget": 16, "promises": promises},
    )


BUILDS = [build(dtype, True, "LDG.E.128", "STG.E.128") for dtype in ("bf16", "fp16", "fp32")]
BUILDS.append(build("bf16", False, "LDG.E.128"))
