"""minift.kernels.matmul_int8: both ways within a-priori bounds of the product in fp64; gradients; mutants."""

from itertools import product

import products
import pytest
import torch
from mutants import survives
from products import BF16, CASES, FP16, FP32, assert_within, build, compare, compare_slabs, operand, rows
from quantized import as_packed, on_gpu, to

from minift.kernels import decode, runtime, slabs
from minift.kernels import matmul_int8 as op
from minift.kernels.matmul_int8 import matmul_int8
from minift.quant.weight import quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def draw(N, K, block_size, nested, table=False):
    return products.draw(N, K, block_size, nested, bits=8, table=table)


def rule(M, block_size, transposed):
    return "weights" if transposed else "sums"


def check(module, cases=products.FEW):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for (M, N, K, block_size, nested, dtype), transposed in product(cases, (False, True)):
        if dtype == FP32 and device == "cuda":
            dtype = FP16  # tensor cores do not multiply fp32
        weight, x = draw(N, K, block_size, nested), rows(M, N if transposed else K, dtype=dtype)
        compare(module.matmul_int8, x, weight, transposed, rule(M, block_size, transposed), device)


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
    compare(matmul_int8, x, weight, transposed, rule(config.BLOCK_M, 64, transposed), device)


@pytest.mark.triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_fused_product_differs_from_the_reference_by_its_rounding_of_the_weights(transposed, dtype, device):
    """The reference rounds W once, u = 2^-8 (bf16) or 2^-11 (fp16); scaled weights once more; codes never."""
    q = quantize_weight(0.02 * rows(130, 256), "int8", 64, True)
    x = rows(5, 130 if transposed else 256, dtype=dtype, seed=1)
    with runtime.using(path="fused"):
        got = matmul_int8(x.to(device), to(as_packed(q), device), transposed).cpu()
    W = operand(as_packed(q), dtype, "slabs")
    y, error = products.exact(x, W, transposed)
    u = torch.finfo(dtype).eps / 2
    size = x.double().abs() @ (W if transposed else W.t()).abs()
    subnormal = 2**-24 * x.double().abs().sum(1, keepdim=True)  # of weights in fp16
    assert_within(got, y, error + (2.01 if transposed else 1.01) * u * (1 + 3 * u) * size + subnormal)


@pytest.mark.triton
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_special_numbers(dtype, transposed, device):
    """Blocks of zeros, tiny and large scales, the code -128; rows as in test_matmul_4bit.py."""
    N, K = 64, 192
    weight = draw(N, K, 64, False)
    weight.absmax[:9] = torch.tensor([0.0, 2.0**-140, 200.0, 0.0, 0.0, 0.0, 1.0, 2.0**-126, 1e-7])
    weight.packed[3 * K : 4 * K] = 128
    x = rows(7, N if transposed else K, dtype=dtype)
    x[0], x[1] = 0.0, -0.0
    x[2] *= 2.0**-20 if dtype == FP16 else 2.0**-100
    x[3, 1] = 1e4 if dtype == FP16 else 1e30
    compare(matmul_int8, x, weight, transposed, rule(7, 64, transposed), device)
    x[4, 5], x[5, 6] = float("nan"), float("inf")
    with runtime.using(path="fused"):
        got = matmul_int8(x.to(device), to(weight, device), transposed).cpu()
    assert (got[:2] == 0).all() and got[[2, 3, 6]].isfinite().all()
    assert got[4].isnan().all() and not got[5].isfinite().any()


@pytest.mark.triton
def test_a_codebook_goes_through_slabs(device):
    weight = to(draw(33, 128, 64, True, table=True), device)
    assert slabs.path("matmul_int8", 1, weight, BF16) == "slabs"
    assert slabs.path("matmul_int8", 1, weight._replace(codebook=None), BF16) == "fused"
    with runtime.using(path="fused"), pytest.raises(RuntimeError, match="codebook"):
        matmul_int8(rows(1, 128).to(device), weight)


@pytest.mark.parametrize("slab", [slabs.SLAB["cpu"], 4096, 1])
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_slabs_multiply_by_the_dequantized_weight(slab, table, dtype, monkeypatch):
    monkeypatch.setitem(slabs.SLAB, "cpu", slab)
    for N, K, block_size in [(1, 1, 32), (33, 65, 64), (7, 192, 64), (300, 96, 32), (65, 127, 4096)]:
        weight = draw(N, K, block_size, True, table)
        for M, transposed in product((1, 17), (False, True)):
            compare_slabs(matmul_int8, rows(M, N if transposed else K, dtype=dtype), weight, transposed)


def test_nothing_in_nothing_out():
    for M, N, K in [(0, 4, 64), (3, 0, 64), (3, 4, 0)]:
        weight = draw(N, K, 64, False)
        assert torch.equal(matmul_int8(rows(M, K), weight), torch.zeros(M, N))
        assert torch.equal(matmul_int8(rows(M, N), weight, True), torch.zeros(M, K))


@pytest.mark.parametrize("table", [False, True])
def test_the_gradient_is_the_product_with_the_transpose(table):
    weight = draw(33, 70, 32, True, table)
    x, dy = rows(5, 70).requires_grad_(), rows(5, 33, seed=1)
    y = matmul_int8(x, weight)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert kept == {t.data_ptr() for t in weight if isinstance(t, torch.Tensor)}
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, matmul_int8(x.detach(), weight)) and torch.equal(dx, matmul_int8(dy, weight, True))
    back = matmul_int8(dy.requires_grad_(), weight, True)
    assert torch.equal(torch.autograd.grad(back, dy, x.detach())[0], y)


def test_what_a_product_does_not_take_is_an_error():
    weight = draw(8, 64, 32, True)
    with pytest.raises(ValueError, match="2-D and contiguous"):
        matmul_int8(rows(64, 3).t(), weight)
    with pytest.raises(ValueError, match=r"x W takes x \(M, N\)"):
        matmul_int8(rows(3, 64), weight, True)
    with pytest.raises(ValueError, match="packed"):
        matmul_int8(rows(3, 64), products.draw(8, 64, 32, True))
    with runtime.using("torch", path="fused"), pytest.raises(RuntimeError, match="plain torch has no fused"):
        matmul_int8(rows(3, 64), weight)


@on_gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_the_grid_on_the_gpu(dtype):
    products.compare_the_grid(matmul_int8, dtype, 8, rule)


MUTANTS = [
    ("m[:, None] < M, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_K]", "m[:, None] < M - 1, other=0.0).to(DOT)"),
    ("words + k // 4)", "words + k // 8)"),
    ("k // BLOCK_SIZE  # [BLOCK_N, 1]", "(k + BLOCK_K) // BLOCK_SIZE  # [BLOCK_N, 1]"),
    ('input_precision="ieee") * scale\n', 'input_precision="ieee")\n'),
    ("* scale\n", "* scale.to(tl.float16).to(tl.float32)\n"),
    ("tl.trans(total) * (1 / 127)", "tl.trans(total) * (1 / 128)"),
    ("M + m)[:, None] * N + n", "M + m)[:, None] * N + 1 + n"),
    ("min(K, first + steps * BLOCK_K)", "min(K, first + steps * BLOCK_K) - BLOCK_K"),
    ("(m[:, None] < M) & (n[None, :] < N))", "(m[:, None] < M) & (n[None, :] < N - 1))"),
    ("tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows after the last repeat it and", "n[:, None] // 2 #"),
    # the product with W itself
    ("(m[:, None] < M) & (n[None, :] < N)\n", "(m[:, None] < M) & (n[None, :] < N - 1)\n"),
    ("mask=inside", "mask=(m[:, None] < M) & (n[None, :] >= 0)"),
    ("words_ptr + k // 4 + ", "words_ptr + "),
    ("k // BLOCK_SIZE + tl.arange(0, SCALES)", "k // BLOCK_SIZE + 0 * tl.arange(0, SCALES)"),
    ("row * (K // BLOCK_SIZE) + blocks", "row * (K // BLOCK_SIZE + 1) + blocks"),
    ("(scale * (1 / 127))", "(scale * (1 / 128))"),
    ("rounded(w.reshape(BLOCK_N, BLOCK_K), X, DOT)", "rounded(w.reshape(BLOCK_N, BLOCK_K) + 0.001, X, DOT)"),
    ("min(N, first + steps * BLOCK_N)", "min(N - 1, first + steps * BLOCK_N)"),
    ("M + m)[:, None] * K + k + tl", "M + m)[:, None] * K + 1 + k + tl"),
]


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_are_noticed(old, new):
    assert not survives(check, op, old, new)


FORWARD, BACKWARD = op.matmul_int8_kernel, op.matmul_int8_transposed_kernel
BUILDS = [
    build("16 rows, double quantization", FORWARD, tile=(16, 128, 64), stages=4, budget=6),
    build("16 rows, fp32 scales", FORWARD, tile=(16, 128, 64), stages=4, nested=False, budget=6),
    build("16 rows, fp16", FORWARD, x="fp16", out="fp16", tile=(16, 128, 64), stages=4, budget=6),
    build("1 row", FORWARD, tile=(16, 128, 64), stages=4, M=1, budget=6),
    build("16 rows, blocks of 32", FORWARD, tile=(16, 128, 32), stages=4, block_size=32, budget=8),
    build("32 rows", FORWARD, tile=(32, 128, 64), stages=4, budget=6),
    build("64 rows", FORWARD, tile=(64, 128, 64), budget=6.5),
    build("16 rows, transposed", BACKWARD, tile=(16, 32, 256), stages=4, budget=7.5),
    build("16 rows, transposed, 128 columns", BACKWARD, tile=(16, 64, 128), stages=4, out="fp32", budget=7.5),
    build("64 rows, transposed", BACKWARD, tile=(64, 64, 128), budget=7.5),
]
