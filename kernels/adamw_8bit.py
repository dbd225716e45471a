"""AdamW with both moments in 8 bits, many tensors in one launch.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2                  from the decoded m and v
    p = p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    absmax = max |m| of a block,   code = nearest of m / absmax,   decoded = map[code] * absmax

and v likewise; p is updated with m and v as they are before encoding. A tensor of n elements is cut into
blocks of 256, the last may be short; m has a signed map, v an unsigned one.

A map is 256 ascending numbers; the code of x is the number of midpoints strictly below it: the nearest value,
on a midpoint the lower one. Positive fp32 numbers are ordered as their bits are, so the upper 16 bits name a
cell of numbers and the lower 16 a place in it. A cell holds at most one midpoint, and its entry is

    code at its start * 65536 + (65535 - place of the midpoint, or 0 without one)

so that adding the place of x carries into the code exactly where x is above the midpoint. Negative numbers
have cells of their own, whose places count from the far end.

What limits it: bytes, 10 an element for bf16 and 16 for fp32 (p, g, m, v are read, p, m, v written), and the
100 instructions of an element (tests/kernels/test_adamw_8bit.py), four of them look-ups in L1.
Source: Dettmers et al. 2022, arXiv:2110.02861, section 2; Loshchilov and Hutter 2019, arXiv:1711.05101,
algorithm 2 (weight decay apart from the gradient).
"""

from typing import NamedTuple

import torch

from minift.kernels import library, runtime
from minift.kernels.runtime import tl, triton

BLOCK = 256
FIRST, CELLS = 103 * 128, 24 * 128 + 1  # 128 cells an octave, from 2^-24 (and all below it) to 1
CHUNK = 2**18  # elements that plain torch updates at a time
BLOCKS_PER_PROGRAM = 16  # a program is one warp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = torch.finfo(torch.float32).tiny


class Map(NamedTuple):
    values: torch.Tensor  # (256,) fp32, ascending
    cells: torch.Tensor  # (2, CELLS) int32: of positive numbers, of negative ones


class Moments(NamedTuple):
    """The state of a parameter of n elements; all zeros before the first step."""

    m_codes: torch.Tensor  # (n,) uint8
    m_absmax: torch.Tensor  # (ceil(n / 256),) fp32
    v_codes: torch.Tensor
    v_absmax: torch.Tensor


def make_map(values, device=None) -> Map:
    """The map of 256 ascending numbers with zero among them, whose midpoints lie in 2^-23 to 1."""
    values = torch.as_tensor(values, dtype=torch.float32, device="cpu")
    if values.shape != (256,) or not (values.diff() > 0).all() or 0 not in values:
        raise ValueError("a map is 256 ascending numbers with zero among them")
    midpoints = (values[:-1] + values[1:]) / 2
    start = torch.arange(FIRST, FIRST + CELLS, dtype=torch.int32, device="cpu") << 16
    low, high = start.view(torch.float32), (start + 65535).view(torch.float32)
    cells = torch.stack((_entries(low, high, midpoints), _entries(-high, -low, midpoints)))
    return Map(values.to(device), cells.to(device))


def _entries(lowest, highest, midpoints):
    """Of cells that hold the numbers from `lowest` to `highest`: both (CELLS,) -> (CELLS,) int32."""
    code, last = torch.bucketize(lowest, midpoints), torch.bucketize(highest, midpoints)
    outside = (midpoints.abs() < 2.0**-23).any() or (midpoints.abs() >= 1).any()
    if outside or (last - code).max() > 1:
        raise ValueError(
            "a map with midpoints outside 2^-23 to 1, or with two that differ by less than 1/128 of their "
            "size, has no table of cells; use a coarser one"
        )
    midpoint = midpoints[code.clamp(max=254)]
    place = (midpoint.view(torch.int32) - lowest.view(torch.int32)).abs()
    return (code * 65536 + torch.where(last > code, 65535 - place, 0)).int()


@torch.no_grad()
def adamw_8bit_ref(params, grads, states, maps, step, lr, betas, eps, weight_decay):
    """One step in place; tensors must not overlap.

    params, grads: lists of tensors, fp32, bf16 or fp16; states: `Moments` of each; maps: `Map` of m and of v;
    step counts from 1. All in fp32, every operation rounded by itself, the numbers that are the same for all
    elements computed in fp64 and rounded once; p is rounded to its dtype at the end. A block whose absmax is
    below 2^-126 becomes zeros. A number that is not finite makes absmax, so the whole block, not finite.
    """
    beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, root, eps = _numbers(
        step, lr, betas, eps, weight_decay
    )
    for p, g, state in zip(params, grads, states, strict=True):
        g = g.reshape(-1).float()
        m = _decode(state.m_codes, state.m_absmax, maps[0].values) * beta1 + g * one_minus_beta1
        v = _decode(state.v_codes, state.v_absmax, maps[1].values) * beta2 + g * g * one_minus_beta2
        root_v = v.double().sqrt().float()  # of fp32 numbers, torch.sqrt is not correctly rounded on CPUs
        update = m / (root_v * root + eps)
        p.copy_((p.reshape(-1).float() * keep - update * step_size).view(p.shape))
        _encode(m, state.m_codes, state.m_absmax, maps[0].values)
        _encode(v, state.v_codes, state.v_absmax, maps[1].values)


def _numbers(step, lr, betas, eps, weight_decay) -> tuple[float, ...]:
    """What is the same for all elements, in the kernel's order."""
    beta1, beta2 = betas
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    return beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, step_size, root, eps


def _decode(codes, absmax, values):
    return values[codes.int()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def _encode(x, codes, absmax, values):
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    largest = largest.masked_fill(largest < TINY, 0)
    scaled = blocks * (1 / largest.masked_fill(largest == 0, float("inf")))[:, None]
    midpoints = (values[:-1] + values[1:]) / 2
    codes.copy_(torch.bucketize(scaled, midpoints).view(-1)[: codes.numel()])
    absmax.copy_(largest)


@triton.jit
def _load(codes_ptr, absmax_ptr, map_ptr, block, at, inside):
    """The decoded numbers of a block; zeros after the end of a short one."""
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)  # [BLOCK]
    return tl.load(map_ptr + code, mask=inside, other=0) * tl.load(absmax_ptr + block)


@triton.jit
def _store(x, codes_ptr, absmax_ptr, cells_ptr, block, at, inside, FIRST: tl.constexpr, CELLS: tl.constexpr):
    """Encode the numbers of a block."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # as integers, NaN is the largest
    absmax = tl.where(bits < 0x00800000, 0, bits).to(tl.float32, bitcast=True)
    scaled = x * tl.div_rn(1.0, tl.where(absmax == 0, float("inf"), absmax))
    bits = scaled.to(tl.int32, bitcast=True)  # [BLOCK]
    sign = bits >> 31  # -1 for negative numbers, otherwise 0
    cell = ((bits & 0x7FFFFFFF) >> 16) - FIRST
    cell = tl.minimum(tl.maximum(cell, 0), CELLS - 1) - sign * CELLS
    code = (tl.load(cells_ptr + cell) + ((bits ^ sign) & 0xFFFF)) >> 16
    tl.store(codes_ptr + at, code.to(tl.uint8), mask=inside)
    tl.store(absmax_ptr + block, absmax)


@triton.jit
def adamw_8bit_kernel(
    table_ptr,  # (tensors, 8) int64: addresses of p, g and the four moments, n, the first program
    owner_ptr,  # (programs,) int64: the tensor that a program works on
    m_map_ptr,
    m_cells_ptr,
    v_map_ptr,
    v_cells_ptr,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    keep,
    step_size,
    root,
    eps,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    FIRST: tl.constexpr,
    CELLS: tl.constexpr,
):
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program) * 8
    p_ptr = tl.load(row).to(tl.pointer_type(DTYPE))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(DTYPE))
    m_codes_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    m_absmax_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    v_codes_ptr = tl.load(row + 4).to(tl.pointer_type(tl.uint8))
    v_absmax_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    n = tl.load(row + 6)
    if ALIGNED:  # so that loads and stores are wide
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_codes_ptr, v_codes_ptr = tl.multiple_of(m_codes_ptr, 16), tl.multiple_of(v_codes_ptr, 16)
        n = tl.multiple_of(n, 16)
    first = (program - tl.load(row + 7)) * BLOCKS_PER_PROGRAM
    last = tl.minimum(first + BLOCKS_PER_PROGRAM, tl.cdiv(n, BLOCK))
    for block in range(first, last):
        at = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        inside = at < n
        g = tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32)
        m = _load(m_codes_ptr, m_absmax_ptr, m_map_ptr, block, at, inside)
        v = _load(v_codes_ptr, v_absmax_ptr, v_map_ptr, block, at, inside)
        m = m * beta1 + g * one_minus_beta1
        v = v * beta2 + g * g * one_minus_beta2
        p = tl.load(p_ptr + at, mask=inside, other=0).to(tl.float32)
        p = p * keep - tl.div_rn(m, tl.sqrt_rn(v) * root + eps) * step_size
        tl.store(p_ptr + at, p.to(DTYPE), mask=inside)
        _store(m, m_codes_ptr, m_absmax_ptr, m_cells_ptr, block, at, inside, FIRST, CELLS)
        _store(v, v_codes_ptr, v_absmax_ptr, v_cells_ptr, block, at, inside, FIRST, CELLS)


@torch.no_grad()
def adamw_8bit(params, grads, states, maps, step, lr, betas, eps, weight_decay):
    """Same contract as `adamw_8bit_ref`, and the same bits on every backend.

    On GPUs one launch for each dtype among the tensors, and one more for tensors whose size or address is
    not divisible by 16.
    """
    _check(params, grads, states, maps, step, eps)
    if not params:
        return
    backend = runtime.choose("adamw_8bit", params[0].device, ("triton", "c", "torch"))
    if backend == "torch":
        for piece in _pieces(params, grads, states):
            adamw_8bit_ref(*([x] for x in piece), maps, step, lr, betas, eps, weight_decay)
        return
    numbers = _numbers(step, lr, betas, eps, weight_decay)
    torch.autograd.graph.increment_version([*params, *(x for state in states for x in state)])
    if backend == "c":
        for dtype, _, table, owner in _tables(params, grads, states):
            library.adamw(table, owner, BLOCKS_PER_PROGRAM, dtype, maps, numbers)
    elif runtime.INTERPRETED and any(p.dtype == torch.bfloat16 for p in params):  # it truncates to bf16
        wide = [p.float() for p in params]
        _launch(wide, [g.float() for g in grads], states, maps, numbers)
        for p, updated in zip(params, wide, strict=True):
            p.copy_(updated)
    else:
        _launch(params, grads, states, maps, numbers)


def _launch(params, grads, states, maps, numbers):
    device = params[0].device
    for dtype, aligned, table, owner in _tables(params, grads, states):
        with torch.cuda.device_of(params[0]):  # Triton launches on the current device
            adamw_8bit_kernel[(owner.numel(),)](
                table.to(device),
                owner.to(device),
                *maps[0],
                *maps[1],
                *numbers,
                DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
                ALIGNED=aligned,
                BLOCK=BLOCK,
                BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM,
                FIRST=FIRST,
                CELLS=CELLS,
                num_warps=1,
                enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
            )


def _tables(params, grads, states):
    """(dtype, whether sizes and addresses are divisible by 16, table, owner) for each launch."""
    rows = {}
    for p, g, state in zip(params, grads, states, strict=True):
        row = [library.address(x) for x in (p, g, *state)] + [p.numel()]
        if p.numel():
            rows.setdefault((p.dtype, all(x % 16 == 0 for x in row)), []).append(row)
    for (dtype, aligned), group in rows.items():
        table = torch.tensor(group, device="cpu")  # (tensors, 7)
        programs = -(-table[:, 6:] // (BLOCK * BLOCKS_PER_PROGRAM))  # (tensors, 1)
        table = torch.cat((table, programs.cumsum(0) - programs), dim=1)
        yield dtype, aligned, table, torch.repeat_interleave(programs.view(-1))


def _pieces(params, grads, states):
    """(p, g, state) of at most CHUNK elements; blocks are independent, so cutting between them is exact."""
    for p, g, (m_codes, m_absmax, v_codes, v_absmax) in zip(params, grads, states, strict=True):
        yield from zip(
            p.view(-1).split(CHUNK),
            g.view(-1).split(CHUNK),
            map(
                Moments,
                m_codes.split(CHUNK),
                m_absmax.split(CHUNK // BLOCK),
                v_codes.split(CHUNK),
                v_absmax.split(CHUNK // BLOCK),
            ),
            strict=True,
        )


def _check(params, grads, states, maps, step, eps):
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"{len(params)} params, {len(grads)} grads, {len(states)} states; every parameter has one of each"
        )
    if step < 1 or not eps >= TINY:
        raise ValueError(f"step {step}, eps {eps}; steps count from 1, and eps is at least 2^-126")
    device = maps[0].values.device
    for i, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
        if g.layout != torch.strided:
            raise ValueError(f"grads[{i}] is {g.layout}; only dense gradients have 8-bit moments")
        if p.dtype not in DTYPES or g.dtype != p.dtype or g.shape != p.shape:
            raise ValueError(
                f"params[{i}] is {p.dtype} {tuple(p.shape)}, its gradient {g.dtype} {tuple(g.shape)}; "
                "they have the same dtype (fp32, bf16 or fp16) and the same shape"
            )
        if not p.is_contiguous() or not g.is_contiguous():
            raise ValueError(f"params[{i}] or its gradient is not contiguous; call .contiguous() on it")
        if not {device} >= {x.device for x in (p, g, *state, *maps[0], *maps[1])}:
            raise ValueError(f"params[{i}], its gradient, its moments and the maps are not all on {device}")
        n, blocks = p.numel(), -(-p.numel() // BLOCK)
        for x, size, dtype in zip(state, (n, blocks) * 2, (torch.uint8, torch.float32) * 2, strict=True):
            if x.dtype != dtype or x.shape != (size,) or not x.is_contiguous():
                raise ValueError(
                    f"the moments of params[{i}], which has {n} elements, are uint8 ({n},) and fp32 "
                    f"({blocks},), contiguous; got {x.dtype} {tuple(x.shape)}"
                )
