"""Planted faults in minift.quant, each of which the checks against the slow reference notice."""

from functools import cache

import numpy as np
import pytest
import quant_reference as slow
import torch
from mutants import mutate, survives
from quant_reference import NAMES, VALUES, same_bits

from minift.quant import base, blocks, codebook, double_quant, int8
from minift.quant.weight import FORMATS


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


def check_quantize(format):
    for w, block_size in cases():
        packed, absmax = format.quantize(w, block_size)
        codes, expected = slow.quantize(format.name, w.float().numpy(), block_size)
        assert same_bits(absmax, expected) and same_bits(packed, slow.pack(format.name, codes))


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


def check_base(module):
    for name in ("nf4", "fp4"):
        format = module.Format(name, 4, tuple(VALUES[name].tolist()))
        with_small_chunks(module, lambda format=format: check_quantize(format), "CHUNK")
        byte = np.arange(256)
        assert same_bits(format.lookup("cpu"), VALUES[name][np.stack((byte // 16, byte % 16), 1)])
        assert abs(format.bound - slow.BOUND[name]) <= 2**-23
    for n, bits in ((1, 4), (63, 4), (64 * 256, 4), (64 * 256 + 1, 4), (64 * 600 + 5, 8)):
        format, B = module.Format("any", bits, (0.0,) * 2**bits), -(-n // 64)
        codes = -(-n * bits // 8)
        assert format.bytes((n,), 64, double_quant=False) == codes + 4 * B
        assert format.bytes((n,), 64, double_quant=True) == codes + B + 4 * -(-B // 256) + 4
    try:
        module.Layout(format, (4,), 48, False)
    except ValueError as error:
        assert str(error).startswith("block_size is 48; supported: 32, 64, ")
    else:
        raise AssertionError("a block size of 48 is accepted")


def check_blocks(module):
    def check():
        for name in NAMES:
            for w, block_size in cases():
                codes, absmax = slow.quantize(name, w.float().numpy(), block_size)
                packed = torch.from_numpy(slow.pack(name, codes))
                for dtype in (torch.float32, torch.bfloat16):
                    out = torch.full(w.shape, float("nan"), dtype=dtype)
                    result = module.decode_flat(
                        packed, torch.from_numpy(absmax), FORMATS[name], block_size, out
                    )
                    assert result is out
                    assert same_bits(out, slow.dequantize(name, codes, absmax, block_size, dtype))

    with_small_chunks(module, check, "CHUNK", "ROW")


def check_int8(module):
    for format in (module.INT8_FORMAT, module.INT8_DYNAMIC):
        check_quantize(format)
        assert abs(format.bound - slow.BOUND[format.name]) <= 2**-23


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
    try:
        module.quantize_absmax(torch.full((4,), 3e38))
    except ValueError as error:
        assert "overflows fp32" in str(error)
    else:
        raise AssertionError("a mean beyond fp32 is accepted")


def check_codebook(module):
    tables = {"nf4": module.NF4, "fp4": module.FP4, "int8": module.INT8, "int8_dynamic": module.dynamic_map()}
    for name, table in tables.items():
        assert same_bits(torch.tensor(table, dtype=torch.float32), VALUES[name])


CHECKS = {
    base: check_base,
    blocks: check_blocks,
    int8: check_int8,
    double_quant: check_double_quant,
    codebook: check_codebook,
}

MUTANTS = [
    (base, "(scaled > midpoint", "(scaled >= midpoint"),
    (base, "pairs[:, 1], pairs[:, 0], alpha", "pairs[:, 0], pairs[:, 1], alpha"),
    (base, "torch.stack((byte >> 4, byte & 15)", "torch.stack((byte & 15, byte >> 4)"),
    (base, "blocks / divisor if short", "blocks * (1 / divisor) if short"),
    (base, "else blocks * (1 / divisor)", "else blocks / divisor"),
    (base, "-(-stop // block_size)] = largest", "-(-stop // block_size)] = largest.bfloat16()"),
    (base, "largest < TINY", "largest <= TINY"),
    (base, "largest < TINY", "largest < 0"),
    (base, "blocks.abs().amax(dim=1)", "blocks.amax(dim=1)"),
    (base, "zero = self.codebook.index(0.0)", "zero = 15"),
    (base, "(whole, n)]", "(whole, n - 1)]"),
    (base, "(start, min(whole, start + step))", "(start, min(whole, start + step) - block_size)"),
    (base, "below[cell.long() + 1] = 1", "below[cell.long()] = 1"),
    (base, "index = order.index_select", "index = order.flip(0).index_select"),
    (
        base,
        "midpoints = (values[:-1] + values[1:]) / 2",
        "midpoints = values[:-1] * 0.501 + values[1:] * 0.499",
    ),
    (base, "(b - a) / 2 for", "(b - a) for"),
    (base, "groups = -(-self.blocks // NESTED_BLOCK_SIZE)", "groups = self.blocks // NESTED_BLOCK_SIZE"),
    (base, '"absmax": 4 * self.blocks', '"absmax": 2 * self.blocks'),
    (base, "self.block_size not in BLOCK_SIZES", "self.block_size % 16"),
    (blocks, "scales = absmax[start", "scales = absmax.roll(1)[start"),
    (blocks, "absmax[start:stop, :, None]", "absmax.bfloat16()[start:stop, :, None]"),
    (blocks, "torch.mul(values, scale, out=target)", "torch.mul(values, scale, out=target).add_(0.01)"),
    (blocks, "target.copy_(values.mul_(scale))", "target.copy_(values.to(out.dtype).mul_(scale))"),
    (blocks, "block_size, n % block_size):", "block_size):"),
    (blocks, "block_size, n % block_size):", "n % block_size):"),
    (blocks, "bytes_ = packed[start * format.bits // 8", "bytes_ = packed[start // 2"),
    (blocks, "index[:rows].copy_(packed[start:stop])", "index[:rows].copy_(packed[:rows])"),
    (blocks, "absmax[start:stop, :, None], out[start:stop]", "absmax[start:stop, :, None], out[:rows]"),
    (int8, "* 127).round()", "* 127).floor()"),
    (int8, "* 127).round()", "* 127 + 0.5).floor()"),
    (int8, "* 127).round()", "* 126).round()"),
    (int8, "0.5 * STEPS + 0.5)", "0.5 * STEPS)"),
    (int8, "absmax, short=False)", "absmax, short)"),
    (int8, "self.codebook.index(0.0))", "0)"),
    (int8, "STEPS = 65535", "STEPS = 65536"),
    (int8, "(values[:-1] + values[1:]) / 2)", "values[1:])"),
    (int8, "return super().bound + 1 / STEPS", "return super().bound"),
    (double_quant, "offset = absmax.mean()", "offset = absmax.median()"),
    (double_quant, "quantize(absmax - offset,", "quantize(absmax,"),
    (double_quant, "absmax - offset, NESTED_BLOCK_SIZE)", "absmax - offset, 128)"),
    (double_quant, ".add_(offset)", ""),
    (double_quant, "not torch.isfinite(offset)", "torch.isnan(offset)"),
    (codebook, "    -1.0,", "    -0.99,"),
    (codebook, "0.07958029955625534", "0.07958031"),
    (codebook, "8.0, 12.0, 4.0, 6.0", "12.0, 8.0, 4.0, 6.0"),
    (codebook, "code if code < 128 else", "code if code < 127 else"),
    (codebook, "torch.linspace(0.1, 1, 2**i + 1", "torch.linspace(0, 1, 2**i + 1"),
]


@pytest.mark.parametrize("module", CHECKS, ids=lambda m: m.__name__)
def test_the_check_passes_on_the_module_and_on_its_copy(module):
    CHECKS[module](module)
    CHECKS[module](mutate(module, "import torch", "import torch"))


@pytest.mark.parametrize("module, old, new", MUTANTS)
def test_mutants_are_noticed(module, old, new):
    mutate(module, old, new)  # that the text occurs once
    assert not survives(CHECKS[module], module, old, new)
