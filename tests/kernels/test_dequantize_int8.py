"""minift.kernels.dequantize_int8: bit for bit its reference, that one in numpy; machine code; mutants."""

import pytest
import quantized
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import inspect_build
from mutants import survives
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

from minift.kernels import dequantize_4bit, runtime
from minift.kernels import dequantize_int8 as op
from minift.kernels.dequantize_4bit import BLOCK_SIZES, DTYPES
from minift.kernels.dequantize_int8 import dequantize_int8, dequantize_int8_ref
from minift.kernels.packed import Packed
from minift.quant.weight import quantize_weight

CASES = [*quantized.cases(8, table=False), *quantized.cases(8)[::2]]
FEW = [*quantized.few(8, table=False), *quantized.few(8)[1:4]]
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def build(name, dtype, budget, codebook_ptr=None, **constants):
    """Without a codebook, or with codebook_ptr="*fp32"."""
    constants = {"VECTOR": 4 if dtype == "fp32" else 8, **constants}
    if codebook_ptr is None:
        constants["codebook_ptr"] = None
    return quantized.build(name, op.dequantize_int8_kernel, dtype, budget, **constants)


BUILDS = [
    build("bf16, double quantization", "bf16", 10.5),
    build("bf16, fp32 scales", "bf16", 9, **FP32_SCALES),
    build("fp16, double quantization", "fp16", 10.5),
    build("fp32, double quantization", "fp32", 12.5),
    build("bf16, double quantization, codebook", "bf16", 10, codebook_ptr="*fp32"),
    build("bf16, double quantization, short last tile", "bf16", 12.5, EVEN=False),
    build("bf16, double quantization, slab of 1024 columns", "bf16", 10.5, warps=1),
]


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_kernel_gives_the_bits_of_the_reference(case, device):
    compare(dequantize_int8, dequantize_int8_ref, **case, device=device, offset=len(case["shape"]) - 1)


@pytest.mark.parametrize("chunk", [dequantize_4bit.CHUNK, 256])
def test_torch_gives_the_bits_of_the_reference_however_it_is_cut(chunk, monkeypatch):
    monkeypatch.setattr(dequantize_4bit, "CHUNK", chunk)
    with runtime.using("torch"):
        for case in CASES:
            compare(dequantize_int8, dequantize_int8_ref, **case, offset=1)


@given(
    st.sampled_from(["int8", "int8_dynamic"]),
    st.sampled_from(BLOCK_SIZES[:4]),
    st.booleans(),
    st.sampled_from([*DTYPES, torch.float64]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_the_reference_gives_the_bits_of_a_slow_one(format, block_size, nested, dtype, shape):
    g = torch.Generator().manual_seed(shape[0])
    q = quantize_weight(torch.randn(shape, generator=g), format, block_size, nested)
    want = slow_dequantize(q, dtype)
    for call in (dequantize_int8_ref, dequantize_int8):
        out = torch.full(shape, float("nan"), dtype=dtype)
        with runtime.using("torch"):
            assert same_bits(call(as_packed(q), out), want)


@pytest.mark.triton
def test_every_code_is_the_correctly_rounded_quotient(device):
    packed = torch.arange(256, dtype=torch.uint8)
    weight = Packed(packed, torch.ones(8), None, (256,), 32)
    want = (packed.view(torch.int8).double() / 127).float()  # fp64 has more than twice the bits of fp32
    assert same_bits(dequantize_int8_ref(weight, torch.empty(256)), want)
    assert same_bits(dequantize_int8(to(weight, device), torch.empty(256, device=device)).cpu(), want)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_the_smallest_and_largest_scales(dtype, device):
    weight = draw((len(SCALES), 64), 64, False, 8, table=False)._replace(absmax=torch.tensor(SCALES))
    weight.packed[::3] = 0
    compare(dequantize_int8, dequantize_int8_ref, weight, weight.shape, dtype, device=device)


@pytest.mark.triton
def test_nothing_is_decoded_into_an_empty_out(device):
    weight = to(draw((4, 64), 64, True, 8), device)
    for shape, stride in [((0,), 0), ((0, 64), 64), ((3, 0), 64)]:
        assert dequantize_int8(weight, torch.empty(shape, device=device), 64, stride).shape == shape


def test_torch_makes_no_tensor_of_the_size_of_the_weight():
    weight, out = draw((2048, 1024), 64, True, 8), torch.empty(2048, 1024, dtype=torch.bfloat16)
    with runtime.using("torch"), Largest() as seen:
        dequantize_int8(weight, out)
    assert 0 < seen.bytes <= 8 * dequantize_4bit.CHUNK < out.nbytes  # 8 bytes for each code of a chunk


WEIGHT = draw((6, 64), 64, True, 8)
WRONG = [
    ({"packed": WEIGHT.packed[1:]}, {}, r"packed is .* in 8 bits .* needs torch.uint8 \(384,\)"),
    ({"codebook": torch.ones(16)}, {}, r"codebook is torch.float32 \(16,\) .* torch.float32 \(256,\)"),
    ({"absmax": torch.ones(6)}, {}, r"absmax is torch.float32 \(6,\) .* needs torch.uint8 \(6,\)"),
    ({"nested_codebook": None}, {}, "nested_codebook is None"),
    ({}, {"out": torch.empty(7, 64)}, "out holds elements 0 to 447 of 384"),
    ({}, {"out": torch.empty(2, 64), "stride": 96}, "with stride 96; .* the block size, 64"),
]


@pytest.mark.parametrize("fields, arguments, message", WRONG)
def test_what_is_not_as_it_should_be_is_refused(fields, arguments, message):
    with pytest.raises(ValueError, match="dequantize_int8: .*" + message):
        dequantize_int8(WEIGHT._replace(**fields), **{"out": torch.empty(6, 64), **arguments})


@pytest.mark.skipif(runtime.INTERPRETED, reason="kernels are interpreted in this process, not compiled")
def test_no_multiply_add_is_fused_and_nothing_goes_through_shared_memory():
    code = inspect_build(BUILDS[0], 90)["opcodes"]
    assert not [opcode for opcode in code if opcode.startswith(("FFMA", "STS", "LDSM", "MUFU"))]


def test_launches_forbid_fused_multiply_adds(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(op, "dequantize_int8_kernel", launches)
    monkeypatch.setattr(op, "choose", lambda *_: "triton")
    dequantize_int8(WEIGHT, torch.empty(6, 64))
    assert [options["enable_fp_fusion"] for _, options in launches] == [False]


MUTANTS = [
    ("x * (129 / 16384) + x * (1 / (127 * 16384))", "x * (1 / 127)"),
    ("x * (129 / 16384) + x * (1 / (127 * 16384))", "x * (129 / 16384) + x * (1 / (128 * 16384))"),
    ("packed.to(tl.int8, bitcast=True)", "packed"),
    ("codebook_ptr + tl.arange(0, 256)", "codebook_ptr + (255 - tl.arange(0, 256))"),
    ("source // BLOCK_SIZE + block, inside", "first // BLOCK_SIZE + block, inside"),
    ("+ row * stride + column  # in the weight", "+ row * C + column  # in the weight"),
    ("row * C + column  # in out", "row * (C - 1) + column  # in out"),
    ("else block * BLOCK_SIZE < left", "else block * BLOCK_SIZE < left - BLOCK_SIZE"),
    ("else element < left", "else element < left - 1"),
    ("else element < left", "else element <= left"),
    ("BLOCK_SIZE) * absmax[:, None]", "BLOCK_SIZE) * absmax.to(tl.float16).to(tl.float32)[:, None]"),
]
TORCH_MUTANTS = [
    ("codes.float() / 127", "codes.float() / 128"),
    ("codes.float() / 127", "codes.float() * (1 / 127)"),
    (".view(torch.int8)\n", "\n"),
    ("numbers(weight).view(256, 1)", "numbers(weight).flip(0).view(256, 1)"),
]


def check(module, backend):
    with runtime.using(backend):
        for case in FEW:
            compare(module.dequantize_int8, dequantize_int8_ref, **case)


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_of_the_kernel_are_noticed(old, new):
    assert not survives(lambda module: check(module, "triton"), op, old, new)


@pytest.mark.parametrize("old, new", TORCH_MUTANTS)
def test_mutants_of_the_torch_path_are_noticed(old, new):
    assert not survives(lambda module: check(module, "torch"), op, old, new)


@on_gpu
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_grid_on_a_gpu(dtype, table):
    quantized.compare_the_grid(dequantize_int8, dequantize_int8_ref, dtype, 8, table)


@on_gpu
def test_a_hundred_launches_give_the_same_bits():
    weight = to(draw((4096, 4096), 64, True, 8), "cuda")
    outs = [torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    dequantize_int8(weight, outs[0])
    assert all(torch.equal(dequantize_int8(weight, outs[1]), outs[0]) for _ in range(100))
