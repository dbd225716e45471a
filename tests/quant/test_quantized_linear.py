"""QuantizedLinear is the dense layer with the dequantized weight: products, gradients, what it keeps."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import mutate, survives
from quant_reference import new_memory_filled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minift.kernels import library, runtime, slabs
from minift.kernels.dequantize_4bit import dequantize_4bit
from minift.kernels.dequantize_int8 import dequantize_int8
from minift.quant import FORMATS, quantize_weight
from minift.quant.linear import QuantizedLinear

# A product of length K summed in fp32 (in fp64 for fp64) in any order, 2 gamma_K |x| |W|^T, and the rounding
# of the result, u of it or half of the smallest number of its dtype.
UNIT = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
shapes = {
    "N": st.integers(1, 70),
    "K": st.sampled_from([1, 7, 32, 63, 64, 65, 96, 128, 192, 320]),
    "block_size": st.sampled_from([32, 64, 128, 4096]),
    "format": st.sampled_from(list(FORMATS)),
    "M": st.sampled_from([0, 1, 2, 17]),
}
every_dtype = pytest.mark.parametrize("dtype", UNIT, ids=str)


def bound(a, b, dtype, more=0):
    """|product - a b| at most; each of the K products has `more` roundings beside those of the sum."""
    K = a.shape[-1] + more
    gamma = K * (2**-53 if dtype == torch.float64 else 2**-24)
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    return 2 * gamma / (1 - gamma) * size + UNIT[dtype] * exact.abs() + smallest(dtype) / 2 + 1e-300


def smallest(dtype):
    """The smallest positive number of a dtype that results are rounded to."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if UNIT[dtype] else 0.0


def draw(dtype, N, K, block_size, format, M):
    """x, dy and a weight."""
    torch.manual_seed(0)
    weight = quantize_weight(torch.randn(N, K), format, block_size)
    return torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype), weight


def check_slabs(module, dtype, N, K, block_size, format="nf4", M=5, slab=2**9):
    """Both products within the a-priori bound of fp64 products with the same dequantized matrix."""
    x, dy, weight = draw(dtype, N, K, block_size, format, M)
    dequantize = dequantize_4bit if weight.layout.format.bits == 4 else dequantize_int8
    before, module.SLAB = module.SLAB, {"cpu": slab}
    try:
        with runtime.using("torch"):
            W = weight.dequantize(dtype)
            y = module.matmul_slabs(x, weight.as_packed(), dequantize)
            dx = module.matmul_slabs(dy, weight.as_packed(), dequantize, True)
    finally:
        module.SLAB = before
    assert y.shape == (M, N) and dx.shape == (M, K) and y.dtype == dx.dtype == dtype
    assert ((y.double() - x.double() @ W.double().t()).abs() <= bound(x, W.t(), dtype)).all()
    assert ((dx.double() - dy.double() @ W.double()).abs() <= bound(dy, W, dtype)).all()


@every_dtype
@given(**shapes, slab=st.sampled_from([1, 2**9, 2**12, 2**22]))
def test_products_in_slabs_are_those_of_the_dequantized_matrix(dtype, N, K, block_size, format, M, slab):
    check_slabs(slabs, dtype, N, K, block_size, format, M, slab)


@every_dtype
@given(**shapes)
def test_the_layer_and_its_gradient_are_products_with_the_dequantized_matrix(
    dtype, N, K, block_size, format, M
):
    """Whichever backend multiplies, and whichever operands it rounds to bf16 or fp16.

    Those are W itself or its table, scales and their products: three roundings, each u of a number or half of
    the smallest one. fp32 is not rounded to fp32; scales that are factors of sums make 4 more roundings.
    """
    x, dy, weight = draw(dtype, N, K, block_size, format, M)
    layer = QuantizedLinear.from_weight(weight, dtype)
    y = layer(x.requires_grad_())
    [dx] = torch.autograd.grad(y, x, dy)
    assert y.shape == (M, N) and dx.shape == (M, K) and y.dtype == dx.dtype == dtype
    u, W, absmax = UNIT[dtype], weight.dequantize(torch.float32), weight.scales().max().item()
    for got, a, b in ((y.detach(), x.detach(), W.t()), (dx, dy, W)):
        off = ((1 + u) ** 3 - 1) * b.double().abs() + 2 * smallest(dtype) * max(1, absmax)
        limit = bound(a, b, dtype, more=4) + (1 + 2 * u) * (a.double().abs() @ off)
        assert ((got.double() - a.double() @ b.double()).abs() <= limit).all()


MUTANTS = [
    ("torch.mm(x, slab, out=y[:, start:stop])", "torch.mm(x, slab, out=y[:, : stop - start])"),
    ("size if transposed else size // gcd(K, size)", "size if transposed else 1"),
    ("view(-1, K), start * K).t()", "view(-1, K), start * K + size).t()"),
    ("view(-1, K), start * K).t()", "view(-1, K), 0).t()"),
    ("if transposed and K % size:", "if False:"),
    ("view(N, -1), start, K)", "view(N, -1), 0, K)"),
    ("view(N, -1), start, K)", "view(N, -1), start, stop - start)"),
    ("width = max(unit, elements", "width = max(1, elements"),
    ("elements // length // unit * unit", "elements // length"),
    ("return min(outputs, ", "return min(outputs - unit, "),
    ("y = x.new_empty(x.shape[0], outputs)", "y = x.new_empty(x.shape[0], K)"),
]


def check_every_cut(module):
    with new_memory_filled():
        for shape, block in (((24, 192), 64), ((33, 96), 64), ((7, 65), 32), ((3, 64), 64), ((70, 320), 32)):
            for slab in (1, 2**9, 2**12):
                check_slabs(module, torch.float32, *shape, block, slab=slab)


def test_the_check_passes_on_the_module_and_on_its_copy():
    check_every_cut(slabs)
    check_every_cut(mutate(slabs, "import torch\n", "import torch\n"))


@pytest.mark.parametrize("old, new", MUTANTS)
def test_a_fault_in_the_products_is_noticed(old, new):
    mutate(slabs, old, new)  # that the text occurs once
    assert not survives(check_every_cut, slabs, old, new)


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


@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck_in_fp64_with_respect_to_the_input(format):
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(12, 64), format), torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("format, tables", [("nf4", ["nf4", "int8_dynamic"]), ("int8", ["int8_dynamic"])])
def test_autograd_keeps_the_packed_tensors_and_tables_that_all_layers_share(format, tables):
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(64, 128), format))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 128, requires_grad=True)).sum()
    own = {p.data_ptr() for p in layer.parameters()}
    shared = {FORMATS[name].values(layer.packed.device).data_ptr() for name in tables}
    assert len(own) == 4 and len(kept) == 4 + len(shared)
    assert {t.data_ptr() for t in kept} == own | shared


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


def test_a_layer_that_generated_in_inference_mode_trains_after_it():
    format = "fp4"
    FORMATS[format].values.cache_clear()
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(64, 64), format))
    FORMATS[format].values.cache_clear()
    with torch.inference_mode():
        layer(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")
def test_a_fake_tensor_is_an_error_and_not_a_crash():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(64, 64)))
    refused = pytest.raises(TypeError, match="the C file takes plain tensors, not FakeTensor")
    with FakeTensorMode(allow_non_fake_inputs=True), runtime.using("c"), refused:
        layer(torch.randn(2, 64))
