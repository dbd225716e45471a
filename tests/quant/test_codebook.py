"""The tables: golden numbers, their constructions, and that there is one copy of each."""

from pathlib import Path

import numpy as np
import pytest
import quant_reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_reference import same_bits

from minift.kernels import runtime
from minift.quant.base import Format
from minift.quant.codebook import FP4, INT8, NF4, dynamic_map

ROOT = Path(__file__).parent.parent.parent
TABLES = {"nf4": NF4, "fp4": FP4, "int8": INT8, "int8_dynamic": dynamic_map()}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_golden_numbers_to_the_bit(name):
    assert same_bits(torch.tensor(TABLES[name], dtype=torch.float32), slow.VALUES[name])


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    # The offset is the mean of 1 - 1/30 and 1 - 1/32. The published table was computed in fp32: off by a few
    # units of 2^-24.
    def quantiles(count):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count + 1, dtype=torch.float64)[:-1])

    built = torch.cat((-quantiles(7), torch.zeros(1, dtype=torch.float64), quantiles(8).flip(0)))
    built /= built.max()
    assert built.numel() == 16
    assert (built - torch.tensor(NF4, dtype=torch.float64)).abs().max() <= 2**-22


@pytest.mark.parametrize("code", range(16))
def test_fp4_is_sign_exponent_and_mantissa(code):
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    # the exponent field counts down from 8 = 2^3; without one, the mantissa alone counts 2^-4
    size = 2 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
    assert np.float32(FP4[code]) == np.float32((-1) ** sign * size / 12)


def test_int8_is_twos_complement_by_127():
    signed = np.arange(256).astype(np.uint8).view(np.int8)
    assert same_bits(torch.tensor(INT8), signed.astype(np.float32) / np.float32(127))


def test_the_dynamic_map_is_ascending_and_symmetric_but_for_zero_and_one():
    values = np.array(dynamic_map())
    assert len(values) == 256 and (np.diff(values) > 0).all()
    rest = set(values.tolist()) - {0.0, 1.0}
    assert len(rest) == 254 and rest == {-x for x in rest}


@pytest.mark.parametrize("i", range(7))
def test_a_decade_of_the_dynamic_map_holds_the_middles_of_equal_parts(i):
    top = 10.0 ** (i - 6)
    values = [x for x in dynamic_map() if top / 10 < x < top]
    parts = 2**i
    exact = [top * (0.1 + 0.9 * (j + 0.5) / parts) for j in range(parts)]
    # edges, their mean and the product are rounded to fp32 and of size <= 1: 4 * 2^-24 of the decade's top
    np.testing.assert_allclose(values, exact, rtol=0, atol=top * 2**-22)


@pytest.mark.parametrize("number", ["0.6961928", "0.5250730", "0.0796", "0.0625, 8.0, 12.0", "0.0052083"])
def test_nf4_and_fp4_stand_in_one_file(number):
    sources = [p for folder in ("minift", "kernels") for p in (ROOT / folder).rglob("*") if p.is_file()]
    sources = [p for p in sources if p.suffix in (".py", ".pyi", ".c", ".cpp", ".cu", ".cuh", ".h", ".json")]
    holders = {p.name for p in sources if number in p.read_text(encoding="utf-8")}
    assert holders <= {"codebook.py"}


def assert_quantizes_right(table):
    """Numbers all over [-1, 1], those of the table, midpoints and their neighbours: by the slow reference."""
    order = np.argsort(table, kind="stable")
    middle = (table[order][:-1] + table[order][1:]) / np.float32(2)
    beside = [np.nextafter(middle, np.float32(side)) for side in (-2, 2)]
    s = np.concatenate((np.linspace(-1, 1, 402, dtype=np.float32), table, middle, *beside, [np.float32(1)]))
    codes = order[slow.rank(s, table[order])].astype(np.uint8)
    for backend in ("auto", "torch"):
        with runtime.using(backend):
            packed, absmax = Format("new", 4, tuple(table.tolist())).quantize(torch.from_numpy(s), 512)
        assert absmax.tolist() == [1.0] and same_bits(packed, 16 * codes[0::2] + codes[1::2])


@given(st.lists(st.integers(-200, 200), min_size=15, max_size=15, unique=True).filter(lambda v: 0 not in v))
def test_a_new_format_is_a_name_and_sixteen_numbers(values):
    assert_quantizes_right(np.array([*values, 0], dtype=np.float32) / np.float32(200))  # in any order


@given(st.permutations(range(16)), st.integers(-9000, 9000))
def test_numbers_that_stand_close_together_are_told_apart(order, place):
    """Two midpoints in one of the 4096 cells of [-1, 1] that find codes: there they are searched."""
    crowded = np.array([0.0, 0.0001, 0.0002, *np.linspace(0.1, 1, 11), -0.9, place / 10000], dtype=np.float32)
    assert_quantizes_right(crowded[list(order)])
