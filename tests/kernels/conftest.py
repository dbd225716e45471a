"""Tests marked `triton` run kernels: on the GPU where there is one, otherwise in Triton's interpreter.

The interpreter is a property of the process (TRITON_INTERPRET=1), so test_interpreter.py runs them in one of
their own, and the process that compiles kernels leaves them out.
"""

import pytest
import torch

from minift.kernels import runtime


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or runtime.INTERPRETED:
        return
    left = [item for item in items if "triton" in item.keywords and item.get_closest_marker("triton")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True, scope="session")
def full_precision_sums():
    """The bounds are for sums in fp32, which cuBLAS gives up for speed unless it is told."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
