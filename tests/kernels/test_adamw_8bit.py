"""minift.kernels.adamw_8bit: the kernel bit for bit as its reference; laws of the codes; mutants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_code import Build
from mutants import survives

from minift.kernels import adamw_8bit as op
from minift.kernels import runtime
from minift.kernels.adamw_8bit import BLOCK, CELLS, FIRST, Moments, adamw_8bit, adamw_8bit_ref, make_map
from minift.kernels.runtime import tl
from minift.optim.adamw_8bit import dynamic_map

MAPS = make_map(dynamic_map(signed=True)), make_map(dynamic_map(signed=False))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBERS = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
ONLY_G = {**NUMBERS, "betas": (0.0, 0.0)}  # m = g
SIZES = [0, 1, 16, 255, 256, 257, 2000, 4096, 4097, 8208]
GUARD = 512


def draw(n, dtype=torch.float32, seed=0):
    """p, g and random moments; heavy tails, a tenth of g zero, and the second block of g and moments zero."""
    g = torch.Generator().manual_seed(seed + n)
    p, grad = (torch.randn(n, generator=g) * torch.randn(n, generator=g).exp() for _ in range(2))
    codes = [torch.randint(0, 256, (n,), generator=g).byte() for _ in range(2)]
    absmax = [torch.rand(-(-n // BLOCK), generator=g) * scale for scale in (1e-1, 1e-2)]
    grad[torch.rand(n, generator=g) < 0.1] = 0
    for x in (grad[BLOCK : 2 * BLOCK], absmax[0][1:2], absmax[1][1:2]):
        x.zero_()
    return p.to(dtype), (grad / 10).to(dtype), Moments(codes[0], absmax[0], codes[1], absmax[1])


def empty(n):
    """Moments before the first step."""
    codes, absmax = torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // BLOCK))
    return Moments(codes, absmax, codes.clone(), absmax.clone())


def fenced(x, offset, device):
    """(a copy of x, `offset` elements further than needed in a buffer of sentinels; the buffer)."""
    buffer = torch.full((x.numel() + 2 * GUARD,), 77, dtype=x.dtype, device=device)
    inside = buffer[GUARD + offset :][: x.numel()]
    return inside.copy_(x), buffer


def same(got, want):
    return bool(((got == want) | (got != got) & (want != want)).all())


def compare(module, tensors, numbers, maps=MAPS, offset=0, device="cpu", said=None):
    """One call for all (p, g, moments) leaves what the reference does and nothing around it; g unchanged.

    `said`, where not all elements have codes that mean something, is where they have.
    """
    results, buffers, arguments = [], [], []
    for p, g, state in tensors:
        parts, around = zip(*(fenced(x, offset, device) for x in (p, g, *state)), strict=True)
        arguments.append((*parts[:2], Moments(*parts[2:])))
        want = p.clone(), g.clone(), Moments(*(x.clone() for x in state))
        adamw_8bit_ref(*([x] for x in want), maps, **numbers)
        results += zip(parts, (*want[:2], *want[2]), strict=True)
        buffers += around
    here = [module.make_map(one.values, device) for one in maps]
    module.adamw_8bit(*(list(x) for x in zip(*arguments, strict=True)), here, **numbers)
    for got, want in results:
        where = said if said is not None and want.dtype == torch.uint8 else slice(None)
        assert same(got.cpu()[where], want[where])
    for buffer in buffers:
        assert (buffer[: GUARD + offset] == 77).all() and (buffer[offset - GUARD :] == 77).all()


def edges(values):
    """Blocks with absmax 1 of every midpoint, its neighbours in fp32, the values, and numbers around zero."""
    midpoints, infinity = (values[:-1] + values[1:]) / 2, torch.tensor(float("inf"))
    few = torch.tensor([0.0, 2.0**-30, 1e-45, 0.9999999, *(-values[:255] / 3)])
    x = torch.cat((midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity), values, few))
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % (BLOCK - 1))).view(-1, BLOCK - 1)
    return torch.cat((blocks, torch.ones(len(blocks), 1)), dim=1).view(-1)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_one_launch_updates_every_size_as_the_reference(dtype, offset, device):
    sizes = SIZES if offset == 0 else SIZES[:7]
    compare(op, [draw(n, dtype) for n in sizes], NUMBERS, offset=offset, device=device)


@pytest.mark.triton
@pytest.mark.parametrize("one", MAPS)
def test_codes_are_the_nearest_and_the_lower_of_two_equally_near(one, device):
    """m = g under betas of 0, so that m passes through every midpoint."""
    g = edges(one.values)
    compare(op, [(0 * g, g, empty(g.numel()))], ONLY_G, (one, MAPS[1]), device=device)
    moments = empty(g.numel())
    adamw_8bit_ref([0 * g], [g], [moments], (one, MAPS[1]), **ONLY_G)
    midpoints = (one.values[:-1] + one.values[1:]) / 2
    assert torch.equal(moments.m_codes.long(), (midpoints < g[:, None]).sum(dim=1))


SPECIAL = {
    "zeros": lambda x: x.zero_(),
    "minus zero": lambda x: x.zero_().neg_(),
    "constant": lambda x: x.fill_(-0.3),
    "one outlier": lambda x: x[7:8].fill_(1e4),
    "absmax first": lambda x: x[0:1].fill_(9),
    "absmax last": lambda x: x[-1:].fill_(-9),
    "subnormal": lambda x: x.mul_(1e-39),
    "square is subnormal": lambda x: x.mul_(1e-20),
    "largest": lambda x: x[3:5].fill_(torch.finfo(torch.float32).max),
    "square is infinite": lambda x: x[3:5].fill_(1e20),
    "infinity": lambda x: x[3:4].fill_(float("-inf")),
    "NaN": lambda x: x[4:5].fill_(float("nan")),
}


@pytest.mark.triton
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_gradients(kind, device):
    p, g, state = draw(3 * BLOCK + 40, seed=1)
    SPECIAL[kind](g[:BLOCK])
    SPECIAL[kind](g[3 * BLOCK :])
    moments = empty(g.numel()) if "subnormal" in kind or "zero" in kind else state
    said = (g * g).isfinite().view(-1, 1)
    said = torch.arange(g.numel()) // BLOCK % 3 > 0 if not said.all() else None
    compare(op, [(p, g, moments)], NUMBERS, device=device, said=said)


@pytest.mark.triton
def test_tensors_together_and_alone_get_the_same_bits(device):
    tensors = [
        draw(n, dtype) for n, dtype in [(300, DTYPES[0]), (512, DTYPES[1]), (48, DTYPES[2]), (1, DTYPES[0])]
    ]
    compare(op, tensors, NUMBERS, device=device)
    for one in tensors:
        compare(op, [one], NUMBERS, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_the_whole_grid_and_the_same_bits_each_time(dtype, offset):
    rows, columns = [1, 2, 3, 7, 16, 17, 64, 127, 128, 129], [1, 8, 31, 32, 33, 63, 65, 192, 1000, 4096]
    tensors = [draw(n * k, dtype, seed=n) for n in rows for k in columns]
    for _ in range(5):
        compare(op, tensors, NUMBERS, offset=offset, device="cuda")


@given(st.integers(0, 10**6), st.integers(-20, 20))
def test_gradients_times_a_power_of_two_have_the_same_codes(seed, k):
    _, g, _ = draw(700, seed=seed)
    one, other = empty(700), empty(700)
    for scale, moments in ((1.0, one), (2.0**k, other)):
        adamw_8bit_ref([torch.zeros(700)], [g * scale], [moments], MAPS, **NUMBERS)
    assert torch.equal(one.m_codes, other.m_codes) and torch.equal(one.v_codes, other.v_codes)
    assert torch.equal(one.m_absmax * 2.0**k, other.m_absmax)
    assert torch.equal(one.v_absmax * 4.0**k, other.v_absmax)


@given(st.integers(0, 10**6))
def test_decoded_moments_are_the_nearest_and_zero_and_a_positive_absmax_are_exact(seed):
    """x / absmax is rounded twice and a midpoint once, u = 2^-24 each: x may fall on the wrong side of it by
    3 u absmax, which is 6 u absmax further from its code than from the nearest."""
    _, g, _ = draw(700, seed=seed)
    g[::BLOCK] = 2 * g.abs().max()
    moments = empty(700)
    adamw_8bit_ref([torch.zeros(700)], [g], [moments], MAPS, **ONLY_G)
    for x, codes, absmax, one in ((g, *moments[:2], MAPS[0]), (g * g, *moments[2:], MAPS[1])):
        scale = absmax.repeat_interleave(BLOCK)[:700].double()
        away = (one.values.double() * scale[:, None] - x.double()[:, None]).abs()  # (700, 256)
        chosen = away.gather(1, codes.long()[:, None])[:, 0]
        assert (chosen <= away.amin(dim=1) + 6 * 2.0**-24 * scale).all()
        assert (chosen[::BLOCK] == 0).all() and (chosen[x == 0] == 0).all()


@pytest.mark.parametrize("chunk", [256, 1024, 2**18])
def test_torch_updates_in_pieces_to_the_same_bits(chunk, monkeypatch):
    monkeypatch.setattr(op, "CHUNK", chunk)
    with runtime.using("torch"):
        compare(op, [draw(n, dtype) for n in SIZES[:8] for dtype in DTYPES], NUMBERS)
        adamw_8bit([], [], [], MAPS, **NUMBERS)


ERRORS = [
    ("1 params, 0 grads, 1 states", lambda p, g, s: ([p], [], [s])),
    ("only dense gradients", lambda p, g, s: ([p], [g.to_sparse()], [s])),
    ("same dtype .fp32, bf16 or fp16.", lambda p, g, s: ([p.double()], [g.double()], [s])),
    ("same dtype", lambda p, g, s: ([p], [g.bfloat16()], [s])),
    ("same shape", lambda p, g, s: ([p], [g.view(-1)], [s])),
    ("not contiguous", lambda p, g, s: ([p.t()], [g.t()], [s])),
    ("not contiguous", lambda p, g, s: ([p], [g[:1].expand(16, 20)], [s])),
    ("not all on cpu", lambda p, g, s: ([p], [g.to("meta")], [s])),
    (r"got torch.uint8 \(319,\)", lambda p, g, s: ([p], [g], [s._replace(m_codes=s.m_codes[1:])])),
    ("got torch.float64", lambda p, g, s: ([p], [g], [s._replace(v_absmax=s.v_absmax.double())])),
]


@pytest.mark.parametrize("match, broken", ERRORS)
def test_what_it_cannot_update_is_an_error(match, broken):
    p, g, state = draw(320)
    with pytest.raises(ValueError, match=match):
        adamw_8bit(*broken(p.view(16, 20), g.view(16, 20), state), MAPS, **NUMBERS)


@pytest.mark.parametrize("wrong", [{"step": 0}, {"eps": 0.0}, {"eps": 1e-40}])
def test_numbers_that_would_divide_by_zero_are_errors(wrong):
    with pytest.raises(ValueError, match="steps count from 1, and eps is at least"):
        adamw_8bit([], [], [], MAPS, **{**NUMBERS, **wrong})


MAP_ERRORS = [
    ("256 ascending", torch.arange(255.0)),
    ("256 ascending", -torch.arange(256.0)),
    ("zero among them", torch.linspace(0.1, 1, 256)),
    ("midpoints outside", torch.linspace(-1.1, 0, 256)),
    ("less than 1/128", torch.cat((torch.zeros(1), torch.linspace(0.9, 0.99, 255)))),
]


@pytest.mark.parametrize("match, values", MAP_ERRORS)
def test_a_map_that_has_no_cells_is_an_error(match, values):
    with pytest.raises(ValueError, match=match):
        make_map(values)


def check(module):
    """Five programs of three tensors, odd sizes, a block of zeros, only small codes; and every midpoint."""
    module.BLOCKS_PER_PROGRAM = 2
    p, g, state = draw(40)
    state.m_codes.fill_(130)
    compare(module, [draw(4 * BLOCK + 37), draw(40), (p, 0 * g, state)], NUMBERS)
    g = edges(MAPS[0].values)
    compare(module, [(0 * g, g, empty(g.numel()))], ONLY_G)


MUTANTS = [
    ("tl.load(map_ptr + code, mask=inside, other=0)", "tl.load(map_ptr + code)"),
    ("tl.where(bits < 0x00800000, 0, bits)", "tl.where(bits < 0x00800000, 1, bits)"),
    ("CELLS - 1) - sign * CELLS", "CELLS - 1)"),
    ("CELLS - 1) - sign * CELLS", "CELLS - 2) - sign * CELLS"),
    ("((bits ^ sign) & 0xFFFF)", "(bits & 0xFFFF)"),
    ("65535 - place, 0)", "65534 - place, 0)"),
    ("code.to(tl.uint8), mask=inside)", "code.to(tl.uint8))"),
    ("_store(v, v_codes_ptr, v_absmax_ptr, v_cells_ptr", "_store(v, v_codes_ptr, v_absmax_ptr, m_cells_ptr"),
    ("m * beta1", "m * beta2"),
    ("v * beta2 + g * g * one_minus_beta2", "v * beta2 + g * (g * one_minus_beta2)"),
    ("tl.sqrt_rn(v) * root + eps", "tl.sqrt_rn(v) * root"),
    ("p * keep - ", "p - "),
    ("tl.cdiv(n, BLOCK)", "n // BLOCK"),
    ("tl.minimum(first + BLOCKS_PER_PROGRAM,", "tl.minimum(first + BLOCKS_PER_PROGRAM - 1,"),
    ("(program - tl.load(row + 7))", "program"),
    ("tl.load(row + 4).to", "tl.load(row + 2).to"),
]


@pytest.mark.triton
def test_the_check_for_mutants_passes(monkeypatch):
    monkeypatch.setattr(op, "BLOCKS_PER_PROGRAM", op.BLOCKS_PER_PROGRAM)  # and back, afterwards
    check(op)


@pytest.mark.triton
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_are_noticed(old, new):
    assert not survives(check, op, old, new)


FLOATS = ["beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "keep", "step_size", "root", "eps"]
MAP_POINTERS = {"m_map": "*fp32", "m_cells": "*i32", "v_map": "*fp32", "v_cells": "*i32"}
POINTERS = {"table": "*i64", "owner": "*i64", **MAP_POINTERS}


def build(name, dtype, aligned, budget, promises=()):
    constants = {"DTYPE": dtype, "ALIGNED": aligned, "BLOCK": BLOCK, "BLOCKS_PER_PROGRAM": 16}
    return Build(
        name,
        op.adamw_8bit_kernel,
        {**{f"{name}_ptr": kind for name, kind in POINTERS.items()}, **dict.fromkeys(FLOATS, "fp32")},
        {**constants, "FIRST": FIRST, "CELLS": CELLS},
        warps=1,
        aligned=tuple(f"{name}_ptr" for name in POINTERS),
        elements=BLOCK / 32,
        budget=budget,
        promises=promises,
        options={"enable_fp_fusion": False},
    )


WIDE = ("LDG.E.128", "STG.E.128", "LDG.E.64", "STG.E.64")
BUILDS = [
    build("bf16", tl.bfloat16, True, 106, WIDE),
    build("fp32", tl.float32, True, 108, WIDE),
    build("fp16", tl.float16, True, 106, WIDE),
    build("bf16, odd sizes", tl.bfloat16, False, 130),
]
