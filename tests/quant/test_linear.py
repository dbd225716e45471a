"""QuantizedLinear is the dense layer with the dequantized weight: products, gradients, what it keeps."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn

from minift.quant import FORMATS, linear, quantize_weight
from minift.quant.linear import QuantizedLinear, QuantizedMatmul

# 2 gamma_K |x| |W|^T + u |y|: a product of length K summed in fp32 (in fp64 for fp64) in any order, and the
# rounding u of the result.
UNIT = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def bound(a, b, got, dtype):
    K = a.shape[-1]
    gamma = K * (2**-53 if dtype == torch.float64 else 2**-24)
    exact = a.double() @ b.double()
    return (
        2 * gamma / (1 - gamma) * (a.double().abs() @ b.double().abs()) + UNIT[dtype] * exact.abs() + 1e-300
    )


def check_products(module, dtype, shape, block_size, format="nf4", slab=2**9, M=5):
    """Forward and dx within the a-priori bound of fp64 products with the same dequantized matrix."""
    torch.manual_seed(0)
    N, K = shape
    weight = quantize_weight(torch.randn(N, K), format, block_size)
    W = weight.dequantize(dtype)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    before, module.SLAB = module.SLAB, slab
    try:
        y, dx = module.matmul(x, weight), module.matmul_backward(dy, weight)
    finally:
        module.SLAB = before
    assert y.shape == (M, N) and dx.shape == (M, K) and y.dtype == dx.dtype == dtype
    assert ((y.double() - x.double() @ W.double().t()).abs() <= bound(x, W.t(), y, dtype)).all()
    assert ((dx.double() - dy.double() @ W.double()).abs() <= bound(dy, W, dx, dtype)).all()


@given(
    N=st.integers(1, 70),
    K=st.sampled_from([1, 7, 32, 63, 64, 65, 96, 128, 192, 320]),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    format=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(list(UNIT)),
    M=st.sampled_from([0, 1, 2, 17]),
    slab=st.sampled_from([1, 2**9, 2**12, 2**22]),
)
def test_products_are_those_of_the_dequantized_matrix(N, K, block_size, format, dtype, M, slab):
    check_products(linear, dtype, (N, K), block_size, format, slab, M)


MUTANTS = [
    ("slab.view(-1, K).t(), out=y[:, start:stop]", "slab.view(-1, K).t(), out=y[:, :stop - start]"),
    ("unit = size // gcd(K, size)", "unit = 1"),
    ("packed = weight.packed[a * bits // 8 :", "packed = weight.packed[a * bits // 8 + 1 :"),
    ("scales[a // size : -(-b // size)], layout", "scales[: -(-b // size) - a // size], layout"),
    ("if K % size:", "if False:"),
    (
        "codes = packed[:, start * bits // 8 : stop * bits // 8]",
        "codes = packed[:, : (stop - start) * bits // 8]",
    ),
    ("scales[:, start // size : stop // size], lookup", "scales[:, : (stop - start) // size], lookup"),
    ("torch.mm(dy, slab, out=dx[:, start:stop])", "torch.mm(dy, slab, out=dx[:, : stop - start])"),
    ("step = min(K, max(size,", "step = min(K - size, max(size,"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_a_fault_in_the_products_is_noticed(old, new):
    def check(module):
        for shape, block in (((24, 192), 64), ((33, 96), 64), ((7, 65), 32), ((3, 64), 64)):
            check_products(module, torch.float32, shape, block)

    check(linear)
    assert not survives(check, linear, old, new)


@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 128), (1, 2, 3, 128), (128,)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_shape_and_a_bias(shape, bias):
    dense = nn.Linear(128, 40, bias=bias)
    layer = QuantizedLinear.from_weight(quantize_weight(dense.weight), bias=dense.bias)
    x = torch.randn(shape)
    expected = nn.functional.linear(x, layer.dequantize(), dense.bias)
    assert layer(x).shape == (*shape[:-1], 40)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2 * 128 * 2**-24 * 128)  # K u times |x| |W|


def test_the_compute_dtype_is_explicit_and_the_result_has_the_inputs():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(64, 64)), compute_dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    assert layer(x).dtype == torch.float32 and layer(x.double()).dtype == torch.float64
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    assert {p.dtype for p in layer.parameters()} == {torch.uint8}  # forward casts no parameter


def test_gradcheck_in_fp64_with_respect_to_the_input():
    weight = quantize_weight(torch.randn(12, 64))
    tensors = [weight.tensors[name] for name in weight.layout.sizes()]
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: QuantizedMatmul.apply(x, weight.layout, *tensors), (x,))


def test_autograd_keeps_the_packed_tensors_and_nothing_else():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(64, 128)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 128, requires_grad=True)).sum()
    own = {p.data_ptr() for p in layer.parameters()}
    assert len(kept) == 4 and {t.data_ptr() for t in kept} == own


def test_a_copy_does_not_share_its_weight():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(8, 64)))
    other = copy.deepcopy(layer)
    other.quantize_(torch.ones(8, 64))
    assert not torch.equal(layer.packed, other.packed)
    assert torch.equal(other.dequantize(), torch.ones(8, 64))


def test_a_weight_gradient_a_wrong_shape_and_a_vector_are_refused():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(8, 64)))
    with pytest.raises(ValueError, match="nf4 weight has no gradient"):
        layer.requires_grad_()
    with pytest.raises(ValueError, match=r"takes 64 features; x has shape \(2, 63\)"):
        layer(torch.randn(2, 63))
    with pytest.raises(ValueError, match=r"is \(8, 64\), not \(64, 8\)"):
        layer.quantize_(torch.ones(64, 8))
    with pytest.raises(ValueError, match="needs a matrix"):
        QuantizedLinear.from_weight(quantize_weight(torch.randn(64)))
