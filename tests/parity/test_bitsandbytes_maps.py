"""The maps of 8-bit optimizer states beside bitsandbytes': the same 256 numbers."""

import pytest
import torch

from minift.optim.adamw_8bit import dynamic_map

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_those_of_bitsandbytes(signed):
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed)
    assert torch.equal(torch.tensor(dynamic_map(signed)), theirs)
