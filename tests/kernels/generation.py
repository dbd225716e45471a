"""What the tests of the ops for one token share: every instruction set, tensors between guards."""

from contextlib import contextmanager
from math import prod
from unittest import mock

import torch

from minift.kernels import library

LEVELS = range(library.LIBRARY.minift_level() + 1 if library.LIBRARY else 0)
GUARD = 64


def every_level(check):
    """Run a check at each instruction set of this processor."""
    for level in LEVELS:
        with mock.patch.object(library, "LEVEL", level):
            check()


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@contextmanager
def guarded():
    """Within the block the C file's results are NaN between sentinels; after it no sentinel has changed."""
    buffers = []

    def filled(*shape, dtype):
        n = prod(shape)
        buffer = torch.full((n + 2 * GUARD,), 77.0, dtype=dtype)
        buffer[GUARD : GUARD + n] = float("nan")
        buffers.append(buffer)
        return buffer[GUARD : GUARD + n].view(shape)

    with (
        mock.patch.object(torch, "empty_like", lambda x: filled(*x.shape, dtype=x.dtype)),
        mock.patch.object(torch.Tensor, "new_empty", lambda x, *shape: filled(*shape, dtype=x.dtype)),
    ):
        yield
    assert buffers and all((b[:GUARD] == 77).all() and (b[-GUARD:] == 77).all() for b in buffers)


def assert_within(got, exact, error):
    assert got.shape == exact.shape
    far = ~((got.double() - exact).abs() <= error)  # NaN is far
    assert not far.any(), f"{int(far.sum())} of {far.numel()} are beyond the bound"


def gamma(n: int) -> float:
    """Relative error of n roundings to fp32 (Higham 2002, lemma 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def rounding(y, dtype):
    """Error of rounding y to a dtype."""
    info = torch.finfo(dtype)
    return info.eps / 2 * y.abs() + info.smallest_normal * info.eps
