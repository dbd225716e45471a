"""Exact sums: equal to fractions, in any order and split."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import exact

doubles = st.floats(allow_nan=False, allow_infinity=False)
SCALE, SQUARE = 2**exact.UNIT, 4**exact.MOMENT


@given(st.lists(doubles, max_size=40))
def test_a_total_is_the_sum_without_rounding(values):
    assert Fraction(exact.total(values), SCALE) == sum(map(Fraction, values))


@given(st.lists(doubles, min_size=1, max_size=40), st.data())
def test_batches_add_to_the_same_total_in_any_order(values, data):
    shuffled, cut = data.draw(st.permutations(values)), data.draw(st.integers(0, len(values)))
    assert exact.total(shuffled[:cut]) + exact.total(shuffled[cut:]) == exact.total(values)


@given(st.lists(st.tuples(doubles, doubles), max_size=30))
def test_a_sum_of_products_is_exact(pairs):
    x, y = np.array(pairs).reshape(-1, 2).T
    expected = sum(
        (Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), y.tolist(), strict=True)), Fraction()
    )
    assert Fraction(exact.moment(x, y), SQUARE) == expected


@given(st.lists(doubles.filter(lambda x: abs(x) < 1e300), min_size=1, max_size=40))
def test_the_rounded_sum_and_mean_are_the_nearest_doubles(values):
    units = exact.total(values)
    assert exact.value(units) == math.fsum(values)
    assert exact.mean(units, len(values)) == float(sum(map(Fraction, values)) / len(values))


def check_values(module):
    """Smallest and largest doubles, a cancellation that rounding would lose, and products of 106 bits."""
    values = [5e-324, -1.5e308, 1.0, 2.0**-60, 1.5e308, -1.0]
    assert Fraction(module.total(values), SCALE) == Fraction(5e-324) + Fraction(2.0**-60)
    assert module.value(module.total([0.1] * 10)) == 1.0 and sum([0.1] * 10) != 1.0
    assert module.mean(module.total([1.0, 2.0]), 2) == 1.5
    x, y = np.array([1 + 2.0**-52, -(1 - 2.0**-53)]), np.array([1 - 2.0**-53, 1 + 2.0**-52])
    third = np.array([1 / 3]), np.array([np.pi])
    assert module.moment(x, y) == 0
    assert Fraction(module.moment(*third), SQUARE) == Fraction(1 / 3) * Fraction(np.pi)
    assert Fraction(module.moment(third[1], third[1]), SQUARE) == Fraction(np.pi) ** 2


def test_values_that_rounding_would_lose():
    check_values(exact)


MUTANTS = [
    ("2.0**26  # the", "2.0**25  # the"),
    ("np.trunc(significand * 2.0**27)", "np.trunc(significand * 2.0**28)"),
    ("(high, 26), (low, 0)", "(high, 26)"),
    ("(bin + lowest - 53", "(bin + lowest - 52"),
    ("exponent - lowest", "exponent - lowest - (lowest < -1000)"),
    ("for part in _two_parts(x, y))", "for part in _two_parts(x, y)[:1])"),
    ("+ a * d + b * c", "+ a * d + a * d"),
    ("+ b * d)", ")"),
    ("134217729.0", "134217729.0 * 1024"),
    ("units / (n << UNIT)", "value(units) // n"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_values, exact, old, new)


def test_more_rows_than_one_pass_takes(monkeypatch):
    monkeypatch.setattr(exact, "ROWS", 7)
    values = np.random.default_rng(0).standard_normal(100)
    assert exact.value(exact.total(values)) == math.fsum(values)
