"""minift.kernels.decode_attention within an a-priori bound at every instruction set; what falls back."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from generation import assert_within, every_level, gamma, guarded, numbers, rounding
from mutants import survives

from minift.kernels import decode_attention as kernel
from minift.kernels import library, runtime
from minift.kernels.decode_attention import decode_attention, decode_attention_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, H, KV, hd, capacity, tokens in the cache, tables (rows or 0), mask (rows or 0), size of the queries
CASES = [
    (1, 1, 1, 16, 1, 0, 0, 0, 1),
    (2, 4, 2, 32, 9, 5, 1, 0, 1),
    (3, 9, 3, 64, 80, 79, 3, 3, 1),
    (2, 6, 6, 48, 33, 20, 2, 1, 1),
    (1, 2, 1, 16, 300, 250, 1, 0, 40),  # scores hundreds apart
    (64, 1, 1, 16, 2, 1, 0, 0, 0.4),  # two keys: little else than exp rounds
]

needs_c = pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")


def draw(case, dtype):
    """The arguments; what the cache holds beyond its tokens is NaN."""
    B, H, KV, hd, capacity, length, tables, masks, size = case
    q, k, v = numbers(B, 1, H * hd) * size, numbers(B, 1, KV * hd, seed=1), numbers(B, 1, KV * hd, seed=2)
    keys, values = numbers(B, KV, capacity, hd, seed=3), numbers(B, KV, capacity, hd, seed=4)
    keys[:, :, length:] = values[:, :, length:] = float("nan")
    cos, sin = (numbers(tables, 1, 1, hd, seed=s).to(dtype) if tables else None for s in (5, 6))
    mask = numbers(masks, 1, 1, length + 1) > 0 if masks else None
    if masks:
        mask[..., -1] = True
    return *(x.to(dtype) for x in (q, k, v, keys, values)), length, cos, sin, mask


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def rotated(x, cos, sin):
    """(rotated, error of doing so in fp32): two products and a sum."""
    if cos is None:
        return x, torch.zeros_like(x)
    a, b = x * cos, x.roll(x.shape[-1] // 2, dims=-1) * sin
    return a + b, gamma(3) * (a.abs() + b.abs())


def check_call(op, case, dtype, fence=guarded):
    """One call is within the bound, of the numbers that it stored.

    Scores: errors of q, hd products in fp32 and the scale; exp and the sum of S of them (8 roundings and
    gamma(S)), 0 for e^-87 and less; S products; the rounding of the result. As in test_attention.py.
    """
    args = draw(case, dtype)
    B, H, KV, hd, _, length, *_ = case
    q, k, _, keys, values, _, cos, sin, mask = map(wide, args)
    with fence():
        got = op(*args)
    stored, new = args[3].double(), rotated(k.view(B, KV, 1, hd), cos, sin)
    assert_within(stored[:, :, length : length + 1], new[0], new[1] + rounding(new[0].abs() + new[1], dtype))
    assert torch.equal(args[4][:, :, length], args[2].view(B, KV, hd))
    assert (
        torch.equal(stored[:, :, :length], keys[:, :, :length]) and stored[:, :, length + 1 :].isnan().all()
    )
    assert torch.equal(args[4][:, :, :length].double(), values[:, :, :length])

    G, S, scale = H // KV, length + 1, hd**-0.5
    K, V = (x[:, :, :S].double().repeat_interleave(G, 1) for x in (args[3], args[4]))  # (B, H, S, hd)
    q, e_q = rotated(q.view(B, H, 1, hd), cos, sin)
    s, s_abs = scale * q @ K.mT, scale * (q.abs() + e_q) @ K.abs().mT
    seen = torch.ones(1, 1, 1, S, dtype=torch.bool) if mask is None else mask
    P = s.masked_fill(~seen, float("-inf")).softmax(-1)
    e_s = (scale * e_q @ K.abs().mT + gamma(hd + 4) * s_abs) * seen
    e_P = P * torch.expm1(2 * e_s.amax(-1, keepdim=True)) + (8 * 2.0**-24 + gamma(S)) * P + 2.0**-125
    o, e_o = P @ V, (e_P + gamma(S + 2) * P) @ V.abs()
    assert_within(got, *(x.reshape(B, 1, -1) for x in (o, e_o + rounding(o.abs() + e_o, dtype))))


def check_decode_attention():
    def check():
        for dtype in DTYPES:
            for case in CASES:
                check_call(library.attend, case, dtype)

    every_level(check)


@needs_c
def test_the_c_file_stays_within_the_bound_and_writes_one_token_of_the_cache():
    check_decode_attention()


@needs_c
def test_threads_and_the_other_texts_do_not_change_a_bit():
    case = (8, 9, 3, 64, 200, 150, 8, 8, 1)
    threads = torch.get_num_threads()

    def check():
        torch.set_num_threads(1)
        together = library.attend(*draw(case, torch.float32))
        torch.set_num_threads(3)
        assert torch.equal(library.attend(*draw(case, torch.float32)), together)
        alone = [x[2:3].contiguous() if isinstance(x, torch.Tensor) else x for x in draw(case, torch.float32)]
        assert torch.equal(library.attend(*alone), together[2:3])

    try:
        every_level(check)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["torch", pytest.param("c", marks=needs_c)])
def test_the_launcher_equals_the_reference(backend):
    for case in CASES[:4]:
        with runtime.using(backend), torch.no_grad():
            check_call(decode_attention, case, torch.float32, nullcontext)  # torch allocates as it likes


def gaps(x):
    """The same numbers, with others between them."""
    return None if x is None else x.repeat_interleave(2, -1)[..., ::2]


ODD = {
    "a head of 8": lambda a: [
        *(x.reshape(2, 1, -1) for x in a[:3]),
        *(x.view(2, 8, 9, 8) for x in a[3:5]),
        *(a[5], None, None, None),
    ],
    "a cache in strides": lambda a: [*a[:3], *(x.mT.contiguous().mT for x in a[3:5]), *a[5:]],
    "q in strides": lambda a: [gaps(a[0]), *a[1:]],
    "cos in strides": lambda a: [*a[:6], gaps(a[6]), *a[7:]],
    "sin in strides": lambda a: [*a[:7], gaps(a[7]), *a[8:]],
    "a mask in strides": lambda a: [*a[:8], gaps(torch.ones(2, 1, 1, 6, dtype=torch.bool))],
}


def strict(*args):
    """The C file, which must get what it can read: one dtype, contiguous, hd a multiple of 16."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    assert all(x.is_contiguous() for x in tensors) and args[3].shape[-1] % 16 == 0
    assert {x.dtype for x in tensors} <= {args[0].dtype, torch.bool}
    return decode_attention_ref(*args)


def check_launcher(module):
    """Every kind of argument gives the numbers of the reference, in fp32, and the C file what it can read."""
    with torch.no_grad(), mock.patch.object(library, "attend", strict):
        for change in ODD.values():
            args = list(draw((2, 4, 2, 32, 9, 5, 1, 0, 1), torch.float32))
            args[3], args[4] = args[3].nan_to_num(), args[4].nan_to_num()
            args = change(args)
            expected = decode_attention_ref(*[wide(x) for x in args])
            got = module.decode_attention(*args)
            # Scores of 32 products, 6 exps and 6 products: some 45 roundings of 2^-24 of numbers up to 4.
            assert (got.double() - expected).abs().max() <= 45 * 2.0**-24 * 4
        args = list(draw(CASES[1], torch.float32))
        args[3:5] = args[3].bfloat16(), args[4].bfloat16()
        with pytest.raises(RuntimeError, match="same dtype"):
            module.decode_attention(*args)


def test_arguments_of_every_kind_are_right():
    check_launcher(kernel)


@needs_c
@pytest.mark.parametrize(
    "old, new",
    [
        ("and keys.is_contiguous()\n        and values.is_contiguous()", ""),
        ("and hd % 16 == 0", ""),
        ("== v.dtype == keys.dtype == values.dtype", "== v.dtype"),
        ("cos.shape in tables and cos.is_contiguous()", "cos.shape in tables"),
        ("sin.shape == cos.shape and sin.is_contiguous()", "sin.shape == cos.shape"),
        ("mask.shape in masks and mask.is_contiguous()", "mask.shape in masks"),
        ("q.contiguous(), k.contiguous(), v.contiguous()", "q, k, v"),
        (
            "values, length, cos, sin, mask)\n    return _chain",
            "values, length, sin, cos, mask)\n    return _chain",
        ),
    ],
)
def test_mutants_die(old, new):
    assert not survives(check_launcher, kernel, old, new)


def test_a_full_cache_and_a_missing_backend_are_errors(monkeypatch):
    args = list(draw(CASES[1], torch.float32))
    args[5] = 9
    with pytest.raises(ValueError, match="holds 9 tokens and 10 were given"):
        decode_attention(*args)
    monkeypatch.setattr(library, "LIBRARY", None)
    with (
        torch.no_grad(),
        runtime.using("c"),
        pytest.raises(RuntimeError, match="decode_attention: backend 'c'"),
    ):
        decode_attention(*draw(CASES[1], torch.float32))
