"""The laws of block quantization, for every format, on weights that are hard to quantize."""

import numpy as np
import pytest
import quant_reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_reference import DTYPES, NAMES, blocks, same_bits, weights

from minift.kernels import dequantize_4bit, quantize_4bit, quantize_int8, runtime
from minift.quant import FORMATS, QuantizedWeight, base, int8, quantize_weight

# Roundings that a bound in exact arithmetic leaves out, relative to absmax a: 1/a may be subnormal (2^-22),
# and is rounded, as is its product with w (2 * 2^-24); the steps of the dynamic map take 4 (4 * 2^-24), 127 s
# of int8 one (2^-24); midpoints, table and value * a one each (2 * 2^-25 + 2^-24). In all 13 * 2^-24 < 2^-20.
ROUNDING = 2.0**-20
every_format = pytest.mark.parametrize("name", NAMES)


def plain(w, name, block_size):
    """Without double quantization, whose mean lets blocks act on each other."""
    return quantize_weight(w, name, block_size, double_quant=False)


def by_block(w, block_size):
    """(blocks, block size) in fp64, the last filled up with zeros."""
    return torch.nn.functional.pad(w.double(), (0, -len(w) % block_size)).view(-1, block_size)


def per_element(q):
    return q.absmax.double().repeat_interleave(q.layout.block_size)[: q.layout.n]


def test_there_are_the_formats_that_are_tested():
    assert tuple(FORMATS) == NAMES


@every_format
@given(case=weights())
def test_codes_scales_and_numbers_are_those_of_the_slow_reference(name, case):
    w, block_size = case
    q = plain(w, name, block_size)
    codes, absmax = slow.quantize(name, w.float().numpy(), block_size)
    assert same_bits(q.absmax, absmax)
    assert same_bits(q.packed, slow.pack(name, codes))
    for dtype in (w.dtype, torch.float32, torch.bfloat16):
        assert same_bits(q.dequantize(dtype), slow.dequantize(name, codes, absmax, block_size, dtype))
    assert same_bits(q.dequantize(), q.dequantize(w.dtype))


@pytest.mark.parametrize("case", ["zero_block_and_outlier", "ragged_last_block_100", "fp4_4x64"])
def test_blocks_are_those_of_bitsandbytes(case):
    row = slow.BLOCKS[case]
    q = plain(torch.tensor(row["weights"]).view(row["shape"]), row["quant_type"], row["blocksize"])
    assert q.packed.tolist() == list(bytes.fromhex(row["packed_hex"]))
    assert same_bits(q.absmax, torch.tensor(row["absmax"]))
    assert same_bits(q.dequantize(), torch.tensor(row["dequantized"]).view(row["shape"]))


@every_format
@given(case=weights())
def test_the_chosen_value_is_the_nearest(name, case):
    w, block_size = case
    q = plain(w, name, block_size)
    # both ways: to the chosen value and to the nearest. The grid of the dynamic map is off by 1/65535 at most
    slack = 2 * (ROUNDING + (name == "int8_dynamic") / 65535)
    values = torch.from_numpy(slow.VALUES[name]).double().unique()
    off = (w.double() - q.dequantize(torch.float32).double()).abs()
    for part, a, distance in zip(
        w.double().split(block_size), q.absmax.double(), off.split(block_size), strict=True
    ):
        nearest = (part[:, None] - a * values).abs().amin(1)
        assert (distance <= nearest + slack * a + (a == 0) * slow.TINY).all()


@every_format
@given(case=weights(), dtype=st.sampled_from(DTYPES))
def test_no_number_is_further_off_than_the_bound_of_its_block(name, case, dtype):
    assert abs(FORMATS[name].bound - slow.BOUND[name]) <= 2**-23  # fp32 tables, 7 digits
    w, block_size = case
    q = plain(w, name, block_size)
    a = per_element(q)
    if a.max() > torch.finfo(dtype).max:
        return  # the numbers themselves have no place in this dtype
    allowed = (slow.BOUND[name] + ROUNDING) * a + slow.TINY * (a == 0)
    if dtype != torch.float32:  # rounded once more, to nearest: half an ulp, 2^-8 (bf16) or 2^-11 (fp16)
        info = torch.finfo(dtype)
        allowed += info.eps / 2 * q.dequantize(torch.float32).double().abs() + info.tiny * info.eps / 2
    assert ((w.double() - q.dequantize(dtype).double()).abs() <= allowed).all()


# Minus zero of FP4 is written as zero. Around 2^-13 the values of the dynamic map stand closer than its grid.
MOVES = {"fp4": {8: 0}, "int8_dynamic": {120: 121, 134: 133}}


@every_format
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_quantizing_again_changes_no_code_but_those_known(name, data, dtype):
    # fp16 products above its subnormals: there 2^-24 is coarser than the codes
    exponents = (0, 12) if dtype == torch.float16 else (-60, 60)
    w, block_size = data.draw(weights(dtypes=[dtype], exponents=exponents, special=False))
    if name == "int8_dynamic":  # without -1 the absmax of a negative extreme would shrink
        block = by_block(w, block_size)
        sign = torch.where(block.amin(1) + block.amax(1) < 0, -1, 1)
        w = w * sign.repeat_interleave(block_size)[: len(w)].to(dtype)
    once = plain(w, name, block_size)
    again = plain(once.dequantize(), name, block_size)
    before, after = slow.unpack(name, once.packed, len(w)), slow.unpack(name, again.packed, len(w))
    moved = before.clone()
    for code, other in MOVES.get(name, {}).items():
        moved[before == code] = other
    assert ((after == before) | (after == moved)).all()
    if dtype == torch.float32:
        assert same_bits(again.absmax, once.absmax)
        assert name == "int8_dynamic" or torch.equal(again.dequantize(), once.dequantize())


@every_format
@given(case=weights(whole=True), data=st.data())
def test_a_block_acts_on_no_other(name, case, data):
    w, block_size = case
    count = len(w) // block_size
    i = data.draw(st.integers(0, count - 1))
    changed = w.clone().view(count, block_size)
    changed[i] = data.draw(blocks(block_size, w.dtype))
    others = [j for j in range(count) if j != i]
    before, after = plain(w, name, block_size), plain(changed.view(-1), name, block_size)
    for a, b in ((before.packed, after.packed), (before.absmax, after.absmax)):
        assert same_bits(a.view(count, -1)[others], b.view(count, -1)[others])
    alone = plain(changed[i], name, block_size)
    assert same_bits(after.dequantize().view(count, -1)[i], alone.dequantize())


@every_format
@given(case=weights(whole=True), data=st.data())
def test_permuting_blocks_permutes_the_result(name, case, data):
    w, block_size = case
    order = data.draw(st.permutations(range(len(w) // block_size)))
    before = plain(w, name, block_size).dequantize().view(-1, block_size)
    after = plain(w.view(-1, block_size)[order].view(-1), name, block_size)
    assert same_bits(after.dequantize().view(-1, block_size), before[order])


@every_format
@given(case=weights([torch.float32], exponents=(-40, 40), special=False), k=st.integers(-30, 30))
def test_scaling_by_a_power_of_two_scales_the_result(name, case, k):
    w, block_size = case
    w[w.abs() < 2.0**-75] = 0  # far from subnormal products (the smallest value is 2^-16), also after scaling
    before, after = plain(w, name, block_size), plain(w * 2.0**k, name, block_size)
    assert same_bits(after.packed, before.packed)
    assert same_bits(after.absmax, before.absmax * 2.0**k)
    assert same_bits(after.dequantize(), before.dequantize() * 2.0**k)


@every_format
@given(case=weights())
def test_larger_numbers_of_a_block_stay_no_smaller(name, case):
    w, block_size = case
    result = plain(w, name, block_size).dequantize()
    for before, after in zip(w.split(block_size), result.split(block_size), strict=True):
        assert (after[before.argsort()].diff() >= 0).all()


@every_format
@given(case=weights())
def test_extremes_and_zeros_are_exact(name, case):
    w, block_size = case
    q = plain(w, name, block_size)
    a, result = per_element(q), q.dequantize(torch.float32)
    w = w.float()
    if name == "int8_dynamic":  # has 1 but not -1, and its grid has no step at 0: the next is 1/65535
        values = slow.VALUES[name]
        expected = torch.where(w > 0, 1.0, values.min()), values[abs(values - 1 / 65535).argmin()]
    else:
        expected = w.sign(), 0.0
    extreme = (w.abs() == a) & (a > 0)
    assert torch.equal(result[extreme], (expected[0] * a.float())[extreme])
    assert torch.equal(result[w == 0], (expected[1] * a.float())[w == 0])


@given(case=weights())
def test_int8_of_minus_w_is_minus_int8_of_w(case):
    w, block_size = case
    assert torch.equal(plain(-w, "int8", block_size).dequantize(), -plain(w, "int8", block_size).dequantize())


def test_nf4_is_not_symmetric():
    w = torch.tensor([1.0, 0.12, -0.12])  # midpoints: 0.1203 above zero, -0.1379 below
    result = plain(w, "nf4", 32).dequantize().tolist()
    assert result[1] == pytest.approx(0.0796, abs=1e-4) and result[2] == pytest.approx(-0.0911, abs=1e-4)


@every_format
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_blocks_below_the_smallest_normal_number_become_zeros(name, data, dtype):
    info = torch.finfo(dtype)
    units = np.array(data.draw(st.lists(st.integers(-1, 1), min_size=1, max_size=70)))
    tiny = torch.from_numpy(units * data.draw(st.sampled_from([0, info.tiny * info.eps, info.tiny / 2])))
    q = plain(tiny.to(dtype), name, 32)
    assert (q.absmax == 0).all() and (q.dequantize() == 0).all()
    assert same_bits(q.packed, slow.pack(name, np.full(len(units), slow.ZERO_CODE[name], dtype=np.uint8)))
    kept = plain(torch.tensor([info.tiny], dtype=dtype), name, 32)  # the smallest normal number is not zero
    assert kept.absmax.item() == kept.dequantize().item() == info.tiny


@every_format
def test_a_byte_is_its_codes_the_first_in_the_high_nibble(name):
    byte = torch.arange(256, dtype=torch.uint8)
    codes = slow.unpack(name, byte, 256 * 8 // slow.BITS[name])
    stored = {"packed": byte, "absmax": torch.ones(1).view(torch.uint8)}
    layout = base.Layout(FORMATS[name], tuple(codes.shape), 512, double_quant=False)
    numbers = QuantizedWeight(layout, stored, torch.float32).dequantize()
    assert same_bits(numbers, slow.VALUES[name][codes.numpy()])
    if name == "int8_dynamic":
        return  # does not choose all of its codes
    kept = codes != 128  # -128 / 127 of int8 lies outside of [-1, 1]
    numbers, codes = numbers[kept], codes[kept].numpy()
    codes[numbers == 0] = slow.ZERO_CODE[name]  # minus zero of FP4
    for n in (len(codes), len(codes) - 1):  # 1 is an absmax of both
        assert same_bits(plain(numbers[:n], name, 512).packed, slow.pack(name, codes[:n].astype(np.uint8)))


@every_format
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    block_size=st.sampled_from(base.BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_bytes_are_those_of_the_storage_law(name, shape, block_size, double_quant):
    n = int(np.prod(shape))
    B = -(-n // block_size)
    law = -(-n * (4 if name in ("nf4", "fp4") else 8) // 8)
    law += B + 4 * -(-B // 256) + 4 if double_quant else 4 * B
    q = quantize_weight(torch.randn(shape), name, block_size, double_quant)
    assert q.nbytes == FORMATS[name].bytes(shape, block_size, double_quant) == law
    assert sum(t.untyped_storage().nbytes() for t in q.tensors.values()) == law


@every_format
def test_any_strides_and_shape_quantize_as_the_flattened_weight(name):
    w = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1))
    q = plain(w.permute(2, 0, 1), name, 32)
    flat = plain(w.permute(2, 0, 1).flatten(), name, 32)
    assert q.shape == (3, 7, 5) and same_bits(q.packed, flat.packed)
    assert same_bits(q.dequantize(), flat.dequantize().view(3, 7, 5))
    assert plain(torch.tensor(-1.5), name, 32).dequantize().shape == ()
    for strided in (w[0, :, 0], w[..., :1], w[0, 0, 0].expand(40), w.flatten()[1:]):
        assert same_bits(plain(strided, name, 32).packed, plain(strided.clone(), name, 32).packed)


@every_format
@pytest.mark.parametrize("n", [320, 321, 5000])
def test_chunks_leave_no_trace(name, n, monkeypatch):
    w = torch.randn(n, generator=torch.Generator().manual_seed(n))
    whole = plain(w, name, 32)
    result = whole.dequantize()
    for module in (dequantize_4bit, quantize_4bit, quantize_int8, int8):
        monkeypatch.setattr(module, "CHUNK", 96)
    monkeypatch.setattr(dequantize_4bit, "ROW", 64)
    with runtime.using("torch"):
        cut = plain(w, name, 32)
        assert same_bits(cut.packed, whole.packed) and same_bits(cut.absmax, whole.absmax)
        assert same_bits(cut.dequantize(), result)


@every_format
@given(case=weights(dtypes=[torch.float32, torch.bfloat16], exponents=(-60, 60)))
def test_flushing_subnormal_numbers_to_zero_changes_no_result(name, case):
    w, block_size = case
    if w.abs().max() > 1e30:
        return  # 1/absmax would be subnormal itself
    expected = plain(w, name, block_size).dequantize(torch.float32)
    if not torch.set_flush_denormal(True):
        return
    try:
        result = plain(w, name, block_size).dequantize(torch.float32)
    finally:
        torch.set_flush_denormal(False)
    # products below 2^-126 are flushed, too
    assert ((result.double() - expected.double()).abs() <= slow.TINY).all()
