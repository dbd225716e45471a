"""Planted faults in minift.quant and in the torch paths of its kernels, which the slow reference notices."""

from functools import cache

import numpy as np
import pytest
import quant_reference as slow
import torch
from mutants import mutate, survives
from quant_reference import BITS, NAMES, VALUES, new_memory_filled, same_bits

from minift.kernels import dequantize_4bit, dequantize_int8, quantize_4bit, quantize_int8, runtime
from minift.kernels.packed import Packed
from minift.quant import base, codebook, double_quant, int8


@cache
def cases():
    """(weight, block size): every shape of block, at scales that are powers of two and not, and at the
    smallest normal numbers; zeros; short last blocks of odd and even length."""
    rng, result = np.random.default_rng(5), []
    for i, rest in enumerate((0, 1, 18, 31)):
        for scale in (1, 1.7, 2.0**-126):
            sizes = [32] * (40 if scale == 1.7 else 10) + [rest] * (rest > 0)
            parts = [slow.fill(slow.SHAPES[j % 8], size, rng) * scale for j, size in enumerate(sizes)]
            parts[1] = np.zeros(32)
            w = torch.from_numpy(np.concatenate(parts)).float()
            result.append((w.to([torch.float32, torch.bfloat16][i % 2]), 32))
    short = [slow.fill("edges", 63, rng) * scale for scale in (1, *np.linspace(1, 2, 40))]
    return [*result, *((torch.from_numpy(part).float(), 64) for part in short)]


@cache
def expected(name):
    """(weight, block size, codes, packed, absmax), by the slow reference."""
    rows = [(w, size, *slow.quantize(name, w.float().numpy(), size)) for w, size in cases()]
    return [(w, size, codes, slow.pack(name, codes), absmax) for w, size, codes, absmax in rows]


def check_quantize(name, quantize):
    for w, block_size, _, packed, absmax in expected(name):
        got = quantize(w, block_size)
        assert same_bits(got[1], absmax) and same_bits(got[0], packed)


def with_small_chunks(module, check, *names):
    """The check with the module's own chunks and with tiny ones."""
    check()
    before = [getattr(module, name) for name in names]
    try:
        for name in names:
            setattr(module, name, 64)
        check()
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(module, name, value)


def assert_refused(error, start, call, *args):
    try:
        call(*args)
    except error as found:
        assert str(found).startswith(start)
    else:
        raise AssertionError(f"{args} are accepted")


def check_that_only_finite_numbers_are_quantized(format, error):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for at in (3, 39):
            w = torch.ones(40)
            w[at] = bad
            assert_refused(error, "", format.quantize, w, 32)


def check_base(module):
    for name in ("nf4", "fp4"):
        format = module.Format(name, 4, tuple(VALUES[name].tolist()))
        check_quantize(name, format.quantize)
        check_that_only_finite_numbers_are_quantized(format, module.NotFinite)
        assert abs(format.bound - slow.BOUND[name]) <= 2**-23
        w, size, codes, packed, absmax = expected(name)[0]
        stored = as_packed(name, w, size, packed, absmax)
        second = slow.dequantize(name, codes, absmax, size)[size : 2 * size]
        assert same_bits(format.dequantize(stored, torch.empty(size), size), second)
    for n, bits in ((1, 4), (63, 4), (64 * 256, 4), (64 * 256 + 1, 4), (64 * 600 + 5, 8)):
        format, B = module.Format("any", bits, (0.0,) * 2**bits), -(-n // 64)
        codes = -(-n * bits // 8)
        assert format.bytes((n,), 64, double_quant=False) == codes + 4 * B
        assert format.bytes((n,), 64, double_quant=True) == codes + B + 4 * -(-B // 256) + 4
    assert_refused(
        ValueError, "block_size is 48; supported: 32, 64, ", module.Layout, format, (4,), 48, False
    )


def check_quantize_4bit(module):
    crowded = np.array([0, 1e-4, 2e-4, *np.linspace(0.1, 1, 13)], dtype=np.float32)[::-1].copy()
    middle = (crowded[:-1] + crowded[1:]) / np.float32(2)
    s = np.concatenate((crowded, middle, np.nextafter(middle, np.float32(2)), [np.float32(1)]))
    codes = 15 - slow.rank(s, crowded[::-1])
    codes = np.append(codes, 15).astype(np.uint8)  # the code of zero, after 47

    def check():
        for name in ("nf4", "fp4"):
            table = torch.from_numpy(VALUES[name])
            check_quantize(name, lambda w, size, table=table: module.quantize_4bit(w, table, size))
        packed, absmax = module.quantize_4bit(torch.from_numpy(s), torch.from_numpy(crowded), 64)
        assert absmax.tolist() == [1] and same_bits(packed, 16 * codes[0::2] + codes[1::2])

    with runtime.using("torch"):
        with_small_chunks(module, check, "CHUNK")


def check_quantize_int8(module):
    with runtime.using("torch"):
        with_small_chunks(module, lambda: check_quantize("int8", module.quantize_int8), "CHUNK")


def as_packed(name, w, block_size, packed, absmax):
    table = None if name == "int8" else torch.from_numpy(VALUES[name])
    return Packed(torch.from_numpy(packed), torch.from_numpy(absmax), table, w.shape, block_size)


def check_decoding(name, decode):
    for w, block_size, codes, packed, absmax in expected(name):
        weight = as_packed(name, w, block_size, packed, absmax)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full(w.shape, float("nan"), dtype=dtype)
            assert decode(weight, out) is out
            assert same_bits(out, slow.dequantize(name, codes, absmax, block_size, dtype))


def check_dequantize_4bit(module):
    """Both ways of `dequantize_torch`: a byte is two numbers or, as dequantize_int8 calls it, one."""

    def one(weight, out, name):
        return module.dequantize_torch(weight, torch.from_numpy(VALUES[name]).view(256, 1), out, 0, 0)

    def check():
        for name in NAMES:
            eight = lambda weight, out, name=name: one(weight, out, name)  # noqa: E731
            check_decoding(name, module.dequantize_4bit if BITS[name] == 4 else eight)

    with runtime.using("torch"):
        with_small_chunks(module, check, "CHUNK", "ROW")


def check_dequantize_int8(module):
    with runtime.using("torch"):
        for name in ("int8", "int8_dynamic"):
            check_decoding(name, module.dequantize_int8)


def check_int8(module):
    def check():
        for format in (module.INT8_FORMAT, module.INT8_DYNAMIC):
            check_quantize(format.name, format.quantize)
            check_that_only_finite_numbers_are_quantized(format, base.NotFinite)
            assert abs(format.bound - slow.BOUND[format.name]) <= 2**-23

    with_small_chunks(module, check, "CHUNK")


def check_double_quant(module):
    g = torch.Generator().manual_seed(5)
    for n in (1, 255, 600):
        absmax = 3 + torch.rand(n, generator=g)
        codes, nested_absmax, offset = module.quantize_absmax(absmax)
        # n fp32 roundings, as in test_double_quant.py
        assert (offset.double() - absmax.double().mean()).abs() <= n * 2**-24 * 4
        expected = slow.quantize_absmax((absmax - offset).numpy())
        assert same_bits(codes, expected[0]) and same_bits(nested_absmax, expected[1])
        products = VALUES["int8_dynamic"][expected[0]] * expected[1].repeat(256)[:n]
        assert same_bits(module.dequantize_absmax(codes, nested_absmax, offset), products + offset.numpy())
    assert_refused(
        ValueError, "the mean of absmax overflows fp32", module.quantize_absmax, torch.full((4,), 3e38)
    )


def check_codebook(module):
    tables = {"nf4": module.NF4, "fp4": module.FP4, "int8": module.INT8, "int8_dynamic": module.dynamic_map()}
    for name, table in tables.items():
        assert same_bits(torch.tensor(table, dtype=torch.float32), VALUES[name])


CHECKS = {
    base: check_base,
    quantize_4bit: check_quantize_4bit,
    quantize_int8: check_quantize_int8,
    dequantize_4bit: check_dequantize_4bit,
    dequantize_int8: check_dequantize_int8,
    int8: check_int8,
    double_quant: check_double_quant,
    codebook: check_codebook,
}

ROWS = "(ROW, weight.block_size, flat.numel() % weight.block_size)"
SCALE = "scale = absmax[start : start + rows, :, None]"
BEFORE_STEPS = "step = ((scaled.clamp_(-1, 1)"
DIVIDED = "if part.numel() % block_size:\n                scaled[-1] = blocks[-1] / largest[-1]\n            "

MUTANTS = [
    (base, "not torch.isfinite(absmax).all()", "torch.isnan(absmax).any()"),
    (base, "dequantize_int8)(packed, out, first)", "dequantize_int8)(packed, out)"),
    (base, "(b - a) / 2 for", "(b - a) for"),
    (base, "groups = -(-self.blocks // NESTED_BLOCK)", "groups = self.blocks // NESTED_BLOCK"),
    (base, '"absmax": 4 * self.blocks', '"absmax": 2 * self.blocks'),
    (base, "self.block_size not in BLOCK_SIZES", "self.block_size % 16"),
    (quantize_4bit, "(scaled > midpoint", "(scaled >= midpoint"),
    (quantize_4bit, "codes[:, 1], codes[:, 0], alpha", "codes[:, 0], codes[:, 1], alpha"),
    (quantize_4bit, "blocks[-1] / divisor[-1]", "blocks[-1] * (1 / divisor[-1])"),
    (quantize_4bit, "scaled = blocks * (1 / divisor)", "scaled = blocks / divisor"),
    (quantize_4bit, "scales.numel()] = scales", "scales.numel()] = scales.bfloat16()"),
    (quantize_4bit, "absmax < TINY", "absmax <= TINY"),
    (quantize_4bit, "absmax < TINY", "absmax < 0"),
    (quantize_4bit, "blocks.abs().amax(dim=1)", "blocks.amax(dim=1)"),
    (quantize_4bit, "F.pad(scaled, (0, 1))", "F.pad(scaled, (0, 1), value=1)"),
    (quantize_4bit, "range(0, w.numel(), CHUNK)", "range(0, w.numel() - 1, CHUNK)"),
    (quantize_4bit, "w[start : start + CHUNK]", "w[start : start + CHUNK - block_size]"),
    (quantize_4bit, "device=w.device), cells)", "device=w.device), cells, right=True)"),
    (quantize_4bit, "order.index_select", "order.flip(0).index_select"),
    (quantize_4bit, "(values[:-1] + values[1:]) / 2", "values[:-1] * 0.501 + values[1:] * 0.499"),
    (quantize_4bit, "(cells.diff() < 1).any()", "(cells.diff() < 0).any()"),
    (
        quantize_4bit,
        "rank = torch.bucketize(scaled, midpoints)",
        "rank = torch.bucketize(scaled, midpoints, right=True)",
    ),
    (quantize_int8, "* 127).round()", "* 127).floor()"),
    (quantize_int8, "* 127).round()", "* 127 + 0.5).floor()"),
    (quantize_int8, "* 127).round()", "* 126).round()"),
    (quantize_int8, "part[1].numel()] = part[1]", "part[1].numel()] = part[1].bfloat16()"),
    (quantize_int8, "range(0, n, CHUNK)", "range(0, n - 1, CHUNK)"),
    (quantize_int8, "w[start : start + CHUNK]", "w[start : start + CHUNK - block_size]"),
    (
        dequantize_4bit,
        "torch.cartesian_prod(weight.codebook, weight.codebook)",
        "torch.cartesian_prod(weight.codebook, weight.codebook).flip(1).contiguous()",
    ),
    (dequantize_4bit, "slab(weight.absmax, R", "slab(weight.absmax.roll(1), R"),
    (dequantize_4bit, SCALE, SCALE.replace("absmax", "absmax.bfloat16()")),
    (
        dequantize_4bit,
        "torch.mul(values, scale, out=target)",
        "torch.mul(values, scale, out=target).add_(0.01)",
    ),
    (dequantize_4bit, "target.copy_(values.mul_(scale))", "target.copy_(values.to(out.dtype).mul_(scale))"),
    (dequantize_4bit, ROWS, "(ROW, weight.block_size)"),
    (dequantize_4bit, ROWS, "(ROW, flat.numel() % weight.block_size)"),
    (dequantize_4bit, "first // per_byte, stride", "first // 2, stride"),
    (dequantize_4bit, "index[:rows].copy_(codes[start : start + rows])", "index[:rows].copy_(codes[:rows])"),
    (dequantize_4bit, SCALE, "scale = absmax[:rows, :, None]"),
    (dequantize_4bit, "target = out[start : start + rows]", "target = out[:rows]"),
    (dequantize_int8, "codes.float() / 127", "codes.float() * (1 / 127)"),
    (dequantize_int8, "codes.float() / 127", "codes.float() / 128"),
    (dequantize_int8, "device=weight.packed.device).view(torch.int8)", "device=weight.packed.device)"),
    (int8, "blocks.abs().amax(dim=1)", "blocks.amax(dim=1)"),
    (int8, "largest < TINY", "largest <= TINY"),
    (int8, "largest < TINY", "largest < 0"),
    (int8, "len(largest)] = largest", "len(largest)] = largest.bfloat16()"),
    (int8, "range(0, flat.numel(), CHUNK)", "range(0, flat.numel() - 1, CHUNK)"),
    (int8, "part = flat[start : start + CHUNK]", "part = flat[start : start + CHUNK - block_size]"),
    (int8, ".int().clamp_(0, STEPS)", ".int()"),
    (int8, "0.5 * STEPS + 0.5)", "0.5 * STEPS)"),
    (int8, BEFORE_STEPS, DIVIDED + BEFORE_STEPS),
    (int8, "self.codebook.index(0.0))", "0)"),
    (int8, "STEPS = 65535", "STEPS = 65536"),
    (int8, "(values[:-1] + values[1:]) / 2)", "values[1:])"),
    (int8, "return super().bound + 1 / STEPS", "return super().bound"),
    (double_quant, "offset = absmax.mean()", "offset = absmax.median()"),
    (double_quant, "quantize(absmax - offset,", "quantize(absmax,"),
    (double_quant, "absmax - offset, NESTED_BLOCK)", "absmax - offset, 128)"),
    (double_quant, "absmax).add_(\n        offset\n    )", "absmax)"),
    (double_quant, "not torch.isfinite(offset)", "torch.isnan(offset)"),
    (codebook, "    -1.0,", "    -0.99,"),
    (codebook, "0.07958029955625534", "0.07958031"),
    (codebook, "8.0, 12.0, 4.0, 6.0", "12.0, 8.0, 4.0, 6.0"),
    (codebook, "code if code < 128 else", "code if code < 127 else"),
    (codebook, "torch.linspace(0.1, 1, 2**i + 1", "torch.linspace(0, 1, 2**i + 1"),
]


@pytest.fixture(autouse=True)
def filled():
    with new_memory_filled():
        yield


@pytest.mark.parametrize("module", CHECKS, ids=lambda m: m.__name__)
def test_the_check_passes_on_the_module_and_on_its_copy(module):
    CHECKS[module](module)
    CHECKS[module](mutate(module, "import torch\n", "import torch\n"))


@pytest.mark.parametrize("module, old, new", MUTANTS)
def test_mutants_are_noticed(module, old, new):
    mutate(module, old, new)  # that the text occurs once
    assert not survives(CHECKS[module], module, old, new)
