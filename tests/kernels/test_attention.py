"""minift.kernels.attention against fp64, within an a-priori bound; its backward by gradcheck; mutants."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.kernels import attention as kernel
from minift.kernels.attention import CPUAttention, attention, attention_ref

SHAPES = [
    (1, 1, 1, 1, 1, 2),
    (2, 4, 2, 7, 7, 8),
    (1, 9, 3, 33, 33, 16),
    (3, 2, 1, 1, 5, 4),
    (2, 6, 2, 3, 11, 8),
    (1, 4, 4, 150, 150, 8),
]


def inputs(shape, dtype, seed=0):
    B, H, KV, T, S, hd = shape
    g = torch.Generator().manual_seed(seed)

    def draw(heads, length):
        return torch.randn(B, heads, length, hd, generator=g).to(dtype).requires_grad_()

    return draw(H, T), draw(KV, S), draw(KV, S), torch.randn(B, H, T, hd, generator=g).to(dtype)


def left_padding(B, T, S):
    """The first row whole, the others with their first keys padded; every query sees itself."""
    real = torch.ones(B, S, dtype=torch.bool)
    real[1:, : S // 3] = False
    itself = torch.eye(S, dtype=torch.bool)[S - T :]
    return (kernel.causal_mask(T, S) & real[:, None] | itself)[:, None]


def masks(B, T, S):
    """(mask, causal): plain, padded on the left, all keys, all keys but the padding's."""
    real = torch.ones(B, 1, 1, S, dtype=torch.bool)
    real[1:, ..., -(S // 3) or S :] = False
    return [(None, True), (left_padding(B, T, S), True), (None, False), (real, False)]


def bounds(q, k, v, do, mask, causal):
    """fp64 results and componentwise error bounds (rounding rules below), (o, dq, dk, dv) each.

    Every product accumulates n terms in fp32, gamma(n) = n 2^-24 / (1 - n 2^-24), and is stored with the
    relative error u of the dtype; exp, sums and divisions of the softmax add 8 * 2^-24. Errors of the inputs
    of a product pass through it with the absolute values of the other factor (Higham 2002, chapter 3).
    """
    u, G = torch.finfo(q.dtype).eps, q.shape[1] // k.shape[1]
    heads, hd = q.shape[:2], q.shape[-1]
    q, k, v, do = (x.detach().double() for x in (q, k, v, do))
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    T, S = q.shape[2], k.shape[2]
    if mask is None:
        mask = kernel.causal_mask(T, S) if causal else torch.ones(T, S, dtype=torch.bool)
    mask = mask.expand(*heads, T, S)
    scale, e = hd**-0.5, 8 * 2.0**-24

    def gamma(n):
        return n * 2.0**-24 / (1 - n * 2.0**-24)

    s, s_abs = scale * q @ k.mT, scale * q.abs() @ k.abs().mT
    P = s.masked_fill(~mask, float("-inf")).softmax(-1)
    E_s = ((gamma(hd) + 2 * u) * s_abs + u * s.abs()) * mask
    E_P = P * torch.expm1(2 * E_s.amax(-1, keepdim=True)) + (u + e + gamma(S)) * P
    o, E_o = P @ v, E_P @ v.abs() + (gamma(S) + 2 * u) * (P @ v.abs())
    dP, E_dP = do @ v.mT, (gamma(hd) + u) * (do.abs() @ v.abs().mT)
    row = (P * dP).sum(-1, keepdim=True)
    E_row = (E_P * dP.abs() + P * E_dP + E_P * E_dP + gamma(S) * P * dP.abs()).sum(-1, keepdim=True)
    dS = P * (dP - row)
    E_dS = E_P * (dP.abs() + row.abs()) + (P + E_P) * (E_dP + E_row) + 2 * u * P * (dP.abs() + row.abs())
    dq, E_dq = scale * dS @ k, scale * (E_dS @ k.abs() + (gamma(S) + 3 * u) * dS.abs() @ k.abs())
    dk, E_dk = scale * dS.mT @ q, scale * (E_dS.mT @ q.abs() + (gamma(G * T) + 3 * u) * dS.abs().mT @ q.abs())
    dv, E_dv = P.mT @ do, E_P.mT @ do.abs() + (gamma(G * T) + 2 * u) * (P.mT @ do.abs())

    def group(x):
        return x.unflatten(1, (-1, G)).sum(2)

    return (o, dq, group(dk), group(dv)), (E_o, E_dq, group(E_dk), group(E_dv))


def check(module, dtype=torch.float32, shapes=SHAPES):
    """Forward and gradients of a module's `attention` within the bounds: padded or not, causal or not."""
    worst = 0.0
    for shape in shapes:
        for mask, causal in masks(shape[0], shape[3], shape[4]):
            q, k, v, do = inputs(shape, dtype)
            o = module.attention(q, k, v, mask, causal)
            results = (o, *torch.autograd.grad(o, (q, k, v), do))
            exact, allowed = bounds(q, k, v, do, mask, causal)
            for got, want, bound in zip(results, exact, allowed, strict=True):
                assert got.shape == want.shape and got.dtype == dtype
                ratio = ((got.double() - want).abs() / (bound + 1e-300)).max().item()
                assert ratio <= 1, f"{shape}: error {ratio:.2f} of the bound"
                worst = max(worst, ratio)
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_and_gradients_stay_within_the_bound(dtype):
    assert check(kernel, dtype) > 0 or dtype == torch.float64


def test_the_reference_equals_the_fused_forward():
    for shape in SHAPES:
        q, k, v, _ = inputs(shape, torch.float64)
        for mask, causal in masks(shape[0], shape[3], shape[4]):
            reference = attention_ref(q, k, v, mask, causal)
            torch.testing.assert_close(
                reference, attention(q.detach(), k, v, mask, causal), rtol=0, atol=1e-13
            )


@pytest.mark.parametrize("rows, slab", [(128, 2**24), (2, 2**24), (128, 40)])
def test_gradcheck_however_the_rows_are_cut(rows, slab, monkeypatch):
    monkeypatch.setattr(kernel, "ROWS", rows)
    monkeypatch.setattr(kernel, "SLAB", slab)
    for shape in [(2, 4, 2, 5, 5, 4), (1, 2, 1, 3, 6, 2)]:
        q, k, v, _ = inputs(shape, torch.float64)
        for case in masks(shape[0], shape[3], shape[4]):
            assert torch.autograd.gradcheck(
                lambda q, k, v, c=case: CPUAttention.apply(q, k, v, *c), (q, k, v)
            )


@given(st.integers(1, 9), st.integers(0, 5), st.sampled_from([(1, 1), (4, 2), (6, 3)]))
def test_queries_after_a_cache_see_what_they_see_in_the_whole_text(T, past, heads):
    H, KV = heads
    q, k, v, _ = inputs((2, H, KV, T + past, T + past, 4), torch.float64, seed=T)
    whole = attention(q, k, v)
    with torch.no_grad():
        part = attention(q[:, :, past:], k, v)
    torch.testing.assert_close(part, whole[:, :, past:], rtol=0, atol=1e-12)


def test_only_what_needs_a_gradient_gets_one():
    q, k, v, do = inputs(SHAPES[1], torch.float32)
    attention(q, k.detach(), v.detach()).backward(do)
    assert q.grad is not None and k.grad is None and v.grad is None


MUTANTS = [
    ("q = (q * hd**-0.5)", "q = (q * hd**-1.0)"),
    ("dq = (dS @ k).mul_(hd**-0.5)", "dq = (dS @ k)"),
    (".tril(S - T)", ".tril(S - T - 1)"),
    (".tril(S - T)", ".tril(0)"),
    ("P.transpose(-1, -2) @ do", "dP.transpose(-1, -2) @ do"),
    ("seen = stop + S - T if ctx.causal else S", "seen = max(1, stop + S - T - 1) if ctx.causal else S"),
    ("ctx.causal = causal and mask is None", "ctx.causal = mask is None"),
    ("causal = causal and mask is None\n    square", "causal = mask is None\n    square"),
    ("dk[:, :, :seen] += part[1]", "dk[:, :, :seen] = part[1]"),
    ('masked_fill_(~mask, float("-inf"))', "masked_fill_(~mask, -1.0)"),
    ("_softmax_backward_data(dP, P, -1, P.dtype)", "_softmax_backward_data(dP, P, -2, P.dtype)"),
    ("dP = do @ v.transpose(-1, -2)", "dP = do @ k.transpose(-1, -2)"),
    ("return dq, dk.to(k.dtype), dv.to(v.dtype), None", "return dq, dv.to(k.dtype), dk.to(v.dtype), None"),
    ("ctx.save_for_backward(q, k, v, mask)", "ctx.save_for_backward(q, v, k, mask)"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_are_noticed(old, new):
    assert not survives(check, kernel, old, new)
