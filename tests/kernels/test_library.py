"""The C file at every instruction set of this processor: exact ops bit for bit, products within bounds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.kernels import adamw_8bit as adamw
from minift.kernels import library, runtime
from minift.kernels.dequantize_4bit import dequantize_4bit_ref
from minift.kernels.dequantize_int8 import dequantize_int8_ref
from minift.kernels.packed import Packed
from minift.optim.adamw_8bit import dynamic_map
from minift.quant.base import BLOCK_SIZES
from minift.quant.weight import FORMATS, quantize_weight

SOURCES = Path(library.__file__).parent / "cpu"
LEVELS = range(library.LIBRARY.minift_level() + 1 if library.LIBRARY else 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")


def packed(w, format="nf4", block_size=64, double_quant=False) -> Packed:
    with runtime.using("torch"):
        q = quantize_weight(w, format, block_size, double_quant)
    return q.as_packed()


def same(a, b):
    """Equal bits, NaN and minus zero included."""
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def heavy(n, seed=0):
    """Numbers whose sizes differ by 10^30, subnormal blocks among them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * 10 ** torch.linspace(-41, -10, n)


def guarded(n, dtype):
    """(n,) of NaN inside a larger buffer, and the two guards around it."""
    buffer = torch.full((n + 32,), 7.0, dtype=dtype)
    buffer[16 : 16 + n] = float("nan")
    return buffer[16 : 16 + n], (buffer[:16], buffer[16 + n :])


def reference(weight, out, first=0, stride=0):
    ref = dequantize_4bit_ref if weight.bits == 4 else dequantize_int8_ref
    return ref(weight, out, first, stride)


def check_dequantize(weight, dtype):
    n = weight.shape[0]
    out, guards = guarded(n, dtype)
    library.dequantize(weight, out, 0, 0)
    assert same(out, reference(weight, torch.empty(n, dtype=dtype)))
    assert all((guard == 7).all() for guard in guards)


@pytest.fixture(params=LEVELS, ids=lambda level: library.LEVELS[level])
def level(request, monkeypatch):
    monkeypatch.setattr(library, "LEVEL", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_gives_the_bits_of_the_reference(level, format, double_quant, dtype):
    for n in (1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 16417):
        for block_size in (32, 64, 4096):
            w = torch.randn(n) if n % 2 else heavy(n)
            check_dequantize(packed(w, format, block_size, double_quant), dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_gives_slabs_of_rows_and_of_columns(level, format):
    weight = packed(torch.randn(70, 192), format, 64, double_quant=True)
    for first, stride, shape in ((192 * 3, 0, (5, 192)), (64, 192, (70, 64)), (192 + 64, 192, (3, 128))):
        out, guards = guarded(shape[0] * shape[1], torch.bfloat16)
        library.dequantize(weight, out.view(shape), first, stride)
        assert same(
            out.view(shape), reference(weight, torch.empty(shape, dtype=torch.bfloat16), first, stride)
        )
        assert all((guard == 7).all() for guard in guards)


def quantized(w, format, block_size):
    """(packed, absmax) by the C file, which is given the sorted table's midpoints and order."""
    format, n = FORMATS[format], w.numel()
    bytes_ = torch.full((-(-n * format.bits // 8) + 16,), 77, dtype=torch.uint8)
    absmax, guards = guarded(-(-n // block_size), torch.float32)
    midpoints = order = None
    if format.bits == 4:
        values, order = format.values("cpu").sort(stable=True)
        midpoints = torch.cat(((values[:-1] + values[1:]) / 2, torch.tensor([float("inf")])))
        order = order.int()
    library.quantize(w, block_size, midpoints, order, bytes_, absmax)
    assert (bytes_[-16:] == 77).all() and all((guard == 7).all() for guard in guards)
    return bytes_[:-16], absmax


def check_quantize(w, format, block_size):
    with runtime.using("torch"):
        expected = FORMATS[format].quantize(w, block_size)
    got = quantized(w, format, block_size)
    assert torch.equal(got[0], expected[0]) and same(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_quantize_gives_the_bits_of_the_format(level, format, dtype):
    for n in (1, 2, 15, 31, 32, 33, 64, 65, 1000, 8192, 8191):
        for block_size in (32, 64, 4096):
            check_quantize(torch.randn(n).to(dtype), format, block_size)
            check_quantize(heavy(n).to(dtype), format, block_size)


@given(st.data())
def test_quantize_agrees_on_midpoints_and_special_blocks(data):
    format = data.draw(st.sampled_from(["nf4", "fp4", "int8"]))
    values = FORMATS[format].values("cpu")
    special = [0.0, -0.0, 1.0, -1.0, 1e-40, 2.0**-126, 3e38, *((values[:-1] + values[1:]) / 2).tolist()]
    numbers = data.draw(st.lists(st.sampled_from(special), min_size=1, max_size=80))
    scale = 2.0 ** data.draw(st.integers(-20, 0))
    check_quantize(torch.tensor(numbers) * scale, format, data.draw(st.sampled_from(BLOCK_SIZES[:2])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_number_that_is_not_finite_has_such_an_absmax(level, bad):
    for dtype in DTYPES:
        w = torch.randn(200).to(dtype)
        w[70] = bad
        absmax = quantized(w, "nf4", 64)[1]
        assert torch.isfinite(absmax).tolist() == [True, False, True, True]


def check_matmul(weight, x):
    """|y - y64| <= gamma(K + 4) |x| |W|^T: every term is rounded as a product, with absmax, and in sums.

    The operands of y64 are exact, except where the processor's products of bf16 are used: they multiply x
    with the table rounded to bf16.
    """
    (N, K), M = weight.shape, x.shape[0]
    exact = weight
    bf16 = library.LEVEL >= 3 and x.dtype == torch.bfloat16 and weight.block_size >= 64
    if bf16 and weight.bits == 4:
        exact = weight._replace(codebook=weight.codebook.bfloat16().float())
    codes = weight.packed if weight.bits == 8 else torch.stack((weight.packed >> 4, weight.packed & 15), 1)
    values = (
        codes.view(torch.int8).double() / 127 if weight.bits == 8 else exact.codebook.double()[codes.long()]
    )
    W = (values.view(-1, weight.block_size) * weight.scales().double()[:, None]).view(N, K)
    y = library.matmul(x, weight)
    gamma = (K + 4) * 2.0**-24 / (1 - (K + 4) * 2.0**-24)
    bound = gamma * (x.double().abs() @ W.abs().t())
    assert y.shape == (M, N) and ((y.double() - x.double() @ W.t()).abs() <= bound).all()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_stay_within_the_bound(level, format, dtype):
    for M, N, K, block_size, double_quant in (
        (1, 1, 32, 32, False),
        (1, 33, 64, 64, True),
        (2, 16, 128, 64, False),
        (3, 17, 192, 64, True),
        (4, 40, 256, 32, True),
        (7, 31, 1024, 256, False),
        (16, 65, 4096, 4096, False),
        (17, 5, 320, 64, True),
    ):
        weight = packed(torch.randn(N, K), format, block_size, double_quant)
        check_matmul(weight, torch.randn(M, K).to(dtype))


def test_threads_do_not_change_a_bit(level):
    weight, x = packed(torch.randn(300, 256), double_quant=True), torch.randn(5, 256).bfloat16()
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (library.matmul(x, weight), library.dequantize(weight, torch.empty(300, 256), 0, 0))
            )
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def check_adamw():
    """A step of two tensors, with a short block, gives the bits of the reference."""
    maps = tuple(adamw.make_map(dynamic_map(signed)) for signed in (True, False))
    for dtype in DTYPES:
        g = torch.Generator().manual_seed(3)
        params, grads = ([torch.randn(n, generator=g).to(dtype) for n in (513, 256)] for _ in range(2))
        zeros = [[int((map.values == 0).nonzero()) for map in maps]] * 2
        states = [
            adamw.Moments(
                torch.full((len(p),), m, dtype=torch.uint8),
                torch.zeros(-(-len(p) // 256)),
                torch.full((len(p),), v, dtype=torch.uint8),
                torch.zeros(-(-len(p) // 256)),
            )
            for p, (m, v) in zip(params, zeros, strict=True)
        ]
        expected = [p.clone() for p in params], [adamw.Moments(*(x.clone() for x in s)) for s in states]
        for step in (1, 2, 3):
            grads = [-grad for grad in grads]
            settings = (maps, step, 1e-2, (0.9, 0.99), 1e-8, 0.1)
            adamw.adamw_8bit_ref(expected[0], grads, expected[1], *settings)
            with runtime.using("c"):
                adamw.adamw_8bit(params, grads, states, *settings)
        assert all(torch.equal(a, b) for a, b in zip(params, expected[0], strict=True))
        for got, wanted in zip(states, expected[1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_adamw_gives_the_bits_of_the_reference(level):
    check_adamw()


def check_everything():
    for format in ("nf4", "int8", "int8_dynamic"):
        for dtype in DTYPES:
            check_dequantize(packed(torch.randn(1000), format, 64, True), dtype)
    for format in ("nf4", "fp4", "int8"):
        check_quantize(torch.randn(1001), format, 64)
        for M, block_size in ((1, 32), (3, 64), (16, 128)):
            weight = packed(torch.randn(19, 256), format, block_size, True)
            check_matmul(weight, torch.randn(M, 256).bfloat16())


def check_ties():
    """What random numbers do not show: midpoints, the last element, rounding of ties."""
    values = FORMATS["nf4"].values("cpu")
    check_quantize(torch.cat(((values[:-1] + values[1:]) / 2, torch.ones(49))), "nf4", 64)
    check_dequantize(packed(torch.arange(-127, 128).float(), "int8", 256), torch.float32)
    for absmax in range(3, 40, 2):  # a short block, where division and 1 / absmax part on halves
        halves = (torch.arange(-63, 63) + 0.5) * (absmax / 127)
        check_quantize(torch.cat((halves[::3], torch.tensor([float(absmax)]))), "int8", 64)
    weight = packed(torch.randn(40001), "nf4", 64, True)
    check_dequantize(weight, torch.float32)
    first, out = 64 * 250, torch.empty(64 * 20)  # blocks of two groups in one vector
    assert same(library.dequantize(weight, out, first, 0), reference(weight, torch.empty_like(out), first))
    check_adamw()
    check_dequantize(packed(torch.linspace(-1, 1, 255) * (1 + 2**-8), "nf4", 64), torch.bfloat16)
