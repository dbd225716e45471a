"""minift.kernels.rms_norm within an a-priori bound at every instruction set; the norm of models uses it."""

import pytest
import torch
from generation import assert_within, every_level, gamma, guarded, numbers, rounding
from mutants import survives

from minift.kernels import library, rms_norm, runtime
from minift.kernels.rms_norm import rms_norm_ref
from minift.models.layers import Normalize, RMSNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 17), (2, 576), (40, 1000)]

needs_c = pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")


def exact(x, weight, eps, dtype):
    """In fp64, and the bound: the mean of D squares passes D + 2 roundings, its root halves their error; the
    root, the division and two products make 4 more; then one rounding to the dtype."""
    y = rms_norm_ref(x.double(), weight.double(), eps)
    error = (gamma(x.shape[-1] + 2) / 2 + gamma(4)) * y.abs()
    return y, error + rounding(y.abs() + error, dtype)


def check_rms_norm():
    def check():
        for dtype in DTYPES:
            for shape in SHAPES:
                x, weight = numbers(*shape, dtype=dtype), numbers(shape[1], dtype=dtype)
                with guarded():
                    y = library.rms_norm(x, weight, 0.25)
                assert_within(y, *exact(x, weight, 0.25, dtype))

    every_level(check)


@needs_c
def test_the_c_file_stays_within_the_bound_and_writes_nothing_else():
    check_rms_norm()


def check_launcher(module):
    with torch.no_grad():
        for dtype in (*DTYPES, torch.float64):
            x, weight = numbers(6, 40, dtype=dtype), numbers(40, dtype=dtype)
            for y in (
                module.rms_norm(x, weight, 0.25),
                module.rms_norm(x.t().contiguous().t(), weight, 0.25),
            ):
                assert y.dtype == dtype
                assert_within(y, *exact(x, weight, 0.25, dtype))
            mixed = module.rms_norm(x, weight.double(), 0.25)
            assert_within(mixed, *exact(x, weight, 0.25, dtype))
            assert_within(
                module.rms_norm(x, numbers(80, dtype=dtype)[::2], 0.25),
                *exact(x, numbers(80, dtype=dtype)[::2], 0.25, dtype),
            )


def test_the_launcher_takes_every_dtype_and_strides_of_every_kind():
    check_launcher(rms_norm)


@needs_c
@pytest.mark.parametrize(
    "old, new",
    [
        ("library.rms_norm(x.contiguous(), weight, eps)", "library.rms_norm(x, weight, eps)"),
        ("library.rms_norm(x.contiguous(), weight, eps)", "library.rms_norm(x.contiguous(), weight, 0.2)"),
        ("here and x.numel() and weight.is_contiguous()", "here and x.numel()"),
        ("x.dtype == weight.dtype and x.dtype in", "x.dtype in"),
        ("norm.square() / x.shape[-1] + eps", "norm.square() / x.shape[-1]"),
    ],
)
def test_mutants_die(old, new):
    assert not survives(check_launcher, rms_norm, old, new)


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    x = torch.zeros(3, 32)
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    with torch.no_grad():
        y = rms_norm.rms_norm(x, torch.ones(32), 1e-6)
    assert (y[0] == 0).all() and y[1, 5].isnan() and y[2].isnan().all()


def test_under_gradients_it_is_the_plain_formula():
    x, weight = numbers(2, 8).double().requires_grad_(), numbers(8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.rms_norm(x, w, 0.1), (x, weight))


@needs_c
def test_an_asked_backend_that_is_missing_raises(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", None)
    with torch.no_grad(), runtime.using("c"), pytest.raises(RuntimeError, match="rms_norm: backend 'c'"):
        rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 0.1)


def test_the_norm_of_models_is_the_same_number_with_and_without_gradients():
    norm = RMSNorm(96, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = numbers(5, 96)
    with torch.no_grad():
        without = norm(x)
    y, error = exact(x, norm.weight.detach(), 1e-5, torch.float32)
    assert_within(without, y, error)
    assert_within(Normalize.apply(x, norm.weight, 1e-5).detach(), y, error)
