"""minift.kernels.lora_linear: results and gradients within a-priori bounds of fp64, fused and not; mutants."""

from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import products
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import Build, inspect_build
from mutants import survives
from products import BF16, FP16, FP32, assert_within, operand, rows
from quantized import on_gpu, to
from torch.autograd.graph import saved_tensors_hooks

from minift.kernels import lora_linear as op
from minift.kernels import runtime, slabs
from minift.kernels.lora_linear import lora_linear, lora_linear_ref
from minift.kernels.packed import Packed
from minift.kernels.runtime import tl
from minift.quant.weight import quantize_weight

# M, N, K, r, dtype of x, scaling, weight: None for a dense one, or (format, block size, double quantization)
CASES = [
    (1, 1, 1, 1, FP32, 2.0, None),
    (1, 64, 64, 16, BF16, 2.0, None),  # one whole tile
    (2, 65, 63, 3, FP16, -0.3, None),
    (3, 31, 129, 64, BF16, 0.7, None),
    (7, 130, 33, 1, FP32, 0.25, None),
    (64, 8, 192, 17, FP16, 1.5, None),
    (128, 70, 5, 3, BF16, 0.5, None),
    (129, 40, 30, 3, FP32, 0.5, None),  # too many rows for the kernel
    (2, 9, 20, 130, FP32, 0.1, None),  # and too large a rank
    (0, 7, 5, 3, BF16, 2.0, None),
    (3, 40, 64, 3, BF16, 2.0, ("nf4", 64, True)),
    (1, 33, 64, 16, FP16, 0.5, ("nf4", 32, False)),
    (66, 8, 70, 1, FP32, 0.7, ("nf4", 64, False)),  # K is no multiple of the block
    (3, 40, 64, 64, FP32, 2.0, ("int8", 64, False)),
    (2, 31, 128, 3, BF16, 0.3, ("int8", 32, True)),
    (0, 7, 64, 3, FP32, 2.0, ("int8", 64, True)),
]
# Enough to notice a mutant: several tiles of rows, columns and the sum, and one column of tiles
FEW = [(66, 70, 40, 3, FP32, 0.7, None), (2, 33, 70, 5, BF16, -2.0, None)]
WEIGHTS = [None, ("nf4", 64, True), ("int8", 32, False)]


@pytest.fixture(autouse=True)
def gpu_products_are_summed_in_fp32(monkeypatch):
    for dtype in ("bf16", "fp16"):
        name = f"allow_{dtype}_reduced_precision_reduction"
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)


class Near(NamedTuple):
    """An exact result in fp64, and how far a computed one may be from it, componentwise."""

    exact: torch.Tensor
    error: torch.Tensor

    def t(self):
        return Near(self.exact.t(), self.error.t())


def exactly(x):
    return Near(x.detach().double(), torch.zeros_like(x, dtype=torch.float64))


def dot(a, b):
    """n terms and the factors absmax and 1/127 pass n + 4 roundings of 2^-24; truncating tensor cores: twice.

    All on numbers that were off already. Each term may also lose the smallest fp32.
    """
    n, far = a.exact.shape[1] + 4, a.exact.abs() + a.error
    error = a.error @ b.exact.abs() + far @ b.error
    error += 2 * n * 2.0**-24 / (1 - n * 2.0**-24) * far @ (b.exact.abs() + b.error) + n * 2.0**-149
    return Near(a.exact @ b.exact, error)


def times(scaling, a):
    """In fp32: scaling is rounded, and the product."""
    roundings = 2.01 * 2.0**-24 * (a.exact.abs() + a.error)
    return Near(scaling * a.exact, abs(scaling) * (a.error + roundings) + 2.0**-149)


def plus(a, b):
    exact, error = a.exact + b.exact, a.error + b.error
    return Near(exact, error + 2.0**-24 * (exact.abs() + error))


def rounded(a, dtype):
    """u = 2^-8 (bf16), 2^-11 (fp16), 2^-24 (fp32), or half of the smallest number."""
    info = torch.finfo(dtype)
    error = a.error + info.eps / 2 * (a.exact.abs() + a.error) + info.smallest_normal * info.eps / 2
    return Near(a.exact, error)


def expected(x, W, A, B, scaling, dy, fuses):
    """y, dx, dA, dB, with the W that either product with it multiplies. A and B are rounded to x's dtype.

    h is rounded, and dh before and after scaling. y and dx are rounded once by the kernel (`fuses`), and side
    by side once more, the base product alone; dA is rounded once, dB before scaling too.
    """
    X = x.dtype
    x, dy, A, B = exactly(x), exactly(dy), exactly(A.to(X)), exactly(B.to(X))
    h, g = rounded(dot(x, A.t()), X), rounded(dot(dy, B), X)
    dh = rounded(times(scaling, g), X)
    y, dx = dot(x, exactly(W[0]).t()), dot(dy, exactly(W[1]))
    if not fuses:
        y, dx = rounded(y, X), rounded(dx, X)
    y = plus(y, times(scaling, dot(h, B.t())))
    dx = plus(dx, times(scaling, dot(g, A)) if fuses else dot(dh, A))
    dA, dB = dot(dh.t(), x), times(scaling, rounded(dot(dy.t(), h), X))
    return [rounded(result, X) for result in (y, dx, dA, dB)]


def draw(case):
    """x, W, A, B, scaling, dy"""
    M, N, K, r, dtype, scaling, weight = case
    W = rows(N, K, seed=1)
    with runtime.using("torch"):
        W = quantize_weight(W, *weight).as_packed() if weight else W.to(dtype)
    A, B, dy = rows(r, K, seed=2), rows(N, r, seed=3), rows(M, N, dtype=dtype, seed=4)
    return rows(M, K, dtype=dtype), W, A, B, scaling, dy


def multiplied(W, x, transposed):
    """W as the base product multiplies x by it, which depends on the way it goes."""
    if not isinstance(W, Packed):
        return W
    if slabs.path(f"matmul_{'4bit' if W.bits == 4 else 'int8'}", len(x), W, x.dtype, transposed) == "slabs":
        return operand(W, x.dtype, "slabs")
    scaled = transposed or (W.bits == 4 and W.block_size < 64)
    return operand(W, x.dtype, "weights" if scaled else "sums")


def run(module, x, W, A, B, scaling, dy):
    """y and the gradients of x, A and B."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, A, B)]
    y = module.lora_linear(leaves[0], W, *leaves[1:], scaling)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(module, cases=FEW, backend="triton", device="cpu", lay=lambda tensor: tensor):
    """Results and gradients within the bounds, nothing written beside them, no input changed."""
    for x, W, A, B, scaling, dy in map(draw, cases):
        x, A, B, dy = x.to(device), *(lay(tensor.to(device)) for tensor in (A, B, dy))
        W = to(W, device) if isinstance(W, Packed) else W.to(device)
        fields = [field for field in W if isinstance(field, torch.Tensor)]
        before = [tensor.clone() for tensor in (x, A, B, dy, *fields)]
        with runtime.using(backend):
            fuses = op._fuses(x, W, A)
            with products.guarded() if fuses else nullcontext([]) as buffers:
                results = run(module, x, W, A, B, scaling, dy)
            W = multiplied(W, x, False), multiplied(W, dy, True)
        assert len(buffers) == 4 * fuses  # two launches with two results
        near = expected(x, W, A, B, scaling, dy, fuses)
        for result, bound, like in zip(results, near, (x, x, A, B), strict=True):
            assert result.dtype == like.dtype
            assert_within(result, *bound)
        assert all(torch.equal(a, b) for a, b in zip((x, A, B, dy, *fields), before, strict=True))


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_and_its_gradients_stay_within_the_bounds(case, device):
    check(op, [case], "triton", device)


@pytest.mark.parametrize("case", CASES + FEW, ids=str)
def test_torch_stays_within_the_bounds_and_so_does_the_reference(case):
    """Of the reference base product, branch, scaled branch and sum are rounded, one after the other."""
    check(op, [case], "torch")
    x, W, A, B, scaling, _ = draw(case)
    X, dense = x.dtype, operand(W, x.dtype, "slabs") if case[6] else W
    h = rounded(dot(exactly(x), exactly(A.to(X)).t()), X)
    branch = rounded(times(scaling, rounded(dot(h, exactly(B.to(X)).t()), X)), X)
    y = rounded(plus(rounded(dot(exactly(x), exactly(dense).t()), X), branch), X)
    assert_within(lora_linear_ref(x, W, A, B, scaling), *y)


def check_integers(M, N, K, r, scaling, device="cpu"):
    """Small integers leave fp16, exact up to 2048, nothing to round: every result is exact."""
    g = torch.Generator().manual_seed(M + N + K + r)
    x, W, A, B, dy = (
        torch.randint(-2, 3, s, generator=g).double() for s in ((M, K), (N, K), (r, K), (N, r), (M, N))
    )
    h, dh = x @ A.t(), scaling * dy @ B
    want = x @ W.t() + scaling * h @ B.t(), dy @ W + dh @ A, dh.t() @ x, scaling * dy.t() @ h
    x, W, A, B, dy = (tensor.half().to(device) for tensor in (x, W, A, B, dy))
    results = run(op, x, W, A.float(), B.float(), scaling, dy)
    assert all(torch.equal(a.cpu().double(), b) for a, b in zip(results, want, strict=True))


@given(*[st.integers(0, 12)] * 3, st.integers(0, 4), st.sampled_from([0.0, -0.5, 2]))
def test_sums_of_integers_are_exact(M, N, K, r, scaling):
    with runtime.using("torch"):
        check_integers(M, N, K, r, scaling)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(0, 3, 5, 2), (2, 0, 5, 2), (2, 3, 0, 2), (2, 3, 5, 0), (12, 12, 12, 4)])
def test_sums_of_integers_are_exact_in_the_kernel_and_sides_may_be_empty(shape, device):
    for scaling in (0.0, -0.5, 2):
        check_integers(*shape, scaling, device)


@pytest.mark.parametrize("weight, dtype", product(WEIGHTS, (FP32, BF16, FP16)), ids=str)
def test_without_a_branch_the_result_is_bitwise_the_base_product(weight, dtype):
    x, W, A, B, _, dy = draw((5, 33, 64, 3, dtype, 0, weight))
    with runtime.using("torch"):
        base = op.base_product(x, W), op.base_product(dy, W, transposed=True)
        assert torch.equal(lora_linear(x, W, A, 0 * B, 2.0), base[0])
        y, dx, dA, dB = run(op, x, W, A, B, 0.0, dy)
    assert torch.equal(y, base[0]) and torch.equal(dx, base[1]) and not dA.any() and not dB.any()


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack((t, t + 1), dim=2).flatten(1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}


@pytest.mark.triton
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_the_kernel_gives_the_same_bits_however_tensors_lie_and_without_a_branch(lay, device):
    """Any A, B and dy; x and W may start anywhere, and what else they are not is an error."""
    x, W, A, B, _, dy = draw((5, 40, 70, 3, BF16, 0, None))
    x, W, A, B, dy = (tensor.to(device) for tensor in (x, W, A, B, dy))
    start = LAYOUTS["misaligned"] if lay is LAYOUTS["misaligned"] else torch.clone
    A, B, dy = lay(A), lay(B), lay(dy)
    results = run(op, start(x), start(W), A, B, 0.7, dy)
    want = run(op, x, W, A.contiguous(), B.contiguous(), 0.7, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))
    assert torch.equal(lora_linear(x, W, A, B, 0.0), lora_linear(x, W, A, 0 * B, 2.0))


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_torch_stays_within_the_bounds_however_tensors_lie(lay):
    check(op, [(5, 40, 64, 3, BF16, 0.7, weight) for weight in WEIGHTS], "torch", lay=lay)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_autograd_keeps_the_weight_as_it_is_stored_and_h(weight):
    x, W, A, B, scaling, _ = draw((5, 40, 64, 3, BF16, 0.7, weight))
    given = [tensor.requires_grad_() for tensor in (x, A, B)]
    given += [field for field in (W if weight else [W]) if isinstance(field, torch.Tensor)]
    kept = []
    with saved_tensors_hooks(kept.append, None):
        lora_linear(x, W, A, B, scaling)
    known = {tensor.data_ptr() for tensor in given}
    assert known <= {tensor.data_ptr() for tensor in kept}
    assert [(t.shape, t.dtype) for t in kept if t.data_ptr() not in known] == [((5, 3), BF16)]  # h


@pytest.mark.parametrize("M, N, K, r", [(1, 1, 1, 1), (3, 5, 4, 2), (2, 3, 7, 4)])
def test_gradcheck(M, N, K, r):
    x, W, A, B, scaling, _ = draw((M, N, K, r, torch.float64, 0.7, None))
    leaves = [tensor.double().requires_grad_() for tensor in (x, A, B)]
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, A, B, scaling), leaves)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_only_what_needs_a_gradient_gets_one_and_once(weight):
    x, W, A, B, scaling, dy = draw((5, 40, 64, 3, FP32, 0.7, weight))
    gradients = run(op, x, W, A, B, scaling, dy)[1:]
    for needed in product((False, True), repeat=3):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((x, A, B), needed, strict=True)]
        y = lora_linear(leaves[0], W, *leaves[1:], scaling)
        assert y.requires_grad == any(needed)
        if any(needed):
            y.backward(dy)
        for leaf, gradient, need in zip(leaves, gradients, needed, strict=True):
            assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None
    y = lora_linear(*leaves[:1], W, *leaves[1:], scaling)
    (dx,) = torch.autograd.grad(y, leaves[0], dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
