"""minift.kernels.quantize_4bit: bit for bit its reference, that one in numpy; machine code; mutants."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import Build, GPUTarget, compile_build
from mutants import survives
from quantized import Launches, on_gpu, same_bits, slow_quantize

from minift.kernels import quantize_4bit as op
from minift.kernels import runtime
from minift.kernels.dequantize_4bit import BLOCK_SIZES, DTYPES
from minift.kernels.quantize_4bit import quantize_4bit, quantize_4bit_ref
from minift.quant.weight import FORMATS

GUARD = 64
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
FP32, BF16, FP16 = DTYPES
TABLES = {name: FORMATS[name].values("cpu") for name in ("nf4", "fp4")}
EDGES = torch.cat([(v[:-1] + v[1:]) / 2 for v in (t.sort().values for t in TABLES.values())])
EDGES = torch.cat((EDGES, (torch.arange(-127, 127) + 0.5) / 127))  # of int8
KINDS = 11
# n, block size, dtype
CASES = [
    (1, 32, FP32),
    (31, 64, BF16),
    (32, 32, FP16),
    (33, 32, FP32),
    (63, 64, FP32),
    (64 * KINDS, 64, BF16),
    (65 * 63, 64, FP32),
    (127 * 33, 128, FP16),
    (1000, 256, BF16),
    (4096, 32, FP32),  # one whole tile
    (8192, 512, FP16),
    (4096 + 1024, 1024, FP32),
    (2 * 4096 + 1, 2048, BF16),
    (4096, 4096, FP32),
    (4097, 4096, FP16),
    (11008, 32, FP32),
    (12288, 64, BF16),
    (5 * 1000, 4096, FP32),
]


def block(kind, size, g, dtype):
    """One block, `kind` from 0 to KINDS - 1."""
    w, limits = torch.randn(size, generator=g), torch.finfo(dtype)
    scale = torch.rand(1, generator=g) + 1
    if kind == 0:
        return w * 0
    if kind == 1:
        return torch.full((size,), -0.3)
    if kind == 2:
        return torch.where(torch.arange(size) % 2 == 0, 1.7, -1.7)
    if kind == 3:
        w[size // 2] = 1e4
    if kind == 4:
        w[0] = -9.0  # absmax comes first and is negative
    if kind == 5:
        w[-1] = 9.0
    if kind == 6:
        return w.clamp(-1, 1) * limits.max
    if kind == 7:
        return w.clamp(-1, 1) * 2.0**-126  # at the limit to blocks of zeros, with subnormal numbers
    if kind == 8:
        return w.clamp(-1, 1) * 2.0**-128
    if kind == 9:
        w = w * torch.exp2(10 * torch.randn(size, generator=g)).clamp(2.0**-12, 2.0**12)  # heavy tails
    if kind == 10:
        w = EDGES[torch.randint(len(EDGES), (size,), generator=g)] * scale  # on the midpoints, up to rounding
        w[0] = scale
    return w


def draw(n, block_size, dtype, kinds=range(KINDS)):
    """n elements, each block of the next kind."""
    g, kinds = torch.Generator().manual_seed(n + block_size), list(kinds)
    blocks = [block(kinds[i % len(kinds)], block_size, g, dtype) for i in range(-(-n // block_size))]
    w = torch.cat(blocks)[:n].to(dtype)
    if runtime.INTERPRETED and dtype == BF16:  # whose subnormal numbers the interpreter misreads
        w[w.abs() < torch.finfo(BF16).tiny] = 0
    return w


@contextmanager
def guarded():
    """Within, torch.empty gives the middle of a larger buffer, around which nothing may be written."""
    real, made = torch.empty, []

    def empty(n, dtype, device):
        buffer = torch.full((n + 2 * GUARD,), 77, dtype=dtype, device=device)
        made.append((buffer, n))
        return buffer[GUARD : GUARD + n]

    with mock.patch.object(torch, "empty", empty):
        yield
    assert torch.empty is real and len(made) == 2
    for buffer, n in made:
        assert (buffer[:GUARD] == 77).all() and (buffer[GUARD + n :] == 77).all()


def compare(call, want, w, *args, device="cpu", offset=0):
    """A call gives the bits of `want`, of w as it is and in a place that 16 bytes do not divide."""
    buffer = torch.full((w.numel() + 16,), 7.0, dtype=w.dtype, device=device)
    there = buffer[offset : offset + w.numel()].copy_(w)
    with guarded():
        got = call(there, *args)
    assert all(same_bits(a.cpu(), b) for a, b in zip(got, want, strict=True))
    assert same_bits(there.cpu(), w)


@pytest.mark.triton
@pytest.mark.parametrize("n, block_size, dtype", CASES)
@pytest.mark.parametrize("name", TABLES)
def test_the_kernel_gives_the_bits_of_the_reference(name, n, block_size, dtype, device):
    w, table = draw(n, block_size, dtype), TABLES[name]
    want = quantize_4bit_ref(w, table, block_size)
    compare(quantize_4bit, want, w, table.to(device), block_size, device=device, offset=n % 2)


@pytest.mark.parametrize("chunk", [op.CHUNK, 4096])
@pytest.mark.parametrize("name", TABLES)
def test_the_reference_and_torch_give_the_bits_of_the_slow_reference(name, chunk, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", chunk)
    for n, block_size, dtype in CASES:
        w = draw(n, block_size, dtype)
        want = slow_quantize(name, w, block_size)
        got = quantize_4bit_ref(w, TABLES[name], block_size)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        with runtime.using("torch"):
            compare(quantize_4bit, want, w, TABLES[name], block_size, offset=1)


@given(st.permutations(range(16)), st.booleans(), st.integers(1, 300), st.sampled_from([32, 64]))
def test_any_table_in_any_order(order, close, n, block_size):
    """`close`: two midpoints in one cell, where torch has to search."""
    values = torch.linspace(-1, 1, 15)
    values = torch.cat((values, values[3:4] + (1e-5 if close else 0.01)))[order]
    w = draw(n, block_size, FP32)
    with runtime.using("torch"):
        compare(quantize_4bit, quantize_4bit_ref(w, values, block_size), w, values, block_size)
    packed, absmax = quantize_4bit_ref(w, values, block_size)
    codes = torch.stack((packed >> 4, packed & 15), 1).view(-1)[:n].int()
    scale = absmax.double().repeat_interleave(block_size)[:n]
    off = (w.double() - values.double()[codes] * scale).abs()
    nearest = (w.double()[:, None] - values.double() * scale[:, None]).abs().amin(1)
    # w / absmax has two roundings and a midpoint one, 3 * 2^-24 on either side; above 2^126 the reciprocal is
    # subnormal and 2^-150 off, times w < 2^128; blocks below 2^-126 are zeros
    slack = torch.where(scale > 2.0**126, 2 * 2.0**-22, 0.0) + 6 * 2.0**-24
    assert (off <= nearest + slack * scale + 2.0**-126).all()


@pytest.mark.triton
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_makes_the_absmax_of_its_block_so(dtype, bad, device):
    w = draw(200, 64, dtype, [3, 9])
    packed, absmax = quantize_4bit_ref(w, TABLES["nf4"], 64)
    for at in (64, 100, 127, 199):
        broken = w.clone()
        broken[at] = bad
        for call in (quantize_4bit_ref, quantize_4bit):
            got, scales = (x.cpu() for x in call(broken.to(device), TABLES["nf4"].to(device), 64))
            assert not torch.isfinite(scales[at // 64])
            others, nibbles = torch.arange(4) != at // 64, torch.arange(100) // 32 != at // 64
            assert torch.equal(scales[others], absmax[others]) and torch.equal(got[nibbles], packed[nibbles])


@pytest.mark.triton
def test_nothing_is_made_of_nothing(device):
    for backend in ("auto", "torch"):
        with runtime.using(backend):
            made = quantize_4bit(torch.empty(0, device=device), TABLES["nf4"].to(device), 64)
            assert [x.shape for x in made] == [(0,), (0,)]


W = torch.ones(64)
WRONG = [
    ({"w": W.view(8, 8)}, r"w is torch.float32 \(8, 8\) on cpu; it must be flat, contiguous"),
    ({"w": W[::2]}, "w is .* not contiguous; it must be flat"),
    ({"w": W[:1].expand(64)}, "w is .* not contiguous; it must be flat"),
    ({"w": W.double()}, "w is torch.float64"),
    ({"w": W.int()}, "w is torch.int32 .* fp32, bf16 or fp16"),
    ({"block_size": 48}, "block_size is 48; supported: 32, 64, "),
    (
        {"codebook": torch.ones(15)},
        r"codebook is torch.float32 \(15,\) on cpu; it must be torch.float32 \(16,\)",
    ),
    ({"codebook": torch.ones(16).half()}, "codebook is torch.float16"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_what_is_not_as_it_should_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match="quantize_4bit: .*" + message):
        quantize_4bit(**{"w": W, "codebook": TABLES["nf4"], "block_size": 64, **arguments})


def build(name, kernel, dtype, budget, promises, **constants):
    """A launch with 32 elements for each thread."""
    pointers = {"w_ptr": "*" + dtype, "midpoints_ptr": "*fp32", "order_ptr": "*u8"}
    signature = {**pointers, "packed_ptr": "*u8", "absmax_ptr": "*fp32", "n": "i32"}
    signature = {name: kind for name, kind in signature.items() if name in kernel.arg_names}
    wide = {"VECTOR": 4 if dtype == "fp32" else 8, "BLOCK_SIZE": 64, "TILE": 4096, "EVEN": True}
    more = {"elements": 32, "budget": budget, "promises": promises, "options": {"enable_fp_fusion": False}}
    return Build(name, kernel, signature, {**wide, **constants}, aligned=tuple(signature), **more)


KERNEL, WIDE = op.quantize_4bit_kernel, ("LDG.E.128",)
BUILDS = [
    build("bf16", KERNEL, "bf16", 36, WIDE),
    build("fp32", KERNEL, "fp32", 38, WIDE),
    build("fp16, blocks of 4096", KERNEL, "fp16", 36, WIDE, BLOCK_SIZE=4096),
    build("bf16, short last tile", KERNEL, "bf16", None, WIDE, EVEN=False),
]


@pytest.mark.skipif(runtime.INTERPRETED, reason="kernels are interpreted in this process, not compiled")
def test_the_reciprocal_is_correctly_rounded():
    ptx = compile_build(BUILDS[0], GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "rcp.rn.f32" in ptx or "div.rn.f32" in ptx
    assert not [word for word in ("rcp.approx", "div.full", "div.approx", ".ftz") if word in ptx]


def test_launches_forbid_fused_multiply_adds(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(op, "quantize_4bit_kernel", launches)
    monkeypatch.setattr(op, "choose", lambda *_: "triton")
    quantize_4bit(W, TABLES["nf4"], 64)
    assert [(grid, options["enable_fp_fusion"]) for grid, options in launches] == [((1,), False)]


MUTANTS = [
    ("scaled > tl.gather", "scaled >= tl.gather"),
    ("below + (half - 1)", "below + half"),
    ("high << 4 | low", "low << 4 | high"),
    ("tl.where(bits < 0x00800000, 0, bits)", "tl.where(bits <= 0x00800000, 0, bits)"),
    ("tl.where(bits < 0x00800000, 0, bits)", "bits"),
    ("w.to(tl.int32, bitcast=True) & 0x7FFFFFFF", "w.to(tl.int32, bitcast=True)"),
    ("(tl.arange(0, BLOCKS) + 1) * BLOCK_SIZE <= left", "tl.arange(0, BLOCKS) * BLOCK_SIZE <= left"),
    ("tl.where(absmax == 0, float('inf'), absmax)".replace("'", '"'), "tl.where(absmax == 0, 1.0, absmax)"),
    ("w * tl.div_rn(1.0, divisor)", "tl.div_rn(w, divisor)"),
    ("tl.gather(tl.load(order_ptr + tl.arange(0, 16)).to(tl.int32), below, 0)", "below"),
    ("block * BLOCK_SIZE < left", "block * BLOCK_SIZE < left - 1"),
    ("block * BLOCK_SIZE < left", "block * BLOCK_SIZE <= left"),
    ("byte * 2 < left", "byte * 2 < left - 1"),
    ("byte * 2 < left", "byte * 2 <= left"),
    ("mask=element < left, other=0", "mask=element < left, other=1"),
]
TORCH_MUTANTS = [
    ("rank += (scaled > midpoint", "rank += (scaled >= midpoint"),
    ("alpha=16", "alpha=15"),
    ("absmax[absmax < TINY]", "absmax[absmax <= TINY]"),
    ("blocks[-1] / divisor[-1]", "blocks[-1] * (1 / divisor[-1])"),
    ("scaled = blocks * (1 / divisor)", "scaled = blocks / divisor"),
    ("(values[:-1] + values[1:]) / 2", "values[:-1] * 0.501 + values[1:] * 0.499"),
    ("rank if in_order else", "rank if True else"),
    ("blocks.abs().amax(dim=1)", "blocks.amax(dim=1)"),
    ('absmax.masked_fill(absmax == 0, float("inf"))', "absmax.masked_fill(absmax == 0, 1.0)"),
    ("device=w.device), cells)", "device=w.device), cells, right=True)"),
]


def check(module, backend):
    """All kinds of blocks; numbers on midpoints in whole blocks and in short ones, scaled in many ways."""
    weights = [draw(32 * KINDS + 1, 32, FP32), draw(95, 64, FP32, [9, 7]), torch.full((33,), 2.0**-126)]
    weights += [draw(n, 64, FP32, [10]) for n in (57, 59, 61, 62, 63, 128, 6013)]
    for name in TABLES:
        for w in weights:
            block_size = 32 if len(w) % 32 == 1 else 64
            with runtime.using(backend):
                want = quantize_4bit_ref(w, TABLES[name], block_size)
                compare(module.quantize_4bit, want, w, TABLES[name], block_size)


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
            for table in TABLES.values():
                want = quantize_4bit_ref(w, table, block_size)
                compare(quantize_4bit, want, w, table.cuda(), block_size, device="cuda", offset=n % 2)
