"""Products with quantized weights: random ones, exact results with their error bounds, how a call is checked.

Which numbers a product multiplies is a rule of its way (kernels/matmul_4bit.py): "sums", "weights", "slabs".
"""

import itertools
from contextlib import contextmanager
from math import prod

import torch
from machine_code import Build
from quantized import SIZES, to

from minift.kernels import runtime, slabs
from minift.kernels.dequantize_4bit import BLOCK_SIZES, dequantize_4bit_ref
from minift.kernels.dequantize_int8 import dequantize_int8_ref
from minift.kernels.packed import Packed
from minift.kernels.runtime import tl

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
GUARD = 64
ROWS = (0, 1, 2, 3, 7, 16, 17, 64, 127, 128, 129, 2048)

# M, N, K, block size, double quantization, dtype
CASES = [
    (1, 1, 32, 32, False, FP32),
    (1, 8, 64, 64, True, BF16),
    (2, 31, 96, 32, True, FP16),
    (3, 33, 128, 128, False, BF16),
    (7, 127, 192, 64, True, FP32),
    (16, 128, 256, 256, True, BF16),
    (16, 192, 128, 64, False, FP16),
    (17, 64, 192, 64, True, BF16),
    (33, 65, 64, 64, False, FP32),
    (64, 63, 256, 128, True, BF16),
    (64, 130, 128, 32, True, FP32),
    (65, 33, 128, 64, True, BF16),
    (128, 128, 64, 64, False, FP16),
    (129, 8, 192, 64, True, FP32),
    (5, 300, 64, 64, True, BF16),  # blocks of two groups of scales
    (1, 400, 512, 512, False, BF16),
    (4, 20, 2048, 2048, True, BF16),
    (2, 9, 1408, 128, True, FP32),
]
# Enough to notice a mutant: tails in M, N and the steps, several scales to a tile, more than 256 blocks
FEW = [(3, 130, 192, 64, True, FP32), (33, 65, 128, 64, True, BF16), (65, 20, 128, 32, False, FP32)]


def draw(N, K, block_size, nested, bits=4, table=True, seed=0):
    """A weight of random bytes; nested_absmax are powers of two, so that a fused multiply-add is exact."""
    g = torch.Generator().manual_seed(N + K + block_size + seed)
    n = N * K
    blocks = -(-n // block_size)
    packed = torch.randint(0, 256, (-(-n * bits // 8),), generator=g).byte()
    table = torch.randn(2**bits, generator=g) if table else None
    if not nested:
        return Packed(packed, torch.rand(blocks, generator=g), table, (N, K), block_size)
    absmax = torch.randint(0, 256, (blocks,), generator=g).byte()
    group = torch.exp2(torch.randint(-4, 2, (-(-blocks // 256),), generator=g).float())
    offset, nested_codebook = torch.rand(1, generator=g), torch.randn(256, generator=g)
    return Packed(packed, absmax, table, (N, K), block_size, group, offset, nested_codebook)


def rows(*shape, dtype=FP32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operand(weight, dtype, rule):
    """W (N, K) as a product multiplies it, fp64 that hold numbers of fp32 or fp32 products exactly."""
    if rule == "slabs":
        ref = dequantize_4bit_ref if weight.bits == 4 else dequantize_int8_ref
        return ref(weight, torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)).double()
    absmax = weight.scales().repeat_interleave(weight.block_size)[: prod(weight.shape)].view(weight.shape)
    if weight.bits == 8:
        code = weight.packed.view(torch.int8).view(weight.shape)
        if rule == "sums":
            return code.double() * absmax.double() / 127
        return (code.float() * (absmax * (1 / 127))).to(dtype).double()
    code = torch.stack((weight.packed >> 4, weight.packed & 15), 1).view(-1).long()[: prod(weight.shape)]
    number = weight.codebook.to(dtype)[code].view(weight.shape)
    if rule == "sums":
        return number.double() * absmax.double()
    return (number.float() * absmax.to(dtype).float()).to(dtype).double()


def exact(x, W, transposed, dtype=None):
    """x W^T or x W in fp64, and how far a product of these operands, summed in fp32, may be from it.

    A product of n terms, with the factors absmax and 1/127 (two roundings each), passes n + 4 roundings of
    2^-24 at most, and tensor cores, which truncate, make twice the error: 2 gamma(n + 4) |x| |W|. Then the
    result is rounded to its dtype: u = 2^-8 (bf16) or 2^-11 (fp16), or the smallest number of it.
    """
    dtype = dtype or x.dtype
    W = W if transposed else W.t()
    n, info = x.shape[1] + 4, torch.finfo(dtype)
    y, size = x.double() @ W, x.double().abs() @ W.abs()
    error = 2 * n * 2.0**-24 / (1 - n * 2.0**-24) * size + n * 2.0**-149
    if dtype != FP32:
        error += info.eps / 2 * (y.abs() + error) + info.smallest_normal * info.eps
    return y, error


def assert_within(got, y, error):
    assert got.shape == y.shape
    far = (got.double() - y).abs() > error
    same = (got.double() == y) | (got.isnan() & y.isnan())
    wrong = (far | got.isnan()) & ~same
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} are beyond the bound, first at {wrong.nonzero()[0]}"
    )


@contextmanager
def guarded():
    """Within the block torch.empty gives NaN between sentinels; after it no sentinel has changed."""
    empty, buffers = torch.empty, []

    def filled(*shape, dtype, device):
        n = prod(shape)
        buffer = torch.full((n + 2 * GUARD,), 77.0, dtype=dtype, device=device)
        buffer[GUARD : GUARD + n] = float("nan")
        buffers.append(buffer)
        return buffer[GUARD : GUARD + n].view(shape)

    torch.empty = filled
    try:
        yield buffers
    finally:
        torch.empty = empty
    assert all((b[:GUARD] == 77).all() and (b[-GUARD:] == 77).all() for b in buffers)


def compare(op, x, weight, transposed, rule, device="cpu"):
    """One fused call is within the bound, writes nothing beside its result and changes no input."""
    y, error = exact(x, operand(weight, x.dtype, rule), transposed)
    x, weight = x.to(device), to(weight, device)
    inputs = [x, *(field for field in weight if isinstance(field, torch.Tensor))]
    before = [tensor.clone() for tensor in inputs]
    with runtime.using(path="fused"), guarded() as buffers:
        got = op(x, weight, transposed)
    assert buffers and got.dtype == x.dtype
    assert_within(got.cpu(), y, error)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def compare_slabs(op, x, weight, transposed):
    """A call through slabs is within the bound of a dense product with the dequantized weight."""
    y, error = exact(x, operand(weight, x.dtype, "slabs"), transposed)
    with runtime.using(path="slabs"):
        assert_within(op(x, weight, transposed), y, error)


def build(name, kernel, x="bf16", out="bf16", nested=True, M=None, **more):
    """A launch of a fused kernel, of W tiles `tile` = (BLOCK_M, BLOCK_N, BLOCK_K)."""
    (BLOCK_M, BLOCK_N, BLOCK_K), warps = more.pop("tile"), more.pop("warps", 4)
    pointers = {"x_ptr": x, "words_ptr": "i32", "absmax_ptr": "u8" if nested else "fp32", "out_ptr": out}
    scales = dict.fromkeys(
        ("nested_absmax_ptr", "offset_ptr", "nested_codebook_ptr"), "fp32" if nested else None
    )
    pointers |= {"codebook_ptr": "fp32", **scales}
    pointers = {name: type for name, type in pointers.items() if name in kernel.arg_names}
    sizes = {"M": "i32", "N": "i32", "K": "i32", "steps": "i32"}
    constants = {
        "BLOCK_SIZE": more.pop("block_size", 64),
        "DOT": {"bf16": tl.bfloat16, "fp16": tl.float16}[x],
        "DECODE": "prmt",
        **{"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
        **{name: None for name, type in pointers.items() if type is None},
        **({"M": M} if M else {}),
    }
    signature = {name: "*" + type for name, type in pointers.items() if type} | sizes
    aligned = tuple(name for name in signature if name.endswith("_ptr") or name in "NK")
    more.setdefault("promises", ("tensor", "LDGSTS.E.128", "STG.E.128"))
    elements = BLOCK_N * BLOCK_K / (32 * warps)
    return Build(name, kernel, signature, constants, warps, aligned=aligned, elements=elements, **more)


def compare_the_grid(call, dtype, bits, rule, device="cuda"):
    """Both ways and both directions, every shape, on the GPU."""
    for N, K in itertools.product(SIZES, SIZES):
        block_size = BLOCK_SIZES[(N + K) % 8]
        for size in {32, block_size}:
            weight = to(draw(N, K, size, N % 2 == 0, bits, bits == 4), device)
            for M, transposed in itertools.product(ROWS, (False, True)):
                x = rows(M, N if transposed else K, dtype=dtype).to(device)
                ways = ["slabs"]
                if not slabs.why_not_fused("triton", weight, dtype, transposed):
                    ways.append("fused")
                for way in ways if M * N * K else ():
                    W = operand(weight, dtype, "slabs" if way == "slabs" else rule(M, size, transposed))
                    with runtime.using(path=way):
                        assert_within(call(x, weight, transposed), *exact(x, W, transposed))
