"""The check of mutants: it tells them apart, and a check that fails on any copy of a module kills none."""

import pytest
from mutants import survives

from minift.methods import olora

OLD, NEW = "return R[:r], Q[:, :r]", "return R, Q"


def reads(module):
    assert callable(module.olora)


def test_a_mutant_survives_a_check_that_does_not_look_at_it_and_no_other():
    assert survives(reads, olora, OLD, NEW)
    assert survives(lambda module: reads(module), olora, OLD, NEW)
    seen = []

    def second_only(module):  # the first call is on the unchanged copy
        seen.append(module)
        assert len(seen) == 1

    assert not survives(second_only, olora, OLD, NEW)


@pytest.mark.parametrize("error", [AssertionError, TypeError])
def test_a_check_that_fails_on_every_copy_is_an_error(error):
    def fails(module):
        if module is not olora:
            raise error("it is a copy")

    with pytest.raises(RuntimeError, match="fails on an unchanged copy of .*olora.py: it is a copy"):
        survives(fails, olora, OLD, NEW)
