"""What the fused products with a quantized matrix share: codes and scales in registers, and the launch.

A weight comes as int32 words: eight codes of 4 bits or four of 8, in the order of the bytes, the high nibble
first. With DECODE "gather" codes are looked up (in Triton's interpreter, for fp32, on AMD). With "prmt",
NVIDIA's byte permute, no table leaves the registers: 16 numbers of 16 bits are 8 registers, four with the low
bytes and four with the high ones, and the word of codes is itself the selector. For the four codes of half a
word, in each of the two planes:

    a = prmt(entries 0 to 7, code & 7);  b = prmt(entries 8 to 15, code & 7)    4 bytes each
    c = prmt(a, b, 4 (code >> 3) + position)                                    the byte of the right half

and two more put low and high bytes side by side: 16 prmt and 5 others for 8 weights. Where every thread reads
the table at the same address, the compiler keeps it in uniform registers, which prmt cannot read twice, and
spends a move for each; so each lane of a warp reads one entry, and they hand them around.

Source: PTX ISA, section 9.7.9.7 (prmt), 9.7.9.6 (shfl.sync).
"""

from math import gcd
from typing import NamedTuple

import torch

from minift.kernels import runtime
from minift.kernels.packed import Packed
from minift.kernels.runtime import tl, triton

PROGRAMS = 256  # that a launch should have: about two for each processor of an H100
STEPS = 4  # of a reduction that are worth a split


def table_asm(dtype: str) -> str:
    """$0 to $3: low bytes of entries 0 to 3, 4 to 7, ...; $4 to $7: high bytes. $8: address of 16 fp32."""
    words = "".join(
        f"add.u32 from, base, {4 * i};"
        f"shfl.sync.idx.b32 ${i}, low, from, 31, 0xffffffff;"
        f"shfl.sync.idx.b32 ${4 + i}, high, from, 31, 0xffffffff;"
        for i in range(4)
    )
    return f"""{{
        .reg .b32 lane, base, entry, value, next, pair, after, low, high, from; .reg .b64 address;
        mov.u32 lane, %laneid;
        and.b32 base, lane, 16;
        and.b32 entry, lane, 15;
        mad.wide.u32 address, entry, 4, $8;
        ld.global.b32 value, [address];
        shfl.sync.down.b32 next, value, 1, 31, 0xffffffff;
        cvt.rn.{dtype}x2.f32 pair, next, value;
        shfl.sync.down.b32 after, pair, 2, 31, 0xffffffff;
        prmt.b32 low, pair, after, 0x6420;
        prmt.b32 high, pair, after, 0x7531;
        {words}
    }}"""


def decode_asm() -> str:
    """$0 to $7: eight numbers of 16 bits. $8: the word of their codes. $9 to $16: the table, see above."""
    halves = "".join(
        f"prmt.b32 a, $9, $10, {select}; prmt.b32 b, $11, $12, {select}; prmt.b32 low, a, b, {mix};"
        f"prmt.b32 a, $13, $14, {select}; prmt.b32 b, $15, $16, {select}; prmt.b32 high, a, b, {mix};"
        f"prmt.b32 a, low, high, 0x4051; mov.b32 {{${first}, ${first + 1}}}, a;"
        f"prmt.b32 a, low, high, 0x6273; mov.b32 {{${first + 2}, ${first + 3}}}, a;"
        for first, select, mix in ((0, "select", "mix"), (4, "select_high", "mix_high"))
    )
    return f"""{{
        .reg .b32 select, mix, select_high, mix_high, a, b, low, high;
        and.b32 select, $8, 0x77777777;
        shr.u32 mix, $8, 1;
        lop3.b32 mix, mix, 0x44444444, 0x32103210, 0xEA;
        shr.u32 select_high, select, 16;
        shr.u32 mix_high, mix, 16;
        {halves}
    }}"""


TABLE_BF16 = tl.constexpr(table_asm("bf16"))
TABLE_FP16 = tl.constexpr(table_asm("f16"))
TABLE_OPERANDS = tl.constexpr(",".join(["=r"] * 8 + ["l"]))
DECODE_4BIT = tl.constexpr(decode_asm())
DECODE_4BIT_OPERANDS = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))
# 2^23 + 128 + code, as fp32, is the code with its sign bit turned in the last byte of 0x4B000000.
DECODE_INT8 = tl.constexpr(
    "{.reg .b32 bytes; xor.b32 bytes, $4, 0x80808080;"
    + "".join(
        f"prmt.b32 ${i}, bytes, 0x4B000000, 0x744{i}; sub.rn.f32 ${i}, ${i}, 0f4B000080;" for i in range(4)
    )
    + "}"
)


@triton.jit
def rounded(number, X: tl.constexpr, DOT: tl.constexpr):
    """fp32 rounded to X, to nearest, ties to even, as DOT. The interpreter truncates to bf16 by itself."""
    if tl.bfloat16 == X and tl.float32 == DOT:
        bits = number.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return number.to(X).to(DOT)


@triton.jit
def load_table(codebook_ptr, X: tl.constexpr, DOT: tl.constexpr, DECODE: tl.constexpr):
    """16 fp32 numbers rounded to X: 8 registers of each thread for "prmt", [16] in DOT for "gather"."""
    if DECODE == "prmt":
        return tl.inline_asm_elementwise(
            TABLE_BF16 if tl.bfloat16 == X else TABLE_FP16,
            TABLE_OPERANDS,
            [codebook_ptr.to(tl.int64)],
            dtype=(tl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        return rounded(tl.load(codebook_ptr + tl.arange(0, 16)), X, DOT)


@triton.jit
def decode_4bit(words, table, DOT: tl.constexpr, DECODE: tl.constexpr):
    """words [R, W] of eight codes -> their numbers [R, 8 W] in DOT."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if DECODE == "prmt":
        t0, t1, t2, t3, t4, t5, t6, t7 = table
        n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
            DECODE_4BIT,
            DECODE_4BIT_OPERANDS,
            [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.bfloat16,) * 8 if tl.bfloat16 == DOT else (tl.float16,) * 8,
            is_pure=True,
            pack=1,
        )
        even = tl.join(tl.join(n0, n4), tl.join(n2, n6))  # [R, W, 2, 2]
        odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
        return tl.join(even, odd).reshape(R, 8 * W)
    else:
        shifts = (4 * tl.arange(0, 8)) ^ 4  # 4, 0, 12, 8, ...: the high nibble first
        codes = (words[:, :, None] >> shifts[None, None, :]) & 15
        return tl.gather(table, codes.reshape(8 * R * W), 0).reshape(R, 8 * W)


@triton.jit
def decode_int8(words, DECODE: tl.constexpr):
    """words [R, W] of four two's complement bytes -> [R, 4 W] fp32."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if DECODE == "prmt":
        n0, n1, n2, n3 = tl.inline_asm_elementwise(
            DECODE_INT8, "=f,=f,=f,=f,r", [words], dtype=(tl.float32,) * 4, is_pure=True, pack=1
        )
        return tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(R, 4 * W)
    else:
        left = words[:, :, None] << (24 - 8 * tl.arange(0, 4))[None, None, :]
        return (left >> 24).to(tl.float32).reshape(R, 4 * W)


@triton.jit
def block_scales(block, mask, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr):
    """absmax of blocks (indices), fp32, in the shape of `block`."""
    absmax = tl.load(absmax_ptr + block, mask=mask)
    if nested_absmax_ptr is not None:
        group = tl.load(nested_absmax_ptr + (block >> 8), mask=mask)  # NESTED_BLOCK = 256
        absmax = tl.load(nested_codebook_ptr + absmax.to(tl.int32), mask=mask) * group + tl.load(offset_ptr)
    return absmax


@triton.jit
def scaled(w, scale, X: tl.constexpr, DOT: tl.constexpr):
    """w [R, C] times scale [R, S] of its blocks, both in X, rounded to X."""
    R: tl.constexpr = w.shape[0]
    C: tl.constexpr = w.shape[1]
    S: tl.constexpr = scale.shape[1]
    w = w.reshape(R, S, C // S)
    scale = rounded(scale, X, DOT)[:, :, None]
    w = w * scale if DOT == X else rounded(w * scale, X, DOT)
    return w.reshape(R, C)


@triton.jit
def sum_splits_kernel(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order; parts [SPLITS, size] fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLITS):
        total += tl.load(parts_ptr + at, mask=at < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


class Config(NamedTuple):
    """A tile of W is BLOCK_N x BLOCK_K; `splits` programs share the sum of a tile of the result."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    splits: int


def fitting(configs: list[Config], M: int) -> list[Config]:
    """Those with the smallest tile of x that holds M rows, or with the largest."""
    sizes = sorted({config.BLOCK_M for config in configs})
    rows = next((size for size in sizes if size >= M), sizes[-1])
    return [config for config in configs if rows == config.BLOCK_M]


def pick(configs: list[Config], M: int, N: int, K: int, transposed: bool) -> Config:
    """The first configuration for M rows that fills the GPU, if its splits still have STEPS steps each."""
    best, *more = fitting(configs, M)
    for config in (best, *more):
        programs, steps = tiles(config, N, K, transposed)
        if config.splits > 1 and steps < STEPS * config.splits:
            break
        best = config
        if programs * config.splits >= PROGRAMS:
            break
    return best


def tiles(config: Config, N: int, K: int, transposed: bool) -> tuple[int, int]:
    """Tiles of W's two sides: along the result, and along the sum."""
    along = -(-N // config.BLOCK_N), -(-K // config.BLOCK_K)
    return along[::-1] if transposed else along


_fastest = {}


def choose_config(kernel, configs, x, weight: Packed, transposed: bool, run) -> Config:
    """`pick`, or under `using(deterministic=False)` the fastest on this GPU, timed once for a bucket of M."""
    if runtime.setting("deterministic") or not x.is_cuda:
        return pick(configs, x.shape[0], *weight.shape, transposed)
    candidates = fitting(configs, x.shape[0])
    key = kernel, candidates[0].BLOCK_M, *weight.shape, weight.block_size, weight.nested, x.dtype, x.device
    if key not in _fastest:
        _fastest[key] = min(candidates, key=lambda config: milliseconds(lambda: run(config)))
    return _fastest[key]


def milliseconds(run) -> float:
    """The median of 20 runs on the GPU, after 3 others."""
    times = []
    for _ in range(23):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times[3:])[10]


def launch(kernel, configs: list[Config], x: torch.Tensor, weight: Packed, transposed: bool, **more):
    """x W^T or x W by a fused kernel: one launch, and one more for the sum of splits."""

    def run(config: Config) -> torch.Tensor:
        return launch_config(kernel, config, x, weight, transposed, **more)

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run(choose_config(kernel, configs, x, weight, transposed, run))


def launch_config(kernel, config: Config, x, weight: Packed, transposed: bool, **more) -> torch.Tensor:
    """The interpreter's results are fp32 first: it truncates to bf16."""
    M, (N, K) = x.shape[0], weight.shape
    outputs = K if transposed else N
    if transposed:  # a tile narrower than it should be is longer instead
        width = gcd(config.BLOCK_K, K)
        config = config._replace(BLOCK_K=width, BLOCK_N=config.BLOCK_N * config.BLOCK_K // width)
    else:
        config = config._replace(BLOCK_K=min(config.BLOCK_K, weight.block_size))
    across, steps = tiles(config, N, K, transposed)
    dtype = torch.float32 if runtime.INTERPRETED else x.dtype
    out = torch.empty(M, outputs, dtype=dtype, device=x.device)
    parts = out
    if config.splits > 1:
        parts = torch.empty(config.splits, M, outputs, dtype=torch.float32, device=x.device)
    kernel[(triton.cdiv(M, config.BLOCK_M), across, config.splits)](
        x,
        weight.packed.view(torch.int32),
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        weight.nested_codebook,
        parts,
        M,
        N,
        K,
        triton.cdiv(steps, config.splits),
        **more,
        BLOCK_SIZE=weight.block_size,
        DOT=runtime.dot_dtype(x),
        DECODE="gather" if x.dtype == torch.float32 else runtime.DECODE,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if config.splits > 1:
        grid = (triton.cdiv(out.numel(), 1024),)
        sum_splits_kernel[grid](parts, out, out.numel(), SPLITS=config.splits, BLOCK=1024)
    return out.to(x.dtype)
