"""The singular values of a delta from its factors, against the dense decomposition in fp64."""

import math

import pytest
import torch
from deltas import CLOSE, nearest_of_its_rank, some
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.methods import factors
from minift.methods.lora import LoRA


def check_factors(module):
    """svd and cut: the decomposition of B A from its factors, and the nearest matrix of a rank."""
    for out, fan_in, r in ((7, 9, 4), (3, 9, 5), (9, 3, 5), (6, 6, 1)):
        f = some(out, fan_in, r)
        dense = f.scaling * f.B @ f.A
        U, S, Vh = module.svd(f)
        k = min(out, fan_in, r)
        assert U.shape == (out, k) and S.shape == (k,) and Vh.shape == (k, fan_in)
        torch.testing.assert_close(S * f.scaling, torch.linalg.svdvals(dense)[:k], **CLOSE)
        torch.testing.assert_close(f.scaling * (U * S) @ Vh, dense, **CLOSE)
        for cut in range(1, r + 1):
            smaller, error = module.cut(U, S, Vh, f.scaling, cut)
            nearest_of_its_rank(smaller.scaling * smaller.B @ smaller.A, error, dense, cut)
            eye = torch.eye(smaller.r, dtype=torch.float64)
            torch.testing.assert_close(smaller.A @ smaller.A.T, eye, **CLOSE)


def test_the_svd_from_the_factors_is_the_dense_one():
    check_factors(factors)


@pytest.mark.parametrize(
    "old, new",
    [
        ("RB @ RA.t()", "RB @ RA"),
        ("RB @ RA.t()", "RA @ RB.t()"),
        ("return QB @ U, S, Vh @ QA.t()", "return QB @ U, S.sqrt(), Vh @ QA.t()"),
        ("return QB @ U, S, Vh @ QA.t()", "return QB @ U, S, -Vh @ QA.t()"),
        ("U[:, :r] * S[:r], scaling)", "U[:, :r] * S[:r].sqrt(), scaling)"),
        ("Factors(Vh[:r], U[:, :r] * S[:r], scaling)", "Factors(Vh[-r:], U[:, -r:] * S[-r:], scaling)"),
        ("scaling * S[r:].norm()", "S[r:].norm()"),
        ("scaling * S[r:].norm()", "scaling * S[r:].sum()"),
        ("S[r:].norm()", "S[r + 1 :].norm()"),
        ("factors.B.double()", "factors.B.float().double()"),
    ],
)
def test_mutants_of_the_factors_are_noticed(old, new):
    assert not survives(check_factors, factors, old, new)


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 32), st.booleans())
def test_alpha_gives_the_scaling_at_another_rank(alpha, r, new, rslora):
    method = LoRA(r=r, alpha=float(alpha), rslora=rslora)
    scaling = method.scaling
    found = factors.alpha_for(method, some(40, 40, new, scaling))
    assert abs(method.scale(new, found) - scaling) <= 2.0**-52 * scaling
    if new == r or (not rslora and math.log2(alpha / r).is_integer()):
        assert method.scale(new, found) == scaling
    assert new != r or found == alpha
