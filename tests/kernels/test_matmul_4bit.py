"""minift.kernels.matmul_4bit: both ways within a-priori bounds of the product in fp64; gradients; mutants."""

from itertools import product

import products
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from products import (
    BF16,
    CASES,
    FP16,
    FP32,
    assert_within,
    build,
    compare,
    compare_slabs,
    draw,
    operand,
    rows,
)
from quantized import as_packed, on_gpu, to

from minift.kernels import decode, runtime, slabs
from minift.kernels import matmul_4bit as op
from minift.kernels.matmul_4bit import matmul_4bit
from minift.quant.weight import quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def rule(M, block_size, transposed):
    return "sums" if M <= 64 and block_size >= 64 and not transposed else "weights"


def check(module, cases=products.FEW):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for (M, N, K, block_size, nested, dtype), transposed in product(cases, (False, True)):
        if dtype == FP32 and device == "cuda":
            dtype = FP16  # tensor cores do not multiply fp32
        weight, x = draw(N, K, block_size, nested), rows(M, N if transposed else K, dtype=dtype)
        compare(module.matmul_4bit, x, weight, transposed, rule(M, block_size, transposed), device)


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_products_stay_within_the_bound(case):
    check(op, [case])


@pytest.mark.triton
@pytest.mark.parametrize("config", op.CONFIGS + op.TRANSPOSED_CONFIGS, ids=lambda c: "x".join(map(str, c)))
def test_every_configuration_computes_the_same_product(config, monkeypatch, device):
    transposed = config in op.TRANSPOSED_CONFIGS
    monkeypatch.setattr(decode, "pick", lambda *args: config)
    weight, x = draw(70, 192, 64, True), rows(config.BLOCK_M - 3, 70 if transposed else 192, dtype=BF16)
    compare(matmul_4bit, x, weight, transposed, rule(config.BLOCK_M, 64, transposed), device)


@pytest.mark.triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_fused_product_differs_from_the_reference_by_its_rounding_of_the_weights(transposed, dtype, device):
    """u = 2^-8 (bf16), 2^-11 (fp16). Of the codebook: u. Of codebook, absmax, product: 3 u. The reference: u.

    (1 + u)^3 - 1 < 3.02 u; absmax of a fused multiply-add may round to the neighbour, 2 u more.
    """
    q = quantize_weight(0.02 * rows(130, 256), "nf4", 64, True)
    x = rows(5, 130 if transposed else 256, dtype=dtype, seed=1)
    with runtime.using(path="fused"):
        got = matmul_4bit(x.to(device), to(as_packed(q), device), transposed).cpu()
    W = operand(as_packed(q), dtype, "slabs")
    y, error = products.exact(x, W, transposed)
    u = torch.finfo(dtype).eps / 2
    size = x.double().abs() @ (W if transposed else W.t()).abs()
    subnormal = 2**-24 * x.double().abs().sum(1, keepdim=True)  # of absmax and weights in fp16
    assert_within(got, y, error + (6.03 if transposed else 2.01) * u * (1 + 3 * u) * size + subnormal)


@pytest.mark.triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_special_numbers(dtype, transposed, device):
    """Blocks of zeros, tiny and large scales; zeros, tiny, large and non-finite numbers in rows of their own.

    The interpreter reads subnormal bf16 as other numbers, so those of fp16 stand for them.
    """
    N, K = 64, 192
    weight = draw(N, K, 64, False)
    weight.absmax[:9] = torch.tensor([0.0, 2.0**-140, 200.0, 0.0, 0.0, 0.0, 1.0, 2.0**-126, 1e-7])
    x = rows(7, N if transposed else K, dtype=dtype)
    x[0], x[1] = 0.0, -0.0
    x[2] *= 2.0**-20 if dtype == FP16 else 2.0**-100
    x[3, 1] = 1e4 if dtype == FP16 else 1e30
    compare(matmul_4bit, x, weight, transposed, rule(7, 64, transposed), device)
    x[4, 5], x[5, 6] = float("nan"), float("inf")
    with runtime.using(path="fused"):
        got = matmul_4bit(x.to(device), to(weight, device), transposed).cpu()
    assert (got[:2] == 0).all() and got[[2, 3, 6]].isfinite().all()
    assert got[4].isnan().all() and not got[5].isfinite().any()


@pytest.mark.triton
def test_codes_and_rows_may_start_anywhere(device):
    """x at an odd element: fused as well. Codes off a multiple of 16 bytes: through slabs, not wrong."""
    weight, x = to(draw(33, 128, 64, True), device), rows(4, 128, dtype=BF16).to(device)
    moved = torch.cat((x.new_zeros(1), x.view(-1)))[1:].view(4, 128)
    with runtime.using(path="fused"):
        assert torch.equal(matmul_4bit(moved, weight), matmul_4bit(x, weight))
    shifted = weight._replace(packed=torch.cat((weight.packed[:1], weight.packed))[1:])
    assert slabs.path("matmul_4bit", 4, shifted, BF16) == "slabs"
    with runtime.using(path="slabs"):
        assert torch.equal(matmul_4bit(x, shifted), matmul_4bit(x, weight))
    with runtime.using(path="fused"), pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        matmul_4bit(x, shifted)


@pytest.mark.triton
def test_which_way_runs(monkeypatch, device):
    weight = to(draw(48, 128, 64, True), device)
    assert slabs.path("matmul_4bit", 64, weight, BF16) == "fused"
    assert slabs.path("matmul_4bit", 65, weight, BF16) == "slabs"
    monkeypatch.setitem(slabs.PATHS, ("matmul_4bit", False, 128, 48, 128), "fused")
    assert slabs.path("matmul_4bit", 65, weight, BF16) == "fused"
    assert slabs.path("matmul_4bit", 65, weight, BF16, transposed=True) == "slabs"
    assert slabs.path("matmul_4bit", 129, weight, BF16) == "slabs"
    with runtime.using("torch"):
        assert slabs.path("matmul_4bit", 1, weight, BF16) == "slabs"
    assert slabs.path("matmul_4bit", 1, weight._replace(shape=(64, 96)), BF16) == "slabs"
    with runtime.using(path="slabs"):
        assert slabs.path("matmul_4bit", 1, weight, BF16) == "slabs"


@pytest.mark.parametrize("slab", [slabs.SLAB["cpu"], 4096, 1])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_slabs_multiply_by_the_dequantized_weight(slab, dtype, monkeypatch):
    monkeypatch.setitem(slabs.SLAB, "cpu", slab)
    for N, K, block_size in [(1, 1, 32), (33, 65, 64), (7, 192, 64), (300, 96, 32), (65, 127, 4096)]:
        weight = draw(N, K, block_size, True)
        for M, transposed in product((1, 17), (False, True)):
            compare_slabs(matmul_4bit, rows(M, N if transposed else K, dtype=dtype), weight, transposed)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 64, 512]), st.integers(1, 2**17))
def test_a_slab_is_whole_units_and_fits_where_one_unit_fits(outputs, length, unit, elements):
    width = slabs.slab_width(outputs, length, unit, elements)
    assert width == outputs or width % unit == 0
    assert width <= max(unit, elements // length) and 1 <= width <= outputs


def test_nothing_in_nothing_out():
    for M, N, K in [(0, 4, 64), (3, 0, 64), (3, 4, 0)]:
        weight = draw(N, K, 64, False)
        assert torch.equal(matmul_4bit(rows(M, K), weight), torch.zeros(M, N))
        assert torch.equal(matmul_4bit(rows(M, N), weight, True), torch.zeros(M, K))


@pytest.mark.parametrize("K", [96, 70])
def test_the_gradient_is_the_product_with_the_transpose(K):
    weight, x, dy = draw(33, K, 32, True), rows(5, K).requires_grad_(), rows(5, 33, seed=1)
    y = matmul_4bit(x, weight)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert kept == {t.data_ptr() for t in weight if isinstance(t, torch.Tensor)}
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert torch.equal(y, matmul_4bit(x.detach(), weight)) and torch.equal(dx, matmul_4bit(dy, weight, True))
    back = matmul_4bit(dy.requires_grad_(), weight, True)
    assert torch.equal(torch.autograd.grad(back, dy, x.detach())[0], y)
    y.sum().backward()  # the gradient of a sum is expanded
    assert torch.equal(x.grad, matmul_4bit(torch.ones(5, 33), weight, True))
    (dx,) = torch.autograd.grad(matmul_4bit(x, weight), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


WEIGHT = draw(8, 64, 32, True)


@pytest.mark.parametrize(
    "x, weight, message",
    [
        (rows(64), WEIGHT, "2-D and contiguous"),
        (rows(64, 3).t(), WEIGHT, "contiguous"),
        (rows(3, 128)[:, ::2], WEIGHT, "contiguous"),
        (rows(1, 64).expand(3, 64), WEIGHT, "contiguous"),
        (rows(3, 64).int(), WEIGHT, "fp32, bf16, fp16 or fp64"),
        (rows(3, 8), WEIGHT, r"x is \(3, 8\) and W \(N, K\) is \(8, 64\); x W\^T takes x \(M, K\)"),
        (rows(3, 64), draw(8, 64, 32, True, bits=8), "4 bits"),
        (rows(3, 64), WEIGHT._replace(shape=(9, 64)), "packed"),
        (rows(3, 64), WEIGHT._replace(shape=(512,)), "needs a matrix"),
        (rows(3, 64), WEIGHT._replace(absmax=WEIGHT.absmax.float()), "absmax"),
        (rows(3, 64), to(WEIGHT, "meta"), "packed"),
    ],
)
def test_what_a_product_does_not_take_is_an_error(x, weight, message):
    with pytest.raises(ValueError, match=message):
        matmul_4bit(x, weight)


def test_a_way_that_cannot_run_is_an_error():
    with runtime.using("torch", path="fused"), pytest.raises(RuntimeError, match="plain torch has no fused"):
        matmul_4bit(rows(3, 64), WEIGHT)
    with pytest.raises(ValueError, match="known paths: fused, slabs"), runtime.using(path="sideways"):
        pass


@on_gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_grid_on_the_gpu(dtype):
    products.compare_the_grid(matmul_4bit, dtype, 4, rule)


MUTANTS = [
    ("m[:, None] < M, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_K]", "m[:, None] < M - 1, other=0.0).to(DOT)"),
    ("words + k // 8)", "words + k // 16)"),
    ("k // BLOCK_SIZE  # [BLOCK_N, 1]", "(k + BLOCK_K) // BLOCK_SIZE  # [BLOCK_N, 1]"),
    ('tl.trans(x), input_precision="ieee") * scale', 'tl.trans(x), input_precision="ieee")'),
    ("* scale\n", "* scale.to(tl.float16).to(tl.float32)\n"),
    ("tl.trans(scaled(w, scale, X, DOT))", "tl.trans(w)"),
    ("        total = tl.trans(total)\n", "        total = tl.trans(total) + 0.01\n"),
    ("M + m)[:, None] * N + n", "M + m)[:, None] * N + 1 + n"),
    ("min(K, first + steps * BLOCK_K)", "min(K, first + steps * BLOCK_K) - BLOCK_K"),
    ("(m[:, None] < M) & (n[None, :] < N))", "(m[:, None] < M) & (n[None, :] < N - 1))"),
    ("tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows after the last repeat it and", "n[:, None] // 2 #"),
    # the product with W itself
    ("(m[:, None] < M) & (n[None, :] < N)\n        x", "(m[:, None] < M) & (n[None, :] < N - 1)\n        x"),
    (
        "(n[None, :] < N)\n        x = tl.load(x_rows + n[None, :], mask=inside",
        "(n[None, :] >= 0)\n        x = tl.load(x_rows + n[None, :], mask=m[:, None] < M",
    ),
    ("words_ptr + k // 8 + ", "words_ptr + "),
    ("k // BLOCK_SIZE + tl.arange(0, SCALES)", "k // BLOCK_SIZE + 0 * tl.arange(0, SCALES)"),
    ("row * (K // BLOCK_SIZE) + blocks", "row * (K // BLOCK_SIZE + 1) + blocks"),
    ("tl.dot(x, scaled(w, scale, X, DOT), total", "tl.dot(x, scaled(w, scale + 0.001, X, DOT), total"),
    ("min(N, first + steps * BLOCK_N)", "min(N - 1, first + steps * BLOCK_N)"),
    ("M + m)[:, None] * K + k + tl", "M + m)[:, None] * K + 1 + k + tl"),
    ("max(1, BLOCK_K // BLOCK_SIZE)", "1"),
]


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_are_noticed(old, new):
    assert not survives(check, op, old, new)


FORWARD, BACKWARD = op.matmul_4bit_kernel, op.matmul_4bit_transposed_kernel
BUILDS = [
    build("16 rows, double quantization", FORWARD, tile=(16, 128, 64), stages=4, budget=6.5),
    build("16 rows, fp32 scales", FORWARD, tile=(16, 128, 64), stages=4, nested=False, budget=6.5),
    build("16 rows, fp16", FORWARD, x="fp16", out="fp16", tile=(16, 128, 64), stages=4, budget=6.5),
    build("16 rows, splits", FORWARD, out="fp32", tile=(16, 128, 64), stages=4, budget=6.5),
    build("1 row", FORWARD, tile=(16, 128, 64), stages=4, M=1, budget=6.5),
    build("16 rows, blocks of 32", FORWARD, tile=(16, 128, 32), stages=4, block_size=32, budget=8),
    build("16 rows, blocks of 128", FORWARD, tile=(16, 128, 128), stages=4, block_size=128, budget=5),
    build("32 rows", FORWARD, tile=(32, 128, 64), stages=4, budget=6),
    build("64 rows", FORWARD, tile=(64, 128, 64), budget=6.5),
    build("128 rows", FORWARD, tile=(128, 128, 64), warps=8, budget=7),
    build("16 rows, transposed", BACKWARD, tile=(16, 32, 256), stages=4, budget=6.5),
    build(
        "16 rows, transposed, fp32 scales", BACKWARD, tile=(16, 32, 256), stages=4, nested=False, budget=6.5
    ),
    build("16 rows, transposed, 128 columns", BACKWARD, tile=(16, 64, 128), stages=4, out="fp32", budget=7),
    build("64 rows, transposed", BACKWARD, tile=(64, 64, 128), budget=6.5),
]
