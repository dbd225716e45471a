"""minift.kernels.quantize_int8: bit for bit its reference, that one in numpy; machine code; mutants."""

import pytest
import test_quantize_4bit as four
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from quantized import Launches, on_gpu, same_bits, slow_quantize
from test_quantize_4bit import KINDS, build, compare, draw

from minift.kernels import quantize_int8 as op
from minift.kernels import runtime
from minift.kernels.dequantize_4bit import BLOCK_SIZES, DTYPES
from minift.kernels.quantize_int8 import quantize_int8, quantize_int8_ref

FP32, BF16, FP16 = DTYPES
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.mark.triton
@pytest.mark.parametrize("n, block_size, dtype", four.CASES)
def test_the_kernel_gives_the_bits_of_the_reference(n, block_size, dtype, device):
    w = draw(n, block_size, dtype)
    compare(quantize_int8, quantize_int8_ref(w, block_size), w, block_size, device=device, offset=n % 2)


@pytest.mark.parametrize("chunk", [op.CHUNK, 4096])
def test_the_reference_and_torch_give_the_bits_of_the_slow_reference(chunk, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", chunk)
    for n, block_size, dtype in four.CASES:
        w = draw(n, block_size, dtype)
        want = slow_quantize("int8", w, block_size)
        got = quantize_int8_ref(w, block_size)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        with runtime.using("torch"):
            compare(quantize_int8, want, w, block_size, offset=1)


@given(st.integers(1, 400), st.sampled_from([32, 64]), st.integers(-100, 100))
def test_codes_are_symmetric_and_do_not_see_powers_of_two(n, block_size, exponent):
    w = draw(n, block_size, FP32, [1, 2, 3, 4, 5, 10])
    with runtime.using("torch"):
        packed, absmax = quantize_int8(w, block_size)
        negated, scaled = quantize_int8(-w, block_size), quantize_int8(w * 2.0**exponent, block_size)
    assert torch.equal(negated[0].view(torch.int8), -packed.view(torch.int8))
    assert torch.equal(scaled[0], packed) and torch.equal(scaled[1], absmax * 2.0**exponent)
    assert packed.view(torch.int8).abs().amax() == 127


@pytest.mark.triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_makes_the_absmax_of_its_block_so(dtype, bad, device):
    w = draw(200, 64, dtype, [3, 9])
    packed, absmax = quantize_int8_ref(w, 64)
    for at in (64, 127, 199):
        broken, others = w.clone(), torch.arange(4) != at // 64
        broken[at] = bad
        got, scales = (x.cpu() for x in quantize_int8(broken.to(device), 64))
        assert not torch.isfinite(scales[at // 64]) and torch.equal(scales[others], absmax[others])
        there = others.repeat_interleave(64)[:200]
        assert torch.equal(got[there], packed[there])


@pytest.mark.triton
def test_nothing_is_made_of_nothing(device):
    for backend in ("auto", "torch"):
        with runtime.using(backend):
            assert [x.shape for x in quantize_int8(torch.empty(0, device=device), 64)] == [(0,), (0,)]


@pytest.mark.parametrize(
    "w, block_size, message",
    [
        (torch.ones(8, 8), 64, r"w is torch.float32 \(8, 8\) on cpu; it must be flat, contiguous"),
        (torch.ones(64)[::2], 64, "w is .* not contiguous; it must be flat"),
        (torch.ones(64).double(), 64, "w is torch.float64 .* fp32, bf16 or fp16"),
        (torch.ones(64), 8192, "block_size is 8192; supported: 32, 64, "),
    ],
)
def test_what_is_not_as_it_should_be_is_refused(w, block_size, message):
    with pytest.raises(ValueError, match="quantize_int8: " + message):
        quantize_int8(w, block_size)


KERNEL, WIDE = op.quantize_int8_kernel, ("LDG.E.128", "STG.E.64")
BUILDS = [
    build("bf16", KERNEL, "bf16", 16, WIDE),
    build("fp32", KERNEL, "fp32", 18, ("LDG.E.128", "STG.E")),
    build("fp16, blocks of 4096", KERNEL, "fp16", 16, WIDE, BLOCK_SIZE=4096),
    build("bf16, short last tile", KERNEL, "bf16", None, WIDE, EVEN=False),
]


def test_launches_forbid_fused_multiply_adds(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(op, "quantize_int8_kernel", launches)
    monkeypatch.setattr(op, "choose", lambda *_: "triton")
    quantize_int8(torch.ones(64), 64)
    assert [(grid, options["enable_fp_fusion"]) for grid, options in launches] == [((1,), False)]


CODE = "scaled * 127 + 12582912.0"
MUTANTS = [
    (CODE, "scaled * 128 + 12582912.0"),
    (CODE, "scaled * 127 + 0.5 + 12582911.5"),  # 12582911.5 has no room: twice rounded
    (CODE, "tl.floor(scaled * 127) + 12582912.0"),
    (CODE, "tl.floor(scaled * 127 + 0.5) + 12582912.0"),
    (CODE, "(scaled.to(tl.float64) * 127 + 12582912.0).to(tl.float32)"),  # as a fused multiply-add
    ("mask=element < left, other=0", "mask=element < left, other=9e9"),
    ("else element < left", "else element < left - 1"),
    ("else element < left", "else element <= left"),
    ("block * BLOCK_SIZE < left", "block * BLOCK_SIZE < left - 1"),
    ("block * BLOCK_SIZE < left", "block * BLOCK_SIZE <= left"),
    ("absmax_ptr + start // BLOCK_SIZE", "absmax_ptr + start // TILE"),
]
TORCH_MUTANTS = [
    ("(scaled * 127).round()", "(scaled * 127).floor()"),
    ("(scaled * 127).round()", "(scaled * 127 + 0.5).floor()"),
    ("(scaled * 127).round()", "(scaled * 128).round()"),
    ("absmax[start // block_size :", "absmax[start :"),
]


def check(module, backend):
    module.CHUNK = 4096
    weights = [draw(32 * KINDS + 1, 32, FP32), torch.full((33,), 2.0**-126)]
    weights += [draw(n, 64, FP32, [10]) for n in (57, 63, 128, 6013)]
    with runtime.using(backend):
        for w in weights:
            block_size = 32 if len(w) % 32 == 1 else 64
            compare(module.quantize_int8, quantize_int8_ref(w, block_size), w, block_size)


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_of_the_kernel_are_noticed(old, new):
    assert not survives(lambda module: check(module, "triton"), op, old, new)


@pytest.mark.parametrize("old, new", TORCH_MUTANTS)
def test_mutants_of_the_torch_path_are_noticed(old, new):
    assert not survives(lambda module: check(module, "torch"), op, old, new)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_grid_on_a_gpu(dtype):
    for block_size in BLOCK_SIZES:
        for n in (1, 31, 33, 64, 127, 1000, 4095, 4096, 4097, 11008, 3 * 11008, 2048 * 4096):
            w = draw(n, block_size, dtype)
            want = quantize_int8_ref(w, block_size)
            compare(quantize_int8, want, w, block_size, device="cuda", offset=n % 2)
