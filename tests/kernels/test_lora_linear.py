"""minift.kernels.lora_linear, fused and side by side, within a-priori bounds of fp64; gradients; mutants."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import Build, inspect_build
from mutants import survives
from products import BF16, FP16, FP32, assert_within, guarded, operand, rows
from quantized import on_gpu, to

from minift.kernels import lora_linear as op
from minift.kernels import runtime, slabs
from minift.kernels.packed import Packed
from minift.quant.weight import quantize_weight

# M, N, K, r, dtype of x, scaling, weight: None for a dense one, or (format, block size, double quantization)
CASES = [
    (1, 64, 64, 16, BF16, 2.0, None),  # one whole tile
    (2, 65, 63, 3, FP16, -0.3, None),
    (3, 31, 129, 64, BF16, 0.7, None),
    (7, 130, 33, 1, FP32, 0.25, None),
    (64, 8, 192, 17, FP16, 1.5, None),
    (128, 70, 5, 3, BF16, 0.0, None),
    (129, 40, 30, 3, FP32, 0.5, None),  # several tiles of rows
    *((*shape, BF16, 2.0, None) for shape in [(0, 7, 5, 3), (2, 0, 5, 3), (2, 7, 0, 3), (2, 7, 5, 0)]),
    (3, 40, 64, 3, BF16, 2.0, ("nf4", 64, True)),
    (1, 33, 64, 16, FP16, 0.5, ("nf4", 32, False)),
    (66, 8, 70, 1, FP32, 0.7, ("nf4", 64, False)),  # K is no multiple of the block
    (3, 40, 64, 64, FP32, 2.0, ("int8", 64, False)),
    (2, 31, 128, 3, BF16, 0.3, ("int8", 32, True)),
]
FEW = [(66, 70, 40, 3, FP16, 0.7, None), (2, 33, 70, 5, BF16, -2.0, None)]  # enough for mutants
WEIGHTS = [None, ("nf4", 64, True), ("int8", 32, False)]


def exactly(x):
    """A result in fp64 and, componentwise, how far a computed one may be from it; here it is not."""
    return torch.stack((x.detach().double(), torch.zeros_like(x, dtype=torch.float64)))


def dot(a, b):
    """n terms, absmax and 1/127 pass n + 4 roundings of 2^-24, twice that where tensor cores truncate."""
    n, far = a.shape[2] + 4, b[0].abs() + b[1]
    error = 2 * n * 2.0**-24 / (1 - n * 2.0**-24) * (a[0].abs() + a[1]) @ far + n * 2.0**-149
    return torch.stack((a[0] @ b[0], error + a[1] @ far + a[0].abs() @ b[1]))


def plus(a, scaling, b):
    """a + scaling b in fp32: scaling, product and sum are rounded."""
    size = a[0].abs() + a[1] + abs(scaling) * (b[0].abs() + b[1])
    error = a[1] + abs(scaling) * b[1] + 3.01 * 2.0**-24 * size + 2.0**-149
    return torch.stack((a[0] + scaling * b[0], error))


def rounded(a, dtype):
    """By u = 2^-8 (bf16), 2^-11 (fp16), 2^-24 (fp32), or half of the smallest number."""
    info = torch.finfo(dtype)
    error = a[1] + info.eps / 2 * (a[0].abs() + a[1]) + info.smallest_normal * info.eps / 2
    return torch.stack((a[0], error))


def expected(x, W, A, B, scaling, dy, fuses):
    """y, dx, dA, dB, with the W that either product with it multiplies. A and B are rounded to x's dtype.

    h is rounded, and dh before and after scaling. y and dx are rounded once by the kernel (`fuses`), and side
    by side once more, the base product alone; dA is rounded once, and dB before scaling too.
    """
    X = x.dtype
    x, dy, A, B, W, W_back = (exactly(tensor) for tensor in (x, dy, A.to(X), B.to(X), *W))
    h, g, y, dx = rounded(dot(x, A.mT), X), rounded(dot(dy, B), X), dot(x, W.mT), dot(dy, W_back)
    dh = rounded(plus(0 * g, scaling, g), X)
    y, dx = (y, dx) if fuses else (rounded(y, X), rounded(dx, X))
    y = plus(y, scaling, dot(h, B.mT))
    dx = plus(dx, scaling, dot(g, A)) if fuses else plus(dx, 1, dot(dh, A))
    dA, dB = dot(dh.mT, x), rounded(dot(dy.mT, h), X)
    return [rounded(result, X) for result in (y, dx, dA, plus(0 * dB, scaling, dB))]


def draw(case):
    """x, W, A, B, scaling, dy"""
    M, N, K, r, dtype, scaling, weight = case
    W = rows(N, K, seed=1)
    with runtime.using("torch"):
        W = quantize_weight(W, *weight).as_packed() if weight else W.to(dtype)
    x, dy = rows(M, K, dtype=dtype), rows(M, N, dtype=dtype, seed=4)
    return x, W, rows(r, K, seed=2), rows(N, r, seed=3), scaling, dy


def multiplied(W, x, transposed):
    """W as the base product multiplies x by it, which depends on the way it goes."""
    if not isinstance(W, Packed):
        return W
    scaled = transposed or (W.bits == 4 and W.block_size < 64)
    way = slabs.path(f"matmul_{'4bit' if W.bits == 4 else 'int8'}", len(x), W, x.dtype, transposed)
    return operand(W, x.dtype, "slabs" if way == "slabs" else "weights" if scaled else "sums")


def run(module, x, W, A, B, scaling, dy):
    """y and the gradients of x, A and B."""
    x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
    y = module.lora_linear(x, W, A, B, scaling)
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def check(module, cases=FEW, backend="triton", device="cpu", lay=torch.clone):
    """Results and gradients within the bounds, nothing written beside them, no input changed."""
    for x, W, A, B, scaling, dy in map(draw, cases):
        x, A, B, dy = x.to(device), *(lay(tensor.to(device)) for tensor in (A, B, dy))
        W = to(W, device) if isinstance(W, Packed) else W.to(device)
        inputs = [x, A, B, dy, *(field for field in W if isinstance(field, torch.Tensor))]
        before = [tensor.clone() for tensor in inputs]
        path = "fused" if backend == "triton" and not isinstance(W, Packed) else None
        with runtime.using(backend, path=path):
            fuses = op._fuses(x, W, A)
            with guarded() if fuses else nullcontext([]) as buffers:
                results = run(module, x, W, A, B, scaling, dy)
            ways = multiplied(W, x, False), multiplied(W, dy, True)
        assert len(buffers) == 4 * fuses  # two launches with two results
        for result, near in zip(results, expected(x, ways, A, B, scaling, dy, fuses), strict=True):
            assert_within(result, *near)
        assert [result.dtype for result in results] == [x.dtype, x.dtype, A.dtype, B.dtype]
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_and_its_gradients_stay_within_the_bounds(case, device):
    check(op, [case], device=device)


@pytest.mark.parametrize("case", CASES + FEW, ids=str)
def test_torch_stays_within_the_bounds_and_so_does_the_reference(case):
    """Of the reference base product, branch, scaled branch and sum are rounded, one after the other."""
    check(op, [case], "torch")
    x, W, A, B, scaling, _ = draw(case)
    got, X = op.lora_linear_ref(x, W, A, B, scaling), x.dtype
    W = exactly(operand(W, X, "slabs") if isinstance(W, Packed) else W)
    x, A, B = exactly(x), exactly(A.to(X)), exactly(B.to(X))
    y, branch = rounded(dot(x, W.mT), X), rounded(dot(rounded(dot(x, A.mT), X), B.mT), X)
    branch = rounded(plus(0 * branch, scaling, branch), X)
    assert_within(got, *rounded(plus(y, 1, branch), X))


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack((t, t + 1), dim=2).flatten(1)[:, ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
}
ANY = st.integers(0, 12)


@given(*[ANY] * 4, *map(st.sampled_from, ([FP32, BF16], WEIGHTS, [*LAYOUTS.values()])), st.floats(-2, 2))
def test_torch_stays_within_the_bounds_of_any_shape_and_layout(M, N, K, r, dtype, weight, lay, scaling):
    check(op, [(M, N, K, r, dtype, scaling, weight if N * K else None)], "torch", lay=lay)


@pytest.mark.parametrize("weight, dtype", [*product(WEIGHTS, (FP32, BF16, FP16))], ids=str)
def test_without_a_branch_the_result_is_bitwise_the_base_product(weight, dtype):
    x, W, A, B, _, dy = draw((5, 33, 64, 3, dtype, 0, weight))
    with runtime.using("torch"):
        base = [op.base_product(x, W), op.base_product(dy, W, transposed=True), 0 * A, 0 * B]
        assert all(torch.equal(a, b) for a, b in zip(run(op, x, W, A, B, 0.0, dy), base, strict=True))
        assert torch.equal(op.lora_linear(x, W, A, 0 * B, 2.0), base[0])


@pytest.mark.triton
@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
def test_the_kernel_gives_the_same_bits_however_tensors_lie_and_without_a_branch(lay, device):
    x, W, A, B, dy = (draw((5, 40, 70, 3, BF16, 0.7, None))[i].to(device) for i in (0, 1, 2, 3, 5))
    start = lay if lay is LAYOUTS["misaligned"] else torch.clone
    with runtime.using(path="fused"):
        assert op._fuses(x, W, A)
        results = run(op, start(x), start(W), lay(A), lay(B), 0.7, lay(dy))
        A, B, dy = (lay(tensor).contiguous() for tensor in (A, B, dy))
        assert all(torch.equal(a, b) for a, b in zip(results, run(op, x, W, A, B, 0.7, dy), strict=True))
        assert torch.equal(op.lora_linear(x, W, A, B, 0.0), op.lora_linear(x, W, A, 0 * B, 2.0))


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_autograd_keeps_the_weight_as_it_is_stored_and_h(weight):
    x, W, A, B, scaling, _ = draw((5, 40, 64, 3, BF16, 0.7, weight))
    node = op.lora_linear(x.requires_grad_(), W, A, B, scaling).grad_fn
    kept = [tensor for tensor in node.saved_tensors if tensor is not None]
    known = {t.data_ptr() for t in (x, A, B, *(W if weight else [W])) if isinstance(t, torch.Tensor)}
    assert known <= {tensor.data_ptr() for tensor in kept} and vars(node).keys() == {"layout", "scaling"}
    assert [(t.shape, t.dtype) for t in kept if t.data_ptr() not in known] == [((5, 3), BF16)]  # h


def test_gradcheck():
    x, W, A, B, scaling, _ = draw((2, 3, 7, 4, torch.float64, 0.7, None))
    leaves = [tensor.double().requires_grad_() for tensor in (x, A, B)]
    assert torch.autograd.gradcheck(lambda x, A, B: op.lora_linear(x, W, A, B, scaling), leaves)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_only_what_needs_a_gradient_gets_one(weight):
    x, W, A, B, scaling, dy = draw((5, 40, 64, 3, FP32, 0.7, weight))
    gradients = run(op, x, W, A, B, scaling, dy)[1:]
    for needed in list(product((False, True), repeat=3))[1:]:
        x, A, B = (tensor.detach().requires_grad_(needed[i]) for i, tensor in enumerate((x, A, B)))
        op.lora_linear(x, W, A, B, scaling).backward(dy)
        for leaf, gradient, need in zip((x, A, B), gradients, needed, strict=True):
            assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None


x, W, A, B, *_ = draw((5, 40, 64, 3, FP32, 0.7, None))
PACKED = draw((5, 40, 64, 3, FP32, 0.7, ("nf4", 64, True)))[1]
WRONG = [
    ((x[0], W, A, B), r"x \(64,\), weight \(40, 64\).* they are \(M, K\)"),
    ((x, PACKED._replace(shape=(64, 40)), A, B), r"weight \(64, 40\)"),
    ((x, W, A.t(), B), r"lora_A \(64, 3\)"),
    ((x, W, A, B[:, :2]), r"lora_B \(40, 2\)"),
    ((x, W, A, B[:9]), r"lora_B \(9, 3\)"),
    ((x[:1].expand(5, 64), PACKED, A, B), "x is not contiguous"),
    ((x, W.repeat(1, 2)[:, ::2], A, B), "weight is not contiguous"),
    ((x.bfloat16(), W, A, B), "x is torch.bfloat16 and weight torch.float32"),
    ((x.int(), W.int(), A, B), "x is torch.int32; it must be of a floating-point dtype"),
    ((x, W.clone().requires_grad_(), A, B), "weight requires a gradient"),
    ((x, W, A.to("meta"), B), "on different devices"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_what_it_does_not_take_is_an_error(arguments, message):
    with pytest.raises(ValueError, match="lora_linear: .*" + message):
        op.lora_linear(*arguments, 0.7)
    with runtime.using("torch", path="fused"), pytest.raises(RuntimeError, match="only Triton has a fused"):
        op.lora_linear(*draw(FEW[0])[:4], 0.7)


MUTANTS = [
    ("(m < M) & (column < K)", "(m < M) & (column < K - 1)"),
    ("A_ptr + row * A_k + rank * A_r", "A_ptr + row + rank * K"),  # as if never transposed
    ("rounded(a.to(tl.float32), X, DOT), h, ", "rounded(a.to(tl.float32), X, DOT), "),
    ("(row < r) & (n < N)", "(row < r - 1) & (n < N)"),
    ("total += scaling * branch", "total += branch"),
    ("mask=(m < M) & (n < N))", "mask=(m < M) & (n <= N))"),
    ("tl.program_id(1) == 0", "tl.program_id(1) == 1"),
    ("* BLOCK_M + tl.arange", "* (BLOCK_M + 1) + tl.arange"),
    ("dh = dh * ctx.scaling", "dh = dh"),
]
AUTOGRAD_MUTANTS = [
    (", alpha=scaling)", ")"),
    ("y, h = product(x, weight), x", "y, h = product(x, weight), 0.99 * x"),
    ("(dy @ lora_B.to(dy.dtype)) * ctx.scaling", "(dy @ lora_B.to(dy.dtype))"),
    ("dx.addmm_(dh, ", "dx.addmm_(dh, ctx.scaling * "),
    ("dy.t() @ h * ctx.scaling", "dy.t() @ h"),
    ("lora_A, lora_B, h, *kept)", "lora_A, lora_B, h.bfloat16().to(h.dtype), *kept)"),
    ("(matmul_4bit if weight.bits == 4", "(matmul_4bit if weight.bits == 8"),
    ("y.addmm_(h, lora_B", "x.add_(1); y.addmm_(h, lora_B"),
]


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_of_the_kernel_are_noticed(old, new, device):
    assert not survives(lambda module: check(module, device=device), op, old, new)


@pytest.mark.parametrize("old, new", AUTOGRAD_MUTANTS)
def test_mutants_of_the_products_side_by_side_are_noticed(old, new):
    cases = FEW + [case for case in CASES if case[6]]
    assert not survives(lambda module: check(module, cases, "torch"), op, old, new)


def build(x, transposed, r):
    """A and B in fp32; strides of 1 are constants to Triton."""
    constants = dict.fromkeys(("W_n", "A_r", "B_n") if transposed else ("W_k", "A_k", "B_r"), 1)
    constants |= {"DOT": {"bf16": op.tl.bfloat16, "fp16": op.tl.float16}[x], "RANK": r, **op.CONFIG}
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    types = {"A_ptr": "*fp32", "B_ptr": "*fp32", "scaling": "fp32"}
    types = {name: "*" + x if "ptr" in name else "i32" for name in op.lora_linear_kernel.arg_names} | types
    signature = {name: type for name, type in types.items() if name not in constants}
    aligned = tuple(name for name in signature if name not in ("M", "scaling"))
    elements, budget = constants["BLOCK_N"] * constants["BLOCK_K"] / (32 * warps), 6 if r == 16 else 10
    launch = signature, constants, warps, stages, aligned, elements, budget + transposed
    name, promises = f"{x}, rank {r}" + ", transposed" * transposed, ("tensor", "LDGSTS.E.128", "STG.E.128")
    return Build(name, op.lora_linear_kernel, *launch, promises)


BUILDS = [build(*row) for row in product(("bf16", "fp16"), (False, True), (16, 128))]


@pytest.mark.skipif(runtime.INTERPRETED, reason="kernels are interpreted in this process, not compiled")
@pytest.mark.parametrize("row", BUILDS, ids=lambda row: row.name)
def test_every_load_and_store_moves_16_bytes(row):
    moves = [name for name in inspect_build(row, 90)["opcodes"] if name.startswith(("LDG.", "LDGSTS", "STG"))]
    assert moves and all(name.endswith(".128") for name in moves)


@on_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_grid_on_the_gpu(dtype):
    for M, N, K, r in product((1, 17, 64, 65, 128), (1, 33, 192, 4096), (8, 65, 1000), (1, 16, 127)):
        check(op, [(M, N, K, r, dtype, 0.7, None)], device="cuda")
