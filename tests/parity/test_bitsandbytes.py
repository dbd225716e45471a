"""Quantization beside bitsandbytes: the same bits, on 1,200 weights at 4 bits and 360 at 8."""

import pytest
import torch

from minift.quant import FORMATS, quantize_weight

bitsandbytes = pytest.importorskip("bitsandbytes")
F = bitsandbytes.functional
pytestmark = pytest.mark.parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
KINDS = ("normal", "integers", "sparse", "tiny", "heavy", "constant", "midpoints")
FOUR_BIT_CASES = 200  # for each of two formats and three dtypes
EIGHT_BIT_CASES = 120  # for each dtype
TINY = torch.finfo(torch.float32).tiny


pytestmark = pytest.mark.usefixtures("eager")


def pick(options, g):
    return options[torch.randint(len(options), (), generator=g).item()]


def between(low, high, g):
    return torch.randint(low, high + 1, (), generator=g).item()


def random_shape(block, g):
    """Vectors and matrices of odd and even sizes, whole blocks in a row, and more than 256 blocks."""
    kind = between(0, 9, g)
    if kind < 3:
        return (between(1, 5000, g),)
    if kind < 6:
        return between(1, 60, g), between(1, 200, g)
    if kind < 9:
        return between(1, 6, g), block * between(1, max(1, 1024 // block), g)
    return 201, 32 * between(1, 20, g) + between(0, 1, g)


def random_weight(kind, shape, dtype, block, format, g):
    w = torch.randn(shape, generator=g)
    if kind == "integers":  # ties
        w = torch.randint(-12, 13, shape, generator=g).float()
    if kind == "sparse":
        w *= torch.rand(shape, generator=g) < 0.02
    if kind == "tiny":
        w *= 1e-30 if dtype != torch.float16 else 1e-6
    if kind == "heavy":
        w = (w.sign() * (8 * torch.randn(shape, generator=g)).exp()).clamp(-6e4, 6e4)
    if kind == "constant":
        w = w.flatten()[:1].expand(w.numel()).reshape(shape).clone()
    if kind == "midpoints":  # exact ties in fp32, and their neighbours
        values = format.values("cpu").sort().values
        middle = (values[1:] + values[:-1]) / 2
        middle = torch.cat((middle, middle.nextafter(values[1:]), middle.nextafter(values[:-1])))
        w = middle[torch.randint(len(middle), shape, generator=g)]
        w.view(-1)[::block] = 1
        w *= 2.0 ** between(-8, 8, g)
    w = w.to(dtype)
    if not w.any():
        w.view(-1)[0] = 1
    return w


def cases(format, dtype, count):
    """(weight, block size, nested), the same on every run."""
    g = torch.Generator().manual_seed(DTYPES.index(dtype))
    for i in range(count):
        block, nested = pick(BLOCK_SIZES, g), i % 2 == 1
        kind = KINDS[i % len(KINDS)]
        yield random_weight(kind, random_shape(block, g), dtype, block, format, g), block, nested


def same(a, b):
    a, b = a.reshape(-1), b.reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def formula(q, dtype):
    """codebook[code] * absmax in fp32, rounded once."""
    codes = (
        torch.stack((q.packed >> 4, q.packed & 15), dim=1).view(-1) if q.layout.format.bits == 4 else q.packed
    )
    values = q.layout.format.values("cpu")[codes[: q.layout.n].long()]
    scales = q.scales().repeat_interleave(q.layout.block_size)[: q.layout.n]
    return (values * scales).to(dtype).view(q.shape)


def ends_in_zeros(w, block):
    """The last block is short and has nothing in it."""
    short = w.numel() % block
    return short > 0 and not w.reshape(-1)[-short:].any()


def dequantizes_right(shape, block):
    """bitsandbytes 0.50.2 on AVX-512 takes absmax of other blocks where blocks straddle rows."""
    return len(shape) == 1 or shape[0] == 1 or shape[-1] % 2 or shape[-1] % block == 0


def assert_same_scales(q, state, w):
    """absmax and, where nested, its own absmax and offset."""
    if state.nested:
        assert same(q.absmax, state.absmax)
        assert same(q.nested_absmax, state.state2.absmax) and same(q.offset, state.offset)
        return
    theirs = state.absmax.clone()
    if ends_in_zeros(w, q.layout.block_size):  # theirs is 1e-38 there, for want of 1/0; ours is 0
        assert theirs[-1] == torch.tensor(1e-38) and q.absmax[-1] == 0
        theirs[-1] = 0
    assert same(q.absmax, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_are_those_of_bitsandbytes_bit_for_bit(kind, dtype):
    counted = compared = zeros = 0
    for w, block, nested in cases(FORMATS[kind], dtype, FOUR_BIT_CASES):
        packed, state = F.quantize_4bit(w, blocksize=block, compress_statistics=nested, quant_type=kind)
        q = quantize_weight(w, kind, block, nested)
        assert same(q.packed, packed), (w.shape, block)
        assert_same_scales(q, state, w)
        direct = dequantizes_right(w.shape, block)
        for target in DTYPES:
            ours = q.dequantize(target)
            assert ours.shape == w.shape and same(ours, formula(q, target))
            state.dtype = target
            theirs = F.dequantize_4bit(packed, state).view(w.shape)
            equal = same if kind == "nf4" else torch.equal  # which holds -0 and 0 for equal
            assert not direct or equal(ours, theirs), (w.shape, block, target)
        counted, compared, zeros = counted + 1, compared + bool(direct), zeros + ends_in_zeros(w, block)
    assert counted == FOUR_BIT_CASES and compared > FOUR_BIT_CASES / 2 and zeros > 0


def in_blocks_of_zeros(flat, block):
    """Where bitsandbytes stores code 0, the value -0.993, and ours the code of zero."""
    largest = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block).abs().amax(1)
    return (largest < torch.finfo(torch.float32).tiny).repeat_interleave(block)[: len(flat)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_eight_bit_weights_are_those_of_bitsandbytes_bit_for_bit(dtype):
    counted = 0
    for w, block, nested in cases(FORMATS["int8_dynamic"], dtype, EIGHT_BIT_CASES):
        nested = nested and block == 256  # theirs nests blocks of the outer size
        codes, state = F.quantize_blockwise(w, blocksize=block, nested=nested)
        q = quantize_weight(w, "int8_dynamic", block, nested)
        empty = in_blocks_of_zeros(w.float().reshape(-1), block)
        assert (codes.view(-1)[empty] == 0).all() and (q.packed[empty] == 127).all()  # the one exception
        assert same(q.packed[~empty], codes.view(-1)[~empty]), (w.shape, block)
        assert same(q.absmax, state.absmax)
        assert not nested or (same(q.nested_absmax, state.state2.absmax) and same(q.offset, state.offset))
        for target in DTYPES:
            state.dtype = target
            ours = q.dequantize(target)
            theirs = F.dequantize_blockwise(codes, state)
            assert same(ours, formula(q, target)) and (ours.view(-1)[empty] == 0).all()
            assert same(ours.view(-1)[~empty], theirs.view(-1)[~empty])
        counted += 1
    assert counted == EIGHT_BIT_CASES


def test_the_codebooks_are_those_of_bitsandbytes():
    for kind in ("nf4", "fp4"):
        assert same(FORMATS[kind].values("cpu"), F.get_4bit_type(kind, device="cpu"))
    assert same(FORMATS["int8_dynamic"].values("cpu"), F.create_dynamic_map())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 1000])
def test_a_short_block_of_zeros_differs_in_its_scale_alone(kind, n):
    w = torch.zeros(n)
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type=kind)
    q = quantize_weight(w, kind, 64, False)
    assert same(q.packed, packed)
    assert not q.absmax.any() and not state.absmax[: n // 64].any()
    assert n % 64 == 0 or state.absmax[-1] == torch.tensor(1e-38)
    assert same(q.dequantize(), torch.zeros(n)) and same(F.dequantize_4bit(packed, state), torch.zeros(n))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_below_the_smallest_normal_number_are_zeros_here_and_subnormal_there(kind):
    w = torch.randn(4, 64)
    w[1] = w[1].clamp(-1, 1) * (TINY / 4)
    w[2] = w[2].clamp(-1, 1) * TINY
    w[2, 0] = TINY  # the smallest that is kept
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type=kind)
    q = quantize_weight(w, kind, 64, False)
    assert q.absmax[1] == 0 and 0 < state.absmax[1] < TINY
    assert same(q.absmax[[0, 2, 3]], state.absmax[[0, 2, 3]])
    ours, theirs = q.packed.view(4, 32), packed.view(4, 32)
    assert same(ours[[0, 2, 3]], theirs[[0, 2, 3]])
    assert (ours[1] == quantize_weight(torch.zeros(64), kind, 64, False).packed).all()
    difference = (q.dequantize() - F.dequantize_4bit(packed, state)).abs()
    assert not difference[[0, 2, 3]].any() and difference[1].max() < TINY


def test_minus_zero_of_fp4_is_zero_here_and_keeps_its_sign_in_their_scalar_loop():
    w = torch.ones(34)
    w[1::3] = 1e-4
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type="fp4")
    q = quantize_weight(w, "fp4", 64, False)
    assert same(q.packed, packed) and (packed.view(-1)[0] & 15) == 8
    ours, theirs = q.dequantize(), F.dequantize_4bit(packed, state).view(-1)
    assert torch.equal(ours, theirs) and not ours[1::3].signbit().any() and theirs[1::3].signbit().all()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="their AVX-512 code")
def test_bitsandbytes_still_dequantizes_blocks_that_straddle_rows_wrongly():
    w = torch.randn(64, 96)
    packed, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4")
    q = quantize_weight(w, "nf4", 64, False)
    theirs = F.dequantize_4bit(packed, state)
    assert same(q.packed, packed) and same(q.absmax, state.absmax)
    assert same(q.dequantize(), formula(q, torch.float32))
    assert (theirs - w).abs().max() > 2 * (q.dequantize() - w).abs().max(), "mended: compare with theirs"
