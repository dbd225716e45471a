"""Quantized weights to decode: random ones, the parts of them that are tried, and how a call is checked."""

import itertools

import pytest
import torch
from machine_code import Build
from quant import quant_reference as slow
from torch.utils._python_dispatch import TorchDispatchMode

from minift.kernels.dequantize_4bit import BLOCK_SIZES, DTYPES
from minift.kernels.packed import Packed
from minift.quant.weight import FORMATS

GUARD = 64
SIZES = (0, 1, 8, 31, 32, 33, 63, 64, 65, 127, 192, 1000, 4096, 11008)
FP32, BF16, FP16 = DTYPES

# (N, K), block size, double quantization, dtype of out, first element, elements (None: to the last)
FLAT = [
    ((1, 1), 32, True, FP32, 0, None),
    ((31, 1), 32, False, BF16, 0, None),
    ((8, 31), 64, True, FP16, 0, None),
    ((33, 32), 32, True, BF16, 0, None),
    ((63, 65), 64, False, FP32, 0, None),
    ((127, 33), 128, True, FP32, 128, None),
    ((64, 64), 64, True, BF16, 0, None),  # one whole tile
    ((192, 64), 32, True, FP32, 0, None),  # whole tiles, more than 256 blocks
    ((64, 192), 4096, True, FP16, 4096, 4096),
    ((1, 11008), 2048, False, BF16, 2048, 4097),
    ((3, 4096), 512, True, FP32, 512, 8192),
    ((1000, 8), 1024, True, FP16, 1024, 1),
    ((5, 1000), 256, False, FP16, 256, 33),
    ((2, 4096), 4096, False, FP32, 0, None),
    ((65, 127), 4096, True, BF16, 4096, None),
    ((150, 64), 32, True, FP32, 32, 8192),  # a tile has blocks of two groups of scales
]
# (N, K), block size, double quantization, dtype, first element, (rows, columns), stride
SLABS = [
    ((8, 64), 32, True, FP32, 32, (8, 32), 64),
    ((5, 192), 64, False, BF16, 64, (5, 128), 192),
    ((3, 4096), 64, True, FP16, 1024, (3, 1024), 4096),  # a tile of 1024
    ((3, 4096), 256, True, FP32, 0, (3, 2048), 4096),  # of 2048
    ((2, 8192), 4096, False, BF16, 4096, (2, 4096), 8192),
    ((2, 3072), 1024, True, FP32, 0, (2, 3072), 3072),  # three tiles to a row
    ((4, 1280), 128, True, FP16, 1280, (2, 1152), 2560),  # every second row, which ends within a tile
    ((3, 11008), 32, True, FP32, 32, (3, 4128), 11008),
]
# absmax from zero to beyond fp16 and fp32
SCALES = [
    0.0,
    -0.0,
    2.0**-149,
    2.0**-127,
    2.0**-126,
    1.0,
    65519.0,
    65520.0,
    3.4e38,
    float("inf"),
    float("nan"),
]


def draw(shape, block_size, nested, bits=4, table=True):
    """A weight of random bytes, its scales over many powers of two, its table out of order."""
    g = torch.Generator().manual_seed(sum(shape) + block_size)
    n = shape[0] * shape[1]
    blocks = -(-n // block_size)
    packed = torch.randint(0, 256, (-(-n * bits // 8),), generator=g).byte()
    table = torch.randn(2**bits, generator=g) if table else None
    if not nested:
        absmax = torch.exp2(20 * torch.randn(blocks, generator=g))
        return Packed(packed, absmax, table, shape, block_size)
    absmax = torch.randint(0, 256, (blocks,), generator=g).byte()
    group, offset = torch.rand(-(-blocks // 256), generator=g), torch.rand(1, generator=g)
    return Packed(packed, absmax, table, shape, block_size, group, offset, torch.randn(256, generator=g))


def cases(bits, table=True):
    """Arguments of `compare`."""
    made = []
    for shape, block_size, nested, dtype, first, n in FLAT:
        weight = draw(shape, block_size, nested, bits, table)
        n = shape[0] * shape[1] - first if n is None else n
        made.append({"weight": weight, "shape": (n,), "dtype": dtype, "first": first})
    for shape, block_size, nested, dtype, first, out, stride in SLABS:
        weight = draw(shape, block_size, nested, bits, table)
        made.append({"weight": weight, "shape": out, "dtype": dtype, "first": first, "stride": stride})
    return made


def few(bits, table=True):
    """Cases that are enough to notice a mutant."""
    made = cases(bits, table)
    return [made[i] for i in (1, 5, 15, 16, 22)]


def on_gpu(test):
    """A test that needs a CUDA device."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


def to(weight, device):
    return Packed(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in weight))


def as_packed(q):
    """minift.quant's weight as the ops take it."""
    table = None if q.layout.format.name == "int8" else q.layout.format.values("cpu")
    nested = FORMATS["int8_dynamic"].values("cpu") if q.layout.double_quant else None
    size = q.layout.block_size
    return Packed(q.packed, q.absmax, table, q.shape, size, q.nested_absmax, q.offset, nested)


def slow_quantize(name, w, block_size):
    codes, absmax = slow.quantize(name, w.float().numpy(), block_size)
    return torch.from_numpy(slow.pack(name, codes)), torch.from_numpy(absmax)


def slow_dequantize(q, dtype):
    """Each operation once more in numpy, from the golden tables."""
    format, absmax = q.layout.format.name, q.absmax.numpy()
    if q.layout.double_quant:
        groups = q.nested_absmax.numpy().repeat(256)[: len(absmax)]
        absmax = slow.VALUES["int8_dynamic"][absmax] * groups + q.offset.numpy()
    codes = slow.unpack(format, q.packed, q.layout.n)
    return slow.dequantize(format, codes, absmax, q.layout.block_size, dtype).view(q.shape)


def same_bits(got, want):
    """The same numbers, signs of zeros included; any NaN is as good as another."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    nan = (got != got) & (want != want)
    equal = got.dtype == want.dtype and got.shape == want.shape
    return equal and bool(((got.view(integers) == want.view(integers)) | nan).all())


def compare(call, ref, weight, shape, dtype, first=0, stride=0, device="cpu", offset=0):
    """One call fills out as the reference does, writes nothing around it and changes no input."""
    want = ref(weight, torch.empty(shape, dtype=dtype), first, stride)
    weight = to(weight, device)
    before = [x.clone() for x in weight if isinstance(x, torch.Tensor)]
    buffer = torch.full((want.numel() + 2 * GUARD,), 77, dtype=dtype, device=device)
    out = buffer[GUARD + offset :][: want.numel()].view(shape).fill_(float("nan"))
    assert call(weight, out, first, stride) is out
    assert same_bits(out.cpu(), want)
    assert (buffer[: GUARD + offset] == 77).all() and (buffer[GUARD + offset + want.numel() :] == 77).all()
    after = [x for x in weight if isinstance(x, torch.Tensor)]
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


def compare_the_grid(call, ref, dtype, bits, table=True):
    """Every shape on the GPU: whole, and the right half of its columns."""
    for N, K, nested in itertools.product(SIZES, SIZES, (True, False)):
        weight = draw((N, K), BLOCK_SIZES[(N + K) % 8], nested, bits, table)
        compare(call, ref, weight, (N, K), dtype, device="cuda", offset=N % 2)
        if N and K and K % 64 == 0:
            weight = draw((N, K), 32, nested, bits, table)
            compare(call, ref, weight, (N, K // 2), dtype, K // 2, K, "cuda")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, views and in-place results left out."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and all(not r.alias_info for r in func._schema.returns):
            self.bytes = max(self.bytes, made.nbytes)
        return made


class Launches(list):
    """In place of a kernel: (grid, keywords) of each launch."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.append((grid, kwargs))


SIGNATURE = {
    **dict.fromkeys(("codebook_ptr", "nested_absmax_ptr", "offset_ptr", "nested_codebook_ptr"), "*fp32"),
    **dict.fromkeys(("first", "stride", "C", "n"), "i32"),
    "packed_ptr": "*u8",
}
FP32_SCALES = dict.fromkeys(("nested_absmax_ptr", "offset_ptr", "nested_codebook_ptr"))


def build(name, kernel, dtype, budget, warps=4, **constants):
    """A launch with 32 elements for each thread; nested scales unless FP32_SCALES are among the constants."""
    constants = {"BLOCK_SIZE": 64, "TILE": 1024 * warps, "EVEN": True, **constants}
    absmax = "*fp32" if "offset_ptr" in constants else "*u8"
    signature = {**SIGNATURE, "absmax_ptr": absmax, "out_ptr": "*" + dtype}
    aligned = tuple(name for name in signature if name not in constants)
    more = {"elements": 32, "budget": budget, "promises": ("STG.E.128",)}
    options = {"enable_fp_fusion": False}
    return Build(name, kernel, signature, constants, warps, aligned=aligned, options=options, **more)
