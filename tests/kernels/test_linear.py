"""minift.kernels.linear: products of few rows within an a-priori bound, and who computes the others."""

import pytest
import torch
import torch.nn.functional as F
from generation import LEVELS, assert_within, every_level, gamma, guarded, numbers, rounding
from mutants import survives
from torch._subclasses.fake_tensor import FakeTensorMode

from minift.kernels import library, linear, runtime
from minift.kernels.linear import linear_ref

BF16 = torch.bfloat16
# M, N, K: tails of 16 rows of W, of 4, 8, 16 and 32 columns
SHAPES = [(1, 1, 1), (1, 17, 33), (2, 16, 64), (3, 5, 31), (4, 40, 96), (4, 33, 100), (2, 300, 130)]
MANY = [(5, 16, 32), (8, 35, 72), (16, 300, 127)]

needs_c = pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")


def inputs(M, N, K):
    return numbers(M, K, dtype=BF16), numbers(N, K, dtype=BF16), numbers(N, dtype=BF16)


def exact(x, w, bias):
    """In fp64, and the bound: K products and sums and the bias in fp32, then one rounding to bf16."""
    x, w = x.double(), w.double()
    bias = torch.zeros(len(w)).double() if bias is None else bias.double()
    y, error = x @ w.t() + bias, gamma(x.shape[-1] + 2) * (x.abs() @ w.abs().t() + bias.abs())
    return y, error + rounding(y.abs() + error, BF16)


def check_linear():
    def check():
        for shape in SHAPES + MANY:
            x, w, bias = inputs(*shape)
            for b in (None, bias):
                with guarded():
                    y = library.linear(x, w, b)
                assert_within(y, *exact(x, w, b))

    every_level(check)


@needs_c
def test_products_stay_within_the_bound_and_write_nothing_else():
    check_linear()


@needs_c
def test_a_row_has_the_same_bits_alone_and_in_any_batch():
    x, w, bias = inputs(16, 50, 100)

    def check():
        together = library.linear(x, w, bias)
        for M in (1, 2, 3, 5, 16):
            assert torch.equal(library.linear(x[:M], w, bias), together[:M])

    every_level(check)


@needs_c
def test_threads_do_not_change_a_bit():
    x, w, bias = inputs(3, 1100, 127)  # more than one thread does alone
    threads = torch.get_num_threads()

    def check():
        torch.set_num_threads(1)
        one = library.linear(x, w, bias)
        torch.set_num_threads(3)
        assert torch.equal(library.linear(x, w, bias), one)

    try:
        every_level(check)
    finally:
        torch.set_num_threads(threads)


def test_the_reference_is_torch_and_so_is_all_that_the_c_file_does_not_have():
    for dtype, M in ((torch.float32, 2), (torch.float64, 1), (BF16, 17), (torch.float16, 1)):
        x, w, bias = numbers(M, 40, dtype=dtype), numbers(9, 40, dtype=dtype), numbers(9, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(linear.linear(x, w, bias), F.linear(x, w, bias))
    x, w, bias = (t.double() for t in inputs(3, 7, 20))
    # Both sum 20 products and the bias in doubles, each in its own order.
    bound = 2 * 22 * 2.0**-53 * (x.abs() @ w.abs().t() + bias.abs())
    assert_within(linear_ref(x, w, bias), F.linear(x, w, bias), bound)
    assert_within(linear_ref(x, w), F.linear(x, w), bound)


def test_what_records_gradients_is_torchs_product_and_trains():
    x, w, bias = (t.requires_grad_() for t in inputs(2, 33, 64))
    y = linear.linear(x, w, bias)
    assert torch.equal(y, F.linear(x, w, bias))
    y.float().sum().backward()
    assert all(t.grad is not None for t in (x, w, bias))


def test_a_named_backend_is_the_one_that_runs(monkeypatch):
    x, w, bias = inputs(1, 33, 64)
    calls = []
    monkeypatch.setattr(library, "linear", lambda *tensors: calls.append(tensors) or F.linear(*tensors))
    with torch.no_grad():
        for name in ("torch", "triton"):
            with runtime.using(name):
                linear.linear(x, w, bias)
        assert not calls
        monkeypatch.setattr(library, "LIBRARY", None)
        linear.linear(x, w, bias)
        assert not calls
        with runtime.using("c"), pytest.raises(RuntimeError, match="linear: backend 'c' was asked for"):
            linear.linear(x, w, bias)


def test_fake_tensors_and_tensors_elsewhere_do_not_reach_the_c_file():
    with torch.no_grad(), FakeTensorMode():
        y = linear.linear(torch.empty(1, 64, dtype=BF16), torch.empty(33, 64, dtype=BF16))
        assert y.shape == (1, 33)
    with torch.no_grad():
        x, w, _ = inputs(1, 33, 64)
        assert linear.linear(x.to("meta"), w.to("meta")).shape == (1, 33)


def test_shapes_that_do_not_fit_are_errors():
    x, w, bias = inputs(2, 33, 64)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shape"):
        linear.linear(x, w[:, :32].contiguous())
    with torch.no_grad(), pytest.raises(RuntimeError):
        linear.linear(x, w, bias[:20])


def check_launcher(module):
    """Shapes of any rank, strides of any kind, a bias that is broadcast."""
    with torch.no_grad():
        for shape in SHAPES[1:]:
            x, w, bias = inputs(*shape)
            for b in (None, bias, bias[:1]):
                y, error = exact(x, w, b)
                assert_within(module.linear(x, w, b), y, error)
                assert_within(module.linear(x.t().contiguous().t(), w, b), y, error)
                assert_within(module.linear(x, w.t().contiguous().t(), b), y, error)
                assert_within(module.linear(x[None, :, None], w, b), y[None, :, None], error[None, :, None])


def test_the_launcher_takes_shapes_and_strides_of_every_kind():
    check_launcher(linear)


MUTANTS = [
    ("library.linear(x.contiguous(), weight, bias)", "library.linear(x, weight, bias)"),
    ("library.linear(x.contiguous(), weight, bias)", "library.linear(x.contiguous(), weight, None)"),
    ("and weight.is_contiguous()", ""),
    ("bias.shape == weight.shape[:1]", "True"),
    ("return F.linear(x, weight, bias)", "return F.linear(x, weight)"),
]


@needs_c
@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_launcher, linear, old, new)


def test_levels_are_those_of_the_processor():
    assert library.LIBRARY is None or list(LEVELS)[-1] == library.LIBRARY.minift_level()
