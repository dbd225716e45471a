"""cross_entropy with a vocabulary whose rows are padded: what stands in the padding must not count."""

import pytest
import torch

from minift.kernels.cross_entropy import cross_entropy


@pytest.fixture
def poisoned():
    """Memory that was not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("V", [97, 98, 257, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_where_the_vocabulary_is_no_multiple_of_sixteen(poisoned, V, dtype):
    for n in range(1, 40):
        torch.manual_seed(n)
        hidden = torch.randn(n, 32).to(dtype).requires_grad_()
        weight = torch.randn(V, 32).to(dtype)
        cross_entropy(hidden, weight, torch.randint(V, (n,))).backward()
        assert torch.isfinite(hidden.grad).all(), n
