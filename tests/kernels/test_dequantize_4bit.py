"""minift.kernels.dequantize_4bit: bit for bit its reference, that one in numpy; machine code; mutants."""

from dataclasses import replace

import pytest
import quantized
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import inspect_build
from mutants import mutate, survives
from quantized import (
    FP32_SCALES,
    SCALES,
    Largest,
    Launches,
    as_packed,
    compare,
    draw,
    on_gpu,
    same_bits,
    slow_dequantize,
    to,
)

from minift.kernels import decode, runtime
from minift.kernels import dequantize_4bit as op
from minift.kernels.dequantize_4bit import BLOCK_SIZES, DTYPES, dequantize_4bit, dequantize_4bit_ref
from minift.quant.weight import quantize_weight

CASES, FEW = quantized.cases(4), quantized.few(4)
BF16 = torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def build(name, dtype, budget, **constants):
    constants = {"VECTOR": 2 if dtype == "fp32" else 4, "ODD": 0, **constants}
    return quantized.build(name, op.dequantize_4bit_kernel, dtype, budget, **constants)


BUILDS = [
    build("bf16, double quantization", "bf16", 11),
    build("bf16, fp32 scales", "bf16", 9, **FP32_SCALES),
    build("fp16, double quantization", "fp16", 11),
    build("fp32, double quantization", "fp32", 11.5),
    build("bf16, double quantization, blocks of 32", "bf16", 11, BLOCK_SIZE=32),
    build("bf16, double quantization, blocks of 4096", "bf16", 10, BLOCK_SIZE=4096),
    build("bf16, double quantization, short last tile", "bf16", 12.5, EVEN=False),
    build("bf16, double quantization, slab of 1024 columns", "bf16", 10, warps=1),
]


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_kernel_gives_the_bits_of_the_reference(case, device):
    compare(dequantize_4bit, dequantize_4bit_ref, **case, device=device, offset=len(case["shape"]) - 1)


@pytest.mark.parametrize("chunk", [op.CHUNK, 256])
def test_torch_gives_the_bits_of_the_reference_however_it_is_cut(chunk, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", chunk)
    with runtime.using("torch"):
        for case in CASES:
            compare(dequantize_4bit, dequantize_4bit_ref, **case, offset=1)


@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(BLOCK_SIZES[:4]),
    st.booleans(),
    st.sampled_from([*DTYPES, torch.float64]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_the_reference_gives_the_bits_of_a_slow_one(format, block_size, nested, dtype, shape):
    g = torch.Generator().manual_seed(shape[0])
    q = quantize_weight(torch.randn(shape, generator=g), format, block_size, nested)
    want = slow_dequantize(q, dtype)
    for call in (dequantize_4bit_ref, dequantize_4bit):
        out = torch.full(shape, float("nan"), dtype=dtype)
        with runtime.using("torch"):
            assert same_bits(call(as_packed(q), out), want)


@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 5), st.booleans(), st.data())
def test_a_slab_is_cut_out_of_the_whole(rows, above, width, nested, data):
    weight = draw((above + rows, 32 * width), 32, nested)
    left = data.draw(st.integers(0, width - 1))
    columns = data.draw(st.integers(1, width - left))
    first = 32 * (above * width + left)
    with runtime.using("torch"):
        whole = dequantize_4bit(weight, torch.empty(weight.shape))
        out = dequantize_4bit(weight, torch.empty(rows, 32 * columns), first, 32 * width)
    assert same_bits(out, whole[above:, 32 * left : 32 * (left + columns)].contiguous())


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_the_smallest_and_largest_scales(dtype, device):
    weight = draw((len(SCALES), 64), 64, False)
    table = torch.cat((torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-20]), weight.codebook[6:]))
    weight = weight._replace(absmax=torch.tensor(SCALES), codebook=table)
    compare(dequantize_4bit, dequantize_4bit_ref, weight, weight.shape, dtype, device=device)


@pytest.mark.triton
def test_nothing_is_decoded_into_an_empty_out(device):
    weight = to(draw((4, 64), 64, True), device)
    for shape, stride in [((0,), 0), ((0, 64), 64), ((3, 0), 64)]:
        assert dequantize_4bit(weight, torch.empty(shape, device=device), 64, stride).shape == shape
    assert dequantize_4bit(to(draw((0, 64), 64, True), device), torch.empty(0, device=device)).shape == (0,)


def test_torch_makes_no_tensor_of_the_size_of_the_weight():
    weight, out = draw((1024, 1024), 64, True), torch.empty(1024, 1024, dtype=BF16)
    with runtime.using("torch"), Largest() as seen:
        dequantize_4bit(weight, out)
        dequantize_4bit(weight, out.view(-1, 512)[:1024], 512, 1024)
    assert 0 < seen.bytes <= 4 * op.CHUNK < out.nbytes  # 8 bytes for each byte of codes in a chunk


WEIGHT = draw((6, 64), 64, True)
OUT = torch.empty(6, 64)
WRONG = [
    ({"packed": WEIGHT.packed[1:]}, {}, r"packed is torch.uint8 \(191,\) on cpu; .* torch.uint8 \(192,\)"),
    ({"packed": WEIGHT.packed.view(torch.int8)}, {}, "packed is torch.int8"),
    ({"packed": WEIGHT.packed.repeat(2)[::2]}, {}, "packed is .*, not contiguous; .* contiguous"),
    ({"absmax": torch.ones(6)}, {}, r"absmax is torch.float32 \(6,\) .* needs torch.uint8 \(6,\)"),
    ({"codebook": None}, {}, "codebook is None; .* in 4 bits"),
    ({"codebook": torch.ones(256)}, {}, r"codebook is torch.float32 \(256,\)"),
    ({"nested_absmax": torch.ones(2)}, {}, r"nested_absmax is .* needs torch.float32 \(1,\)"),
    ({"offset": None}, {}, "offset is None"),
    ({"nested_codebook": torch.ones(16)}, {}, r"nested_codebook is .* \(256,\)"),
    ({"block_size": 48}, {}, "block_size is 48; supported: 32, 64, "),
    ({}, {"out": OUT.int()}, "out is torch.int32 .* it must be fp32, bf16"),
    ({}, {"out": OUT.t()}, "out is .* not contiguous; it must be"),
    ({}, {"out": torch.empty(7, 64)}, "out holds elements 0 to 447 of 384"),
    ({}, {"out": OUT[0], "first": 32}, "out holds elements 32 to 95 .* must be a multiple of .* 64"),
    ({}, {"out": OUT[0], "first": -64}, "out holds elements -64 to -1"),
    ({}, {"out": OUT[0], "stride": 64}, r"out \(64,\) with stride 64; a slab of columns"),
    ({}, {"out": torch.empty(2, 32), "stride": 64}, r"out \(2, 32\) with stride 64"),
    ({}, {"out": OUT[:2], "stride": 96}, "with stride 96; .* the block size, 64"),
    ({}, {"out": OUT[:2], "stride": -64}, "with stride -64"),
    ({}, {"out": OUT[:4], "first": 64, "stride": 128}, "out holds elements 64 to 511 of 384"),
]


@pytest.mark.parametrize("fields, arguments, message", WRONG)
def test_what_is_not_as_it_should_be_is_refused(fields, arguments, message):
    with pytest.raises(ValueError, match="dequantize_4bit: .*" + message):
        dequantize_4bit(WEIGHT._replace(**fields), **{"out": OUT, **arguments})


@pytest.mark.skipif(runtime.INTERPRETED, reason="kernels are interpreted in this process, not compiled")
def test_no_multiply_add_is_fused_and_only_the_table_goes_through_shared_memory():
    code = inspect_build(BUILDS[0], 90)["opcodes"]
    assert not [opcode for opcode in code if opcode.startswith(("FFMA", "LDSM", "STSM"))]
    assert sum(count for opcode, count in code.items() if opcode.startswith("STS")) == 1
    fused = inspect_build(replace(BUILDS[0], options={"enable_fp_fusion": True}), 90)["opcodes"]
    assert [opcode for opcode in fused if opcode.startswith("FFMA")]  # what the option is for


def test_launches_forbid_fused_multiply_adds_and_have_tiles_that_fit(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(op, "dequantize_4bit_kernel", launches)
    monkeypatch.setattr(op, "choose", lambda *_: "triton")
    weight = draw((8, 4096), 64, True)
    for shape, stride in [((8, 4096), 0), ((4097,), 0), ((8, 2048), 4096), ((2, 1152), 4096)]:
        dequantize_4bit(weight, torch.empty(shape), 0, stride)
    assert all(options["enable_fp_fusion"] is False for _, options in launches)
    tiles = [(grid, options["TILE"], options["num_warps"], options["EVEN"]) for grid, options in launches]
    assert tiles[:2] == [((8, 1), 4096, 4, True), ((2, 1), 4096, 4, False)]
    assert tiles[2:] == [((8, 1), 2048, 2, True), ((2, 2), 1024, 1, False)]


ABSMAX = "tl.load(nested_codebook_ptr + absmax.to(tl.int32), mask=mask) * group + tl.load(offset_ptr)"
FUSED = ABSMAX.replace("mask=mask)", "mask=mask).to(tl.float64)")
MUTANTS = [
    ("tl.join(packed >> 4, packed & 15)", "tl.join(packed & 15, packed >> 4)"),
    ("tl.join(packed >> 4, packed & 15)", "tl.join(packed >> 4, packed & 7)"),
    ("source // BLOCK_SIZE + block, mask", "first // BLOCK_SIZE + block, mask"),
    ("+ row * stride + column  # in the weight", "+ row * C + column  # in the weight"),
    ("row * C + column  # in out", "row * (C - 1) + column  # in out"),
    ("byte < (left + ODD) // 2", "byte < left // 2"),
    ("else element < left", "else element < left - 1"),
    ("else element < left", "else element <= left"),
    ("BLOCK_SIZE) * absmax[:, None]", "BLOCK_SIZE) * absmax.to(tl.float16).to(tl.float32)[:, None]"),
    ("codebook_ptr + tl.arange(0, 16))", "codebook_ptr + (15 - tl.arange(0, 16)))"),
]
SCALE_MUTANTS = [  # of block_scales in decode.py
    ("nested_absmax_ptr + (block >> 8)", "nested_absmax_ptr + (block >> 9)"),
    (ABSMAX, f"({FUSED}).to(tl.float32)"),  # one rounding, as of a fused multiply-add
    (ABSMAX, ABSMAX.removesuffix(" + tl.load(offset_ptr)")),
]
TORCH_MUTANTS = [
    (
        "torch.cartesian_prod(weight.codebook, weight.codebook)",
        "weight.codebook.repeat(2, 16).t().contiguous()",
    ),
    ("first // per_byte, stride // per_byte", "first // per_byte, C // per_byte"),
    ("first // size, stride // size)\n    if", "0, stride // size)\n    if"),
    ("+ blocks) >> 8", "+ blocks) >> 7"),
    (".add_(weight.offset)", ""),
    ("codes[start : start + rows])", "codes[:rows])"),
    ("absmax[start : start + rows, :, None]", "absmax[:rows, :, None]"),
    ("flat.numel() % weight.block_size):", "0):"),
    ("first + start, width)", "first, width)"),
    ("target.copy_(values.mul_(scale))", "target.copy_(values.to(out.dtype).mul_(scale))"),
]


def check(module, backend):
    module.CHUNK = 128
    with runtime.using(backend):
        for case in FEW:
            compare(module.dequantize_4bit, dequantize_4bit_ref, **case)


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_of_the_kernel_are_noticed(old, new):
    assert not survives(lambda module: check(module, "triton"), op, old, new)


@pytest.mark.triton
@pytest.mark.parametrize("old, new", SCALE_MUTANTS)
def test_mutants_of_the_scales_are_noticed(old, new, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", op.CHUNK)  # which check changes
    check(op, "triton")
    monkeypatch.setattr(op, "block_scales", mutate(decode, old, new).block_scales)
    with pytest.raises(AssertionError):
        check(op, "triton")


@pytest.mark.parametrize("old, new", TORCH_MUTANTS)
def test_mutants_of_the_torch_path_are_noticed(old, new):
    assert not survives(lambda module: check(module, "torch"), op, old, new)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_grid_on_a_gpu(dtype):
    quantized.compare_the_grid(dequantize_4bit, dequantize_4bit_ref, dtype, 4)


@on_gpu
def test_a_hundred_launches_give_the_same_bits():
    weight = to(draw((4096, 4096), 64, True), "cuda")
    outs = [torch.empty(4096, 4096, dtype=BF16, device="cuda") for _ in range(2)]
    dequantize_4bit(weight, outs[0])
    assert all(torch.equal(dequantize_4bit(weight, outs[1]), outs[0]) for _ in range(100))


@on_gpu
def test_elements_beyond_2_to_the_31():
    tail, start = draw((64, 64), 64, False), 2**31
    n = start + 4096
    packed, absmax = torch.zeros(n // 2, dtype=torch.uint8, device="cuda"), torch.ones(n // 64, device="cuda")
    packed[start // 2 :], absmax[start // 64 :] = tail.packed.cuda(), tail.absmax.cuda()
    weight = to(tail, "cuda")._replace(packed=packed, absmax=absmax, shape=(n // 64, 64))
    want = dequantize_4bit_ref(tail, torch.empty(4096, dtype=BF16))
    assert torch.equal(dequantize_4bit(weight, torch.empty_like(want, device="cuda"), start).cpu(), want)
    whole = dequantize_4bit(weight, torch.empty(n, dtype=BF16, device="cuda"))
    assert torch.equal(whole[start:].cpu(), want)
