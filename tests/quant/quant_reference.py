"""Block quantization once more, slowly, in numpy and from the golden tables; and weights to try it on."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

GOLDEN = Path(__file__).parent.parent / "golden"
TABLES = json.loads((GOLDEN / "quant_tables.json").read_text(encoding="utf-8"))
BLOCKS = json.loads((GOLDEN / "quant_blocks.json").read_text(encoding="utf-8"))
F32 = np.float32
TINY = 2.0**-126  # the smallest normal fp32

NAMES = ("nf4", "fp4", "int8", "int8_dynamic")
BITS = {"nf4": 4, "fp4": 4, "int8": 8, "int8_dynamic": 8}
ZERO_CODE = {"nf4": 7, "fp4": 0, "int8": 0, "int8_dynamic": 127}  # of blocks of zeros
VALUES = {name: np.array(TABLES[name], dtype=F32) for name in ("nf4", "fp4", "int8_dynamic")}
VALUES["int8"] = np.array([np.int8(np.uint8(code)) / 127 for code in range(256)], dtype=F32)
# Half of the widest gap between neighbours; for the dynamic map the distance of its lowest value from -1, and
# half a step of its grid. By hand from the tables: nf4 -1 to -0.6961928, fp4 1/3 to 2/3.
BOUND = {"nf4": 0.1519036, "fp4": 0.1666667, "int8": 0.5 / 127, "int8_dynamic": 0.0070313 + 1 / 65535}


def rank(s, sorted_values):
    """How many fp32 midpoints of neighbours lie below each number: the nearest; on a tie, the lower."""
    midpoints = (sorted_values[:-1] + sorted_values[1:]) / F32(2)
    return (s[:, None] > midpoints[None, :]).sum(axis=1)


def encode_block(name, w, absmax, short):
    if absmax == 0:
        return np.full(len(w), ZERO_CODE[name])
    # the rule of bitsandbytes on CPUs: only a short block is divided, and none of the dynamic map's
    s = w / absmax if short and name != "int8_dynamic" else w * (F32(1) / absmax)
    if name == "int8":
        return np.rint(s * F32(127)).astype(np.int64) % 256
    values = VALUES[name]
    if name == "int8_dynamic":
        half = (np.clip(s, F32(-1), F32(1)) + F32(1)) * F32(0.5)
        step = np.floor(half * F32(65535) + F32(0.5))
        s = F32(-1) + F32(2) * step / F32(65535)
    order = np.argsort(values, kind="stable")
    return order[rank(s, values[order])]


def quantize(name, w, block_size):
    """w (n,) -> codes (n,), absmax (blocks,)."""
    w, codes, scales = np.asarray(w, dtype=F32), [], []
    for start in range(0, len(w), block_size):
        block = w[start : start + block_size]
        absmax = np.abs(block).max()
        absmax = absmax if absmax >= F32(TINY) else F32(0)
        codes.append(encode_block(name, block, absmax, len(block) < block_size))
        scales.append(absmax)
    return np.concatenate(codes).astype(np.uint8), np.array(scales, dtype=F32)


def quantize_absmax(differences):
    """absmax - mean -> codes, nested absmax; a group of equal scales has codes 0, as in bitsandbytes."""
    codes, nested = quantize("int8_dynamic", differences, 256)
    return np.where(nested.repeat(256)[: len(codes)] == 0, 0, codes).astype(np.uint8), nested


def pack(name, codes):
    if BITS[name] == 8:
        return codes
    codes = [*codes.tolist(), ZERO_CODE[name]]
    return np.array([16 * a + b for a, b in zip(codes[0:-1:2], codes[1::2], strict=True)], dtype=np.uint8)


def unpack(name, packed, n):
    packed = torch.as_tensor(packed)
    codes = packed if BITS[name] == 8 else torch.stack((packed // 16, packed % 16), dim=1).view(-1)
    return codes[:n].int()


def dequantize(name, codes, absmax, block_size, dtype=torch.float32):
    """Values times absmax in fp32; rounded once."""
    products = VALUES[name][codes] * absmax.repeat(block_size)[: len(codes)]
    return torch.from_numpy(products).to(dtype)


def same_bits(a, b):
    a, b = (torch.as_tensor(x) for x in (a, b))
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(size), b.view(size))


@contextmanager
def new_memory_filled():
    """torch.empty gives NaN or 255 and never what an earlier, right computation left in memory."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ("normal", "uniform", "constant", "outlier", "sparse", "wide", "integers", "edges", "drawn")
# 2^k of the blocks. Down to blocks of zeros, up to products that just do not overflow.
EXPONENTS = {torch.float32: (-140, 120), torch.bfloat16: (-140, 120), torch.float16: (-24, 12)}
MIDPOINTS = {name: (np.sort(v)[:-1] + np.sort(v)[1:]) / F32(2) for name, v in VALUES.items()}
# where the grid of the dynamic map changes from one code to the next: half a step before the first of it
GRID = (2 * np.ceil((MIDPOINTS["int8_dynamic"].astype(np.float64) + 1) / 2 * 65535) - 1) / 65535 - 1
EDGES = np.concatenate([*MIDPOINTS.values(), GRID.astype(F32)])


def specials(dtype):
    info = torch.finfo(dtype)
    sizes = [0.0, info.tiny * info.eps, info.tiny / 2, info.tiny, 1.0, info.max]
    return [*sizes, *(-x for x in sizes)]


def fill(shape, size, rng):
    """A block at scale 1."""
    normal = rng.standard_normal(size)
    if shape == "uniform":
        return rng.uniform(-1, 1, size)
    if shape == "constant":
        return np.full(size, normal[0])
    if shape == "outlier":
        return np.where(np.arange(size) == rng.integers(size), 8.0, 0.1 * normal)
    if shape == "sparse":
        return normal * (rng.random(size) < 0.1)
    if shape == "wide":
        return np.exp2(rng.uniform(-30, 0, size)) * np.sign(normal)
    if shape == "integers":
        return rng.integers(-12, 13, size)
    if shape == "edges":
        edges = rng.choice(EDGES, size)
        beside = np.nextafter(edges, rng.choice([-2, 2], size).astype(F32), dtype=F32)
        edges = np.where(rng.random(size) < 0.5, edges, beside)
        edges[rng.integers(size)] = rng.choice([-1, 1])
        return edges
    return normal


@st.composite
def blocks(draw, size, dtype, exponents=None, special=True):
    """One block."""
    shape = draw(st.sampled_from(SHAPES))
    if shape == "drawn":
        block = draw(arrays(F32, size, elements=st.floats(-1, 1, width=32)))
    else:
        block = fill(shape, size, np.random.default_rng(draw(st.integers(0, 2**16))))
    block = np.ldexp(block, draw(st.integers(*(exponents or EXPONENTS[dtype]))))
    block = torch.from_numpy(block).to(torch.float32).to(dtype)
    if special and draw(st.booleans()):
        block[draw(st.integers(0, size - 1))] = draw(st.sampled_from(specials(dtype)))
    return block


@st.composite
def weights(draw, dtypes=DTYPES, whole=False, **of_blocks):
    """A flat weight and its block size: up to 3 whole blocks and, unless `whole`, a short one."""
    dtype, block_size = draw(st.sampled_from(dtypes)), draw(st.sampled_from([32, 32, 64, 64, 128, 512, 2048]))
    rest = 0 if whole else draw(st.integers(0, block_size - 1))
    count = draw(st.integers(0 if rest else 1, 3))
    sizes = [block_size] * count + ([rest] if rest else [])
    return torch.cat([draw(blocks(size, dtype, **of_blocks)) for size in sizes]), block_size
