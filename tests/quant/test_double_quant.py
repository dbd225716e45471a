"""Double quantization: its bound, its storage, its formula."""

import numpy as np
import pytest
import quant_reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_reference import BLOCKS, NAMES, same_bits, weights

from minift.quant import quantize_weight
from minift.quant.double_quant import dequantize_absmax, quantize_absmax
from minift.quant.int8 import INT8_DYNAMIC

# Relative to the largest |absmax - mean| of a group: 13 roundings of the 8-bit map (test_formats.py) and that
# of the difference itself, 14 * 2^-24 < 2^-20.
ROUNDING = 2.0**-20


@st.composite
def scales(draw):
    """absmax of 1 to 700 blocks: 1 to 3 groups."""
    n, k = draw(st.integers(1, 700)), draw(st.integers(-40, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["normal", "constant", "outlier", "wide", "zeros", "two"]))
    absmax = {
        "normal": abs(3 + rng.standard_normal(n)),
        "constant": np.full(n, rng.random()),
        "outlier": np.where(np.arange(n) == rng.integers(n), 100, rng.random(n)),
        "wide": np.exp2(rng.uniform(-60, 0, n)),
        "zeros": rng.random(n) * (rng.random(n) < 0.3),
        "two": rng.choice([1.0, 1.0 + 2**-20], n),
    }[kind]
    return torch.from_numpy(np.ldexp(absmax, k).astype(np.float32))


def allowed(absmax, offset, restored):
    """Bound on |absmax - restored| per block, fp64."""
    off = (absmax.double() - offset.double()).abs()
    largest = torch.cat([group.amax().expand(len(group)) for group in off.split(256)])
    # adding the mean back rounds once more; a group whose differences are all below 2^-126 is one of zeros
    return (INT8_DYNAMIC.bound + ROUNDING) * largest + 2**-24 * restored.double().abs() + slow.TINY


@given(scales())
def test_scales_come_back_within_the_bound_of_their_group(absmax):
    stored = quantize_absmax(absmax)
    restored = dequantize_absmax(*stored)
    assert ((absmax.double() - restored.double()).abs() <= allowed(absmax, stored[2], restored)).all()


@given(scales())
def test_codes_are_those_of_the_slow_reference_after_the_mean_is_taken_off(absmax):
    codes, nested_absmax, offset = quantize_absmax(absmax)
    n, mean = len(absmax), absmax.double().mean()
    # a sum of n fp32 numbers in any order, n - 1 roundings, and a division
    assert (offset.double() - mean).abs() <= n * 2**-24 * 1.001 * mean + 2**-149
    expected = slow.quantize_absmax((absmax - offset).numpy())
    assert same_bits(codes, expected[0]) and same_bits(nested_absmax, expected[1])


@given(scales())
def test_dequantization_is_the_formula(absmax):
    codes, nested_absmax, offset = quantize_absmax(absmax)
    products = slow.VALUES["int8_dynamic"][codes.numpy()] * nested_absmax.numpy().repeat(256)[: len(absmax)]
    assert same_bits(dequantize_absmax(codes, nested_absmax, offset), products + offset.numpy())


@given(scales())
def test_a_scale_takes_a_byte_a_group_four_and_the_mean_four(absmax):
    codes, nested_absmax, offset = quantize_absmax(absmax)
    assert codes.dtype == torch.uint8 and codes.shape == absmax.shape
    assert nested_absmax.dtype == torch.float32 and nested_absmax.shape == (-(-len(absmax) // 256),)
    assert offset.dtype == torch.float32 and offset.shape == (1,)


@given(scales(), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_result(absmax, k):
    before, after = quantize_absmax(absmax), quantize_absmax(absmax * 2.0**k)
    assert same_bits(after[0], before[0])
    assert same_bits(after[1], before[1] * 2.0**k) and same_bits(after[2], before[2] * 2.0**k)


@pytest.mark.parametrize("absmax", [[0.3], [0.0], [2.0**-126], [3.4e38], [0.25] * 8, [1.5] * 1024])
def test_one_block_and_equal_blocks_are_exact(absmax):
    absmax = torch.tensor(absmax)  # sums of which are exact
    codes, nested_absmax, offset = quantize_absmax(absmax)
    assert (codes == 0).all() and (nested_absmax == 0).all() and offset == absmax[0]
    assert same_bits(dequantize_absmax(codes, nested_absmax, offset), absmax)


def test_scales_are_those_of_bitsandbytes():
    row = BLOCKS["double_quant_64x64"]
    codes, nested_absmax, offset = quantize_absmax(torch.tensor(row["absmax"]))
    assert codes.tolist() == row["absmax_codes"]
    # another order of the sum of 64 numbers: two times 64 roundings
    shift = 128 * 2**-24 * row["offset"][0]
    assert offset.item() == pytest.approx(row["offset"][0], rel=0, abs=shift)
    assert nested_absmax.tolist() == pytest.approx(row["nested_absmax"], rel=2**-23, abs=shift)


@pytest.mark.parametrize("name", NAMES)
@given(case=weights(exponents=(-14, 12), special=False))
def test_weights_are_as_close_as_their_own_bound_and_that_of_their_scale(name, case):
    w, block_size = case
    single, q = (quantize_weight(w, name, block_size, double_quant=d) for d in (False, True))
    assert same_bits(q.packed, single.packed)  # codes are those of the exact scales
    result = q.dequantize(torch.float32).double()
    extra = allowed(single.absmax, q.offset, q.scales()).repeat_interleave(block_size)[: len(w)]
    a = single.absmax.double().repeat_interleave(block_size)[: len(w)]
    # |value| <= 1 passes the error of the scale on; the product with it is rounded once
    limit = (slow.BOUND[name] + ROUNDING) * a + extra + 2**-24 * result.abs()
    assert ((w.double() - result).abs() <= limit).all()
    assert (result[a == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_beyond_fp32_is_an_error_that_names_the_way_out(dtype):
    w = torch.full((256,), 3e38, dtype=dtype)
    with pytest.raises(
        ValueError, match="^the weight: the mean of absmax overflows fp32; use double_quant=False for"
    ):
        quantize_weight(w, double_quant=True)
    assert torch.equal(quantize_weight(w, double_quant=False).dequantize(), w)
