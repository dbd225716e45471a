"""dequantize_4bit: a 4-bit weight, or a slab of it, as numbers.

    out[i] = codebook[code i] * absmax[i // block_size]   in fp32, rounded once to out's dtype
    absmax[b] = nested_codebook[code of b] * nested_absmax[b // 256] + offset   under double quantization

i counts the elements of the flattened weight, n in all. Every operation is rounded by itself, so that all
backends give the same bits; the kernel is therefore compiled without fused multiply-adds.
Limit: memory. n/2 bytes of codes and n/64 of scales are read and n numbers written, once: 2.52 bytes a weight
to bf16. That leaves an H200 (4.3 TB/s, 132 processors of 128 lanes at 1.98 GHz) time for 19 instructions a
weight; the kernel has 10.3 (benchmarks/results/machine_code.md).
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.
"""

from math import prod

import torch

from minift.kernels import library
from minift.kernels.decode import block_scales
from minift.kernels.packed import NESTED_BLOCK, Packed
from minift.kernels.runtime import INTERPRETED, choose, tl, triton

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**18  # elements in flight in torch, so that the scratch stays in a CPU's cache
ROW = 4096  # elements of a flat out that are decoded as one row: whole blocks of every size


def dequantize_4bit_ref(weight: Packed, out: torch.Tensor, first: int = 0, stride: int = 0) -> torch.Tensor:
    """Fills out, contiguous, with elements first, first + 1, ... of the flattened weight, and returns it.

    stride > 0 is a slab of columns: out[r, c] = element first + r * stride + c. Then C and stride are
    multiples of block_size; first always is.
    """
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).view(-1).int()
    scales = weight.scales().repeat_interleave(weight.block_size)
    values = weight.codebook[codes] * scales[: codes.numel()]  # (n,), and one more where n is odd
    if stride:
        return out.copy_(values.as_strided(out.shape, (stride, 1), first))
    return out.copy_(values[first : first + out.numel()].view(out.shape))


@triton.jit
def dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,  # None without double quantization, like the next two
    offset_ptr,
    nested_codebook_ptr,
    out_ptr,
    first,
    stride,
    C,
    n,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # elements of a program, 32 for each thread
    VECTOR: tl.constexpr,  # packed bytes whose numbers fill 16 bytes of out
    EVEN: tl.constexpr,  # C and n are whole tiles: no masks
    ODD: tl.constexpr,  # n % 2
):
    """One program writes TILE elements of a row of out, which has rows of C elements and n in all.

    Threads take VECTOR bytes at a time, TILE / 32 of them side by side: then what a thread decodes is what it
    stores, 16 bytes at once, and nothing but the table goes through shared memory.
    """
    BLOCKS: tl.constexpr = TILE // BLOCK_SIZE
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE
    source = first + row * stride + column  # in the weight; a multiple of block_size
    target = row * C + column  # in out
    left = tl.minimum(C - column, n - target).to(tl.int32)

    byte = tl.max_contiguous(tl.arange(0, TILE // 2), VECTOR)
    element, block = tl.arange(0, TILE), tl.arange(0, BLOCKS)
    mask = None if EVEN else byte < (left + ODD) // 2
    packed = tl.load(packed_ptr + source // 2 + byte, mask=mask, eviction_policy="evict_first")  # [TILE / 2]
    mask = None if EVEN else block * BLOCK_SIZE < left
    absmax = block_scales(
        source // BLOCK_SIZE + block, mask, absmax_ptr, nested_absmax_ptr, offset_ptr, nested_codebook_ptr
    )  # [BLOCKS]

    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    code = tl.join(packed >> 4, packed & 15).reshape(TILE)
    value = tl.gather(codebook, code.to(tl.int32), 0).reshape(BLOCKS, BLOCK_SIZE) * absmax[:, None]
    mask = None if EVEN else element < left
    tl.store(out_ptr + target + element, value.reshape(TILE).to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_4bit(weight: Packed, out: torch.Tensor, first: int = 0, stride: int = 0) -> torch.Tensor:
    """Same contract as `dequantize_4bit_ref`; one launch on GPUs, no scratch of the weight's size on CPUs."""
    check("dequantize_4bit", weight, 4, out, first, stride)
    backend = choose("dequantize_4bit", out.device, implementations(out.dtype))
    if not out.numel():
        return out
    if backend == "c":
        return library.dequantize(weight, out, first, stride)
    if backend == "torch":
        pairs = torch.cartesian_prod(weight.codebook, weight.codebook)  # byte -> two numbers, (256, 2)
        return dequantize_torch(weight, pairs, out, first, stride)
    if INTERPRETED and out.dtype == torch.bfloat16:  # to which the interpreter truncates
        wide = torch.empty_like(out, dtype=torch.float32)
        return out.copy_(dequantize_4bit(weight, wide, first, stride))
    grid, rows, constants = cover(weight, out, first, stride)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        dequantize_4bit_kernel[grid](
            weight.packed,
            weight.absmax,
            weight.codebook,
            weight.nested_absmax,
            weight.offset,
            weight.nested_codebook,
            out,
            *rows,
            **constants,
            VECTOR=8 // out.element_size(),
            ODD=out.numel() % 2,
        )
    return out


def implementations(dtype: torch.dtype) -> tuple[str, ...]:
    """Backends for a dtype; fp64, in which small models are checked, is plain torch."""
    return ("torch",) if dtype == torch.float64 else ("triton", "c", "torch")


def cover(weight: Packed, out: torch.Tensor, first: int, stride: int):
    """The grid, the numbers (first, stride, C, n) and the constants of a launch: tiles that cover out.

    A flat out has rows of one tile. A slab's tile is the largest that divides its rows; block_size does too,
    and both are powers of two, so that a tile always holds whole blocks.
    """
    n, TILE = out.numel(), 4096
    if stride:
        R, C = out.shape
        TILE = next((tile for tile in (4096, 2048, 1024) if C % tile == 0), 1024)
    else:
        R, C, stride = triton.cdiv(n, TILE), TILE, TILE
    constants = {
        "BLOCK_SIZE": weight.block_size,
        "TILE": TILE,
        "EVEN": C % TILE == 0 and n % TILE == 0,
        "num_warps": TILE // 1024,
        "enable_fp_fusion": False,
    }
    return (R, triton.cdiv(C, TILE)), (first, stride, C, n), constants


def dequantize_torch(weight: Packed, table: torch.Tensor, out, first: int, stride: int) -> torch.Tensor:
    """`dequantize_4bit` in torch. table (256, numbers in a byte) fp32: byte -> its numbers."""
    if stride:
        return decode_rows(weight, table, out, first, stride)
    flat, start = out.view(-1), 0
    for width in (ROW, weight.block_size, flat.numel() % weight.block_size):
        rows = (flat.numel() - start) // width if width else 0
        if rows:
            part = flat[start : start + rows * width].view(rows, width)
            decode_rows(weight, table, part, first + start, width)
            start += rows * width
    return out


def decode_rows(weight, table, out, first, stride):
    """out[r, c] = element first + r * stride + c, for as many rows at a time as are CHUNK elements.

    A row is blocks of equal size. A byte finds its numbers with one look-up, as one fp64 where there are two.
    """
    (R, C), per_byte, size = out.shape, table.shape[1], weight.block_size
    table = table.view(torch.float64 if per_byte == 2 else torch.float32).view(1, 256)
    codes = slab(weight.packed, R, -(-C // per_byte), first // per_byte, stride // per_byte)
    absmax = slab(weight.absmax, R, -(-C // size), first // size, stride // size)
    if weight.nested:
        absmax = decode_absmax(weight, absmax, first // size, stride // size)
    step = max(1, min(R, CHUNK // C))
    index = torch.empty(step, codes.shape[1], dtype=torch.int64, device=out.device)
    entries = torch.empty(step, codes.shape[1], dtype=table.dtype, device=out.device)
    for start in range(0, R, step):
        rows = min(step, R - start)
        index[:rows].copy_(codes[start : start + rows])
        torch.gather(table.expand(rows, 256), 1, index[:rows], out=entries[:rows])
        values = entries[:rows].view(torch.float32)[:, :C].unflatten(1, (absmax.shape[1], -1))
        scale = absmax[start : start + rows, :, None]
        target = out[start : start + rows].unflatten(1, (absmax.shape[1], -1))  # (rows, blocks, block_size)
        if out.dtype == torch.float32:
            torch.mul(values, scale, out=target)
        else:
            target.copy_(values.mul_(scale))
    return out


def slab(flat, rows, columns, first, stride):
    """(rows, columns) view of a 1-D tensor."""
    return flat.as_strided((rows, columns), (stride, 1), flat.storage_offset() + first)


def decode_absmax(weight, codes, first, stride):
    """absmax, fp32, of the blocks first + r * stride + c, from their codes (rows, blocks)."""
    rows, blocks = (torch.arange(size, device=codes.device, dtype=torch.int32) for size in codes.shape)
    group = (first + stride * rows[:, None] + blocks) >> 8  # NESTED_BLOCK = 256
    absmax = weight.nested_codebook.index_select(0, codes.int().view(-1))
    absmax.mul_(weight.nested_absmax.index_select(0, group.view(-1))).add_(weight.offset)
    return absmax.view(codes.shape)


def check(op: str, weight: Packed, bits: int, out: torch.Tensor, first: int, stride: int) -> None:
    """Refuses a weight that is not what its shape says, and elements that it does not have."""
    n, size = prod(weight.shape), weight.block_size
    if size not in BLOCK_SIZES:
        raise ValueError(f"{op}: block_size is {size}; supported: {', '.join(map(str, BLOCK_SIZES))}")
    blocks = -(-n // size)
    expected = {"packed": (torch.uint8, -(-n * bits // 8)), "absmax": (torch.float32, blocks)}
    if bits == 4 or weight.codebook is not None:
        expected["codebook"] = (torch.float32, 2**bits)
    if weight.nested:
        expected["absmax"] = (torch.uint8, blocks)
        expected["nested_absmax"] = (torch.float32, -(-blocks // NESTED_BLOCK))
        expected |= {"offset": (torch.float32, 1), "nested_codebook": (torch.float32, 256)}
    for name, (dtype, count) in expected.items():
        tensor = getattr(weight, name)
        if not (
            tensor is not None
            and tensor.dtype == dtype
            and tensor.numel() == count
            and tensor.device == out.device
            and tensor.is_contiguous()
        ):
            raise ValueError(
                f"{op}: {name} is {describe(tensor)}; a weight of shape {tuple(weight.shape)} in {bits} bits "
                f"and blocks of {size} needs {dtype} ({count},), contiguous, on {out.device}"
            )
    if out.dtype not in (*DTYPES, torch.float64) or not out.is_contiguous():
        raise ValueError(f"{op}: out is {describe(out)}; it must be fp32, bf16, fp16 or fp64, and contiguous")
    check_range(op, n, size, out, first, stride)


def check_range(op, n, size, out, first, stride):
    if stride and (out.dim() != 2 or stride < 0 or stride % size or out.shape[1] % size):
        raise ValueError(
            f"{op}: out {tuple(out.shape)} with stride {stride}; a slab of columns has two dimensions, and "
            f"its width and stride are multiples of the block size, {size}"
        )
    last = first + out.numel() - 1
    if stride and out.numel():
        last = first + (out.shape[0] - 1) * stride + out.shape[1] - 1
    if first < 0 or first % size or last >= n:
        raise ValueError(
            f"{op}: out holds elements {first} to {last} of {n}; the first must be a multiple of the block "
            f"size, {size}, and the last exist"
        )


def describe(tensor) -> str:
    if tensor is None:
        return "None"
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{layout}"
