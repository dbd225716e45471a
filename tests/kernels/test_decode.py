"""minift.kernels.decode: the assembly in an emulator of its instructions, the rest as Triton runs it."""

from types import SimpleNamespace

import machine_code
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from ptx import DTYPES, emulate, to_16_bits

from minift.kernels import decode, runtime
from minift.kernels.decode import Config, decode_4bit, decode_int8, load_table, rounded
from minift.kernels.packed import Packed
from minift.kernels.runtime import tl, triton

NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379]
NF4 = np.array([*NF4, 0.4407, 0.5626, 0.723, 1], np.float32)


def table_words(table, dtype):
    """The registers $0 to $7 that `table_asm` makes of 16 fp32 numbers, one per lane."""
    registers = emulate(decode.table_asm(dtype), {8: 0}, memory=table)
    return [registers[f"${i}"] for i in range(8)]


def check_decode(module, table=NF4, dtype="bf16"):
    """All 65,536 half words, low and high: bit for bit, the first code in the high nibble."""
    words = emulate(module.table_asm(dtype), {8: 0}, memory=table)
    words = [words[f"${i}"] for i in range(8)]
    assert all((word == word[0]).all() for word in words)  # every lane has the same table
    half = np.arange(65536, dtype=np.uint32)
    word = half | (half * np.uint32(40503) & np.uint32(0xFFFF)) << np.uint32(16)
    inputs = {8: word, **{9 + i: word_[0] for i, word_ in enumerate(words)}}
    got = emulate(module.decode_asm(), inputs, lanes=65536)
    expected = to_16_bits(table, DTYPES[dtype])
    for i in range(8):
        code = word >> np.uint32(8 * (i // 2) + (4 if i % 2 == 0 else 0)) & np.uint32(15)
        assert (got[f"${i}"] == expected[code]).all(), i


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_byte_permutes_decode_every_half_word(dtype):
    check_decode(decode, NF4, dtype)


@given(st.lists(st.floats(width=32), min_size=16, max_size=16), st.sampled_from(sorted(DTYPES)))
def test_the_byte_permutes_decode_any_table(table, dtype):
    table = np.array(table, np.float32)
    table[np.isnan(table)] = np.nan  # the bits of a NaN are not promised
    words = table_words(table, dtype)
    numbers = to_16_bits(table, DTYPES[dtype])
    code = np.arange(16, dtype=np.uint32)
    got = emulate(decode.decode_asm(), {8: code, **{9 + i: w[0] for i, w in enumerate(words)}}, lanes=16)
    assert (got["$1"] == numbers[code]).all() and (got["$0"] == numbers[0]).all()


def check_int8(module):
    word = np.arange(65536, dtype=np.uint32) * np.uint32(0x9E3779B1)
    got = emulate(getattr(module.DECODE_INT8, "value", module.DECODE_INT8), {4: word}, lanes=65536)
    for i in range(4):
        byte = (word >> np.uint32(8 * i) & np.uint32(255)).astype(np.uint8)
        assert (got[f"${i}"].view(np.float32) == byte.view(np.int8)).all()
        assert len(np.unique(byte)) == 256


def test_bytes_are_decoded_as_two_s_complement():
    check_int8(decode)


MUTANTS = [
    (check_decode, "0x77777777", "0xffffffff"),
    (check_decode, "0x44444444", "0x4444444"),
    (check_decode, "0x32103210", "0x23103210"),
    (check_decode, "0x4051", "0x5140"),
    (check_decode, "0x6273", "0x7362"),
    (check_decode, "shr.u32 mix_high, mix, 16", "shr.u32 mix_high, mix, 12"),
    (check_decode, "prmt.b32 b, $15, $16, {select}", "prmt.b32 b, $16, $15, {select}"),
    (check_decode, "0xEA", "0xEE"),
    (check_decode, "next, value, 1, 31", "next, value, 2, 31"),
    (check_decode, "and.b32 base, lane, 16", "and.b32 base, lane, 8"),
    (check_decode, "0x6420", "0x7531 "),
    (check_decode, "pair, next, value", "pair, value, next"),
    (check_int8, "0x80808080", "0x80808000"),
    (check_int8, "0f4B000080", "0f4B000000"),
    (check_int8, "0x744{i}", "0x7440"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_of_the_assembly_are_noticed(check, old, new):
    assert not survives(check, decode, old, new)


# What runs in the interpreter, and elsewhere with DECODE "gather".


@triton.jit
def decode_kernel(words, codebook, four, eight, X: tl.constexpr, DOT: tl.constexpr, DECODE: tl.constexpr):
    row = tl.arange(0, 16)[:, None]
    word = tl.load(words + row * 4 + tl.arange(0, 4)[None, :])
    table = load_table(codebook, X, DOT, DECODE)
    numbers = decode_4bit(word, table, DOT, DECODE).to(tl.float32)
    tl.store(four + row * 32 + tl.arange(0, 32)[None, :], numbers)
    tl.store(eight + row * 16 + tl.arange(0, 16)[None, :], decode_int8(word, DECODE))


def check_kernel(module, dtype=torch.float32):
    """64 random words as 4-bit and as 8-bit codes, in the order of the bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (256,), dtype=torch.uint8, generator=g).to(device)
    table = torch.randn(16, generator=g).to(device)
    four, eight = (torch.full((256 * k,), float("nan"), device=device) for k in (2, 1))
    constants = {
        "X": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype],
        "DOT": runtime.dot_dtype(torch.empty(0, dtype=dtype)),
        "DECODE": "gather" if dtype == torch.float32 else runtime.DECODE,
    }
    of(module, decode_kernel)[(1,)](packed.view(torch.int32), table, four, eight, **constants)
    codes = torch.stack((packed >> 4, packed & 15), 1).view(-1).long()
    assert torch.equal(four, table.to(dtype).float()[codes])
    assert torch.equal(eight, packed.view(torch.int8).float())


def of(module, kernel):
    """The kernel, calling the functions of this module."""
    names = ("load_table", "decode_4bit", "decode_int8", "rounded")
    globals().update({name: getattr(module, name) for name in names})
    return triton.jit(kernel.fn)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_words_decode_in_the_order_of_their_bytes(dtype):
    check_kernel(decode, dtype)


@triton.jit
def rounding_kernel(x, out, X: tl.constexpr, DOT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, rounded(tl.load(x + i), X, DOT).to(tl.float32))


def check_rounding(module, dtype=torch.bfloat16):
    """4096 random bit patterns, infinities and ties, as torch rounds them."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    x[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])
    x = torch.where(x.isnan(), 1.0, x).to("cuda" if torch.cuda.is_available() else "cpu")
    out = torch.full_like(x, float("nan"))
    X = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    of(module, rounding_kernel)[(1,)](x, out, X, tl.float32, 4096)
    assert torch.equal(out, x.to(dtype).float())


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_torch_s(dtype):
    check_rounding(decode, dtype)


def check_sum(module):
    """Bit for bit in the order of the splits, and nothing beyond the last number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size, splits in [(1, 1), (1025, 2), (3000, 16)]:
        parts = torch.randn(splits, size, generator=torch.Generator().manual_seed(size)).to(device)
        parts[:, 0] *= 1e4
        out = torch.full((size + 7,), float("nan"), device=device)
        grid = (triton.cdiv(size, 1024),)
        module.sum_splits_kernel[grid](parts, out, size, SPLITS=splits, BLOCK=1024)
        expected = torch.zeros(size, device=device)
        for part in parts:
            expected += part
        assert torch.equal(out[:size], expected) and out[size:].isnan().all()


@pytest.mark.triton
def test_splits_are_summed_in_their_order():
    check_sum(decode)


TRITON_MUTANTS = [
    (check_kernel, "^ 4  #", "^ 0  #"),
    (check_kernel, "& 15\n        return tl.gather", "& 7\n        return tl.gather"),
    (check_rounding, "0x7FFF + ", "0x7FFE + "),
    (check_rounding, "((bits >> 16) & 1)) & -65536", "((bits >> 16) & 1)) & -32768"),
    (check_kernel, "left >> 24).to", "left >> 23).to"),
    (check_kernel, "24 - 8 * tl.arange(0, 4)", "8 * tl.arange(0, 4)"),
    (check_sum, "parts_ptr += size", "parts_ptr += size - 1"),
    (check_sum, "mask=at < size, other=0.0", "mask=at < size - 1, other=0.0"),
    (check_sum, "element_ty), mask=at < size)", "element_ty), mask=at <= size)"),
    (check_sum, "total += tl.load(parts_ptr", "total = tl.load(parts_ptr"),
]


@pytest.mark.triton
@pytest.mark.parametrize("check, old, new", TRITON_MUTANTS)
def test_mutants_are_noticed(check, old, new):
    assert not survives(check, decode, old, new)


# Which configuration a launch takes.

CONFIGS = [Config(16, 128, 64, 4, 4, s) for s in (1, 4, 8)] + [Config(64, 128, 64, 4, 3, s) for s in (1, 2)]


@given(st.integers(1, 300), st.integers(1, 40000), st.integers(1, 1000), st.booleans())
def test_the_picked_configuration_holds_the_rows_and_its_splits_have_work(M, N, blocks, transposed):
    K = 64 * blocks
    config = decode.pick(CONFIGS, M, N, K, transposed)
    assert min(M, 64) <= config.BLOCK_M and (M > 16 or config in CONFIGS[:3])
    steps = -(-N // config.BLOCK_N) if transposed else K // 64
    assert config.splits == 1 or steps >= decode.STEPS * config.splits
    assert config == decode.pick(CONFIGS, M, N, K, transposed)


def test_few_tiles_are_split_until_they_fill_the_gpu():
    assert decode.pick(CONFIGS, 1, 4096, 4096, False).splits == 8
    assert decode.pick(CONFIGS, 1, 28672, 8192, False).splits == 4
    assert decode.pick(CONFIGS, 1, 128256, 4096, False).splits == 1
    assert decode.pick(CONFIGS, 1, 4096, 64, False).splits == 1


def test_without_determinism_the_fastest_configuration_is_timed_once_and_kept(monkeypatch):
    timed = []

    def milliseconds(run):
        timed.append(run())
        return {1: 3.0, 4: 1.0, 8: 2.0}[timed[-1].splits]

    monkeypatch.setattr(decode, "milliseconds", milliseconds)
    monkeypatch.setattr(decode, "_fastest", {})
    weight = Packed(None, None, None, (4096, 4096), 64)
    x = SimpleNamespace(shape=(3, 4096), is_cuda=True, dtype=torch.bfloat16, device="cuda:0")

    def choose():
        return decode.choose_config("kernel", CONFIGS, x, weight, False, lambda config: config)

    assert choose().splits == 8 and not timed
    with runtime.using(deterministic=False):
        assert choose().splits == 4 and choose().splits == 4
    assert [config.splits for config in timed] == [1, 4, 8]
    assert choose().splits == 8


BUILDS = [
    machine_code.Build(
        "splits",
        decode.sum_splits_kernel,
        {"parts_ptr": "*fp32", "out_ptr": "*bf16", "size": "i32"},
        {"SPLITS": 8, "BLOCK": 1024},
        aligned=("parts_ptr", "out_ptr", "size"),
        promises=("LDG.E.128", "STG.E.128"),
    )
]
