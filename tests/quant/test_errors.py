"""Bad input is a ValueError of one sentence that names what is wrong."""

import re

import pytest
import torch
from quant_reference import NAMES

from minift.quant import FORMATS, QuantizedWeight, quantize_weight
from minift.quant.base import BLOCK_SIZES, Layout

KNOWN = ", ".join(map(str, BLOCK_SIZES))


@pytest.mark.parametrize("format", ["nf3", "NF4", "", None, 4, ["nf4"]])
def test_an_unknown_format_is_an_error_that_lists_the_known_ones(format):
    message = f"^format {re.escape(repr(format))} is not known; known formats: {', '.join(NAMES)}$"
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.ones(4), format)


@pytest.mark.parametrize("size", [*(0, -64, 1, 16, 48, 8192, True, None, "64", 64.0)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_an_unknown_block_size_is_an_error_that_lists_the_known_ones(size, double_quant):
    with pytest.raises(ValueError, match=f"^block_size is {size!r}; supported: {KNOWN}$"):
        quantize_weight(torch.ones(4), block_size=size, double_quant=double_quant)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_weight_of_no_floating_point_is_an_error(dtype):
    with pytest.raises(ValueError, match=f"^lm_head is {dtype}; only floating-point weights are quantized$"):
        quantize_weight(torch.ones(4, 4).to(dtype), name="lm_head")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 64)])
def test_an_empty_weight_is_an_error_with_its_shape(shape):
    with pytest.raises(
        ValueError, match=f"^lm_head is empty, shape {re.escape(str(shape))}; there is nothing"
    ):
        quantize_weight(torch.empty(shape), name="lm_head")


def test_a_float64_weight_is_an_error():
    with pytest.raises(ValueError, match="^lm_head is torch.float64; .* convert it first$"):
        quantize_weight(torch.ones(4, dtype=torch.float64), name="lm_head")


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [[0, 0], [2, 31], [3, 64]])
def test_a_number_that_is_not_finite_is_an_error_that_says_where(format, bad, dtype, index):
    w = torch.ones(4, 65, dtype=dtype)  # 260 numbers: whole blocks, and a short one with the last index
    w[tuple(index)] = bad
    with pytest.raises(
        ValueError, match=f"^lm_head is not finite at {re.escape(str(index))}: it is {bad}; [^.]*$"
    ):
        quantize_weight(w, format, 32, name="lm_head")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", NAMES)
def test_tensors_of_another_count_dtype_or_rank_are_an_error_with_both(format, double_quant):
    q = quantize_weight(torch.randn(5, 20), format, 32, double_quant)
    for part, tensor in q.tensors.items():
        n = tensor.numel()
        start = re.escape(f"{format} weight of shape (5, 20) in blocks of 32 needs torch.uint8 ({n},)")
        for wrong in (tensor[:-1], torch.cat((tensor, tensor)), tensor.to(torch.int8), tensor.view(1, n)):
            found = re.escape(f"{part} is {wrong.dtype} {tuple(wrong.shape)}; a ")
            with pytest.raises(ValueError, match=f"^{found}{start}$"):
                QuantizedWeight(q.layout, {**q.tensors, part: wrong}, q.dtype)


def test_missing_and_unknown_tensors_are_an_error_that_lists_them():
    single = quantize_weight(torch.randn(100), double_quant=False)
    double = quantize_weight(torch.randn(100), double_quant=True)
    names = "packed, absmax, nested_absmax, offset"
    with pytest.raises(ValueError, match=f"^a quantized weight is stored as {names}; got packed, absmax$"):
        QuantizedWeight(double.layout, single.tensors, torch.float32)
    with pytest.raises(ValueError, match=f"^a quantized weight is stored as packed, absmax; got {names}$"):
        QuantizedWeight(single.layout, double.tensors, torch.float32)
    with pytest.raises(ValueError, match="^a quantized weight is stored as packed, absmax; got absmax$"):
        QuantizedWeight(single.layout, {"absmax": single.tensors["absmax"]}, torch.float32)


@pytest.mark.parametrize("size", [48, True])
def test_a_layout_checks_its_block_size(size):
    with pytest.raises(ValueError, match=f"^block_size is {size}; supported: {KNOWN}$"):
        Layout(FORMATS["nf4"], (4, 4), size, False)
