"""The tables: golden numbers, their constructions, and that there is one copy of each."""

from pathlib import Path

import numpy as np
import pytest
import quant_reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_reference import same_bits

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


@given(st.lists(st.integers(-200, 200), min_size=15, max_size=15, unique=True).filter(lambda v: 0 not in v))
def test_a_new_format_is_a_name_and_sixteen_numbers(values):
    table = np.array([*values, 0], dtype=np.float32) / np.float32(200)  # in any order
    format = Format("new", 4, tuple(table.tolist()))
    s = torch.cat((torch.linspace(-1, 1, 400), torch.from_numpy(table)))
    packed, absmax = format.quantize(s, 512)
    order = np.argsort(table, kind="stable")
    codes = order[slow.rank(s.numpy(), table[order])].astype(np.uint8)
    assert absmax.tolist() == [1.0] and torch.equal(packed, format.pack(torch.from_numpy(codes)))


def test_numbers_too_close_for_the_search_are_an_error():
    crowded = Format("crowded", 4, (0.0, 0.0001, 0.0002, *np.linspace(0.1, 1, 13).tolist()))
    with pytest.raises(ValueError, match="format crowded: two midpoints lie in one of 4096 equal cells"):
        crowded.quantize(torch.ones(4), 32)
