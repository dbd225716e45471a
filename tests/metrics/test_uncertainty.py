"""Intervals and tests in closed form: published values, by hand, laws, and what is refused."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, State, uncertainty
from minift.metrics.uncertainty import mcnemar, paired_difference, wilson

Z = 1.959963984540054
# Agresti 2002, table 10.1: of 1600 people 794 approved twice, 150 only the first time, 86 only the second.
FIRST = [1] * 794 + [1] * 150 + [0] * 86 + [0] * 570
SECOND = [1] * 794 + [0] * 150 + [1] * 86 + [0] * 570
verdicts = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
scores = st.lists(st.tuples(*2 * [st.floats(-1e6, 1e6)]), min_size=1, max_size=20)


def check_wilson(module):
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table 1, method 3.
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert module.wilson(right, n) == pytest.approx((low, high), rel=0, abs=5e-5)  # its four decimals
    assert module.wilson(0, 20)[0] == 0 and module.wilson(20, 20)[1] == 1
    # p = 1/2, n = 4, z = 2: (1/2 + 1/2 -+ 2 sqrt(1/16 + 1/16)) / 2.
    assert module.wilson(2, 4, z=2) == pytest.approx((0.5 - 0.125**0.5, 0.5 + 0.125**0.5), rel=0, abs=1e-15)


def check_paired(module):
    # Agresti 2002, section 10.1.1: a difference of 0.04 with the standard error 0.0095.
    d, low, high = module.paired_difference(FIRST, SECOND)
    assert d == 0.04 and (high - low) / 2 / Z == pytest.approx(0.0095, rel=0, abs=5e-5)
    # Differences 1, 0, 2: mean 1, squares around it 1, 1, 0.
    found = module.paired_difference([3, 1, 2.5], [2, 1, 0.5], z=3)
    assert found == pytest.approx((1, 1 - 2**0.5, 1 + 2**0.5), rel=0, abs=1e-15)
    found = module.paired_difference([3e140, 1e140, 2.5e140], [2e140, 1e140, 0.5e140], z=3)
    assert found == pytest.approx((1e140, 1e140 * (1 - 2**0.5), 1e140 * (1 + 2**0.5)), rel=1e-14)


def check_mcnemar(module):
    # Agresti 2002, section 10.1.1, has z^2 = (86 - 150)^2 / 236 = 17.36 without correction.
    found = module.mcnemar(FIRST, SECOND, exact=False)
    assert found == pytest.approx((63**2 / 236, math.erfc((63**2 / 236 / 2) ** 0.5)), rel=1e-15)
    assert module.mcnemar([1, 0, 1], [0, 1, 1], exact=False) == (0.0, 1.0)
    # 2 (1 + 7 + 21) / 2^7
    assert module.mcnemar([1] * 5 + [0] * 2 + [1], [0] * 5 + [1] * 2 + [1]) == (2.0, 58 / 128)
    assert module.mcnemar([1, 1, 0], [0, 1, 1]) == (1.0, 1.0)
    assert module.mcnemar([1, 1], [1, 1]) == (0.0, 1.0)


def test_published_intervals_of_shares():
    check_wilson(uncertainty)


def test_published_paired_difference():
    check_paired(uncertainty)


def test_mcnemars_test_by_hand():
    check_mcnemar(uncertainty)


MUTANTS = [
    (check_wilson, "p + z * z / (2 * n)", "p + z * z / n"),
    (check_wilson, "z * z / (4 * n * n)", "z * z / (4 * n)"),
    (check_wilson, "(middle - half) / (1 + z * z / n)", "(middle - half)"),
    (check_wilson, "0.0 if right == 0 else low", "low + 1e-17"),
    (check_wilson, "1.0 if right == n else high", "high - 2**-53"),
    (check_wilson, "Z95 = 1.959963984540054", "Z95 = 1.6448536269514722"),
    (check_paired, "d = a - b", "d = b - a"),
    (check_paired, "n * squares - (", "n * squares + ("),
    (check_paired, "spread = n * squares - (total * total <<", "spread = squares - (total * total <<"),
    (check_paired, "2 * (exact.MOMENT - exact.UNIT)", "exact.MOMENT - exact.UNIT"),
    (check_paired, "return d, d - half, d + half", "return d, d - half, d - half"),
    (check_mcnemar, "max(0, abs(n10 - n01) - 1)", "max(0, abs(n10 - n01))"),
    (check_mcnemar, "max(0, abs(n10 - n01) - 1)", "(abs(n10 - n01) - 1)"),
    (check_mcnemar, "erfc(sqrt(statistic / 2))", "erfc(sqrt(statistic))"),
    (check_mcnemar, "(1 << n - 1)", "(1 << n)"),
    (check_mcnemar, "for i in range(most)", "for i in range(most - 1)"),
    (check_mcnemar, "// (i + 1)", "// (i + 2)"),
    (check_mcnemar, "min(1.0, _tail", "max(0.0, _tail"),
    (check_mcnemar, "int((a > b).sum())", "int((a >= b).sum())"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, uncertainty, old, new)


@given(st.integers(1, 500), st.data())
def test_wilsons_interval_holds_the_share_and_mirrors(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), rel=0, abs=2**-40)


@given(verdicts)
def test_a_paired_difference_is_that_of_the_discordant_rows_and_changes_sign_with_its_sides(pairs):
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    n, n10, n01 = len(pairs), int((a & ~b).sum()), int((b & ~a).sum())
    d, low, high = paired_difference(a, b)
    half = Z * max(0.0, n10 + n01 - (n10 - n01) ** 2 / n) ** 0.5 / n
    # A root amplifies the rounding of n10 + n01 - ..., some 2^-47, to at most 2^-23.5 / n where it is near 0
    assert (d, low, high) == pytest.approx(((n10 - n01) / n, d - half, d + half), rel=0, abs=1e-7)
    assert paired_difference(b, a) == (-d, -high, -low)
    assert mcnemar(a, b) == mcnemar(b, a)


@given(scores)
def test_a_paired_difference_is_rounded_only_at_its_end(pairs):
    a, b = zip(*pairs, strict=True)
    n, rows = len(a), [Fraction(x - y) for x, y in pairs]
    d, low, high = paired_difference(a, b)
    mean = sum(rows) / n
    spread = sum((x - mean) ** 2 for x in rows)
    assert d == float(mean)
    half = Z * math.sqrt(spread) / n
    assert (low, high) == pytest.approx((d - half, d + half), rel=2**-50, abs=2**-50 * (abs(d) + half))
    state = State(paired_difference)
    for x, y in pairs[::-1]:
        state.update([x], [y])
    assert state.compute() == (d, low, high)


def test_scores_that_differ_by_a_constant_have_no_spread():
    assert paired_difference([0.3, 7.3, 1e6 + 0.25], [0.05, 7.05, 1e6])[0] == pytest.approx(0.25, rel=1e-15)
    assert paired_difference([0.5, 7.5], [0.25, 7.25]) == (0.25, 0.25, 0.25)


def test_no_discordant_row_warns_once_where_the_statistic_is_undefined():
    with pytest.warns(MetricWarning, match="no row tells a from b") as caught:
        assert all(map(math.isnan, mcnemar([1, 0], [1, 0], exact=False)))
    assert len(caught) == 1


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: wilson(3, 2), "3 of 2 rows is no share"),
        (lambda: wilson(-1, 2), "-1 of 2 rows"),
        (lambda: wilson(0, 0), "0 of 0 rows is no share"),
        (lambda: wilson(0.81, 263), "give how many of the rows are right, not their share"),
        (lambda: wilson(math.nan, 2), "nan of 2 rows"),
        (lambda: wilson(1, 2, z=-1), "z -1 must be a number from 0 to 40"),
        (lambda: paired_difference([1, 0], [1]), "a has 2 rows and b 1"),
        (lambda: paired_difference([1, math.nan], [1, 1]), r"a\[1\] is nan"),
        (lambda: paired_difference([], []), "a is empty"),
        (lambda: paired_difference([1e308, 0], [0, 0]), r"a\[0\] - b\[0\] is 1e\+308; give smaller scores"),
        (lambda: paired_difference([1], [0], z=math.nan), "z nan must be"),
        (lambda: mcnemar([1, 0.5], [1, 1]), r"a\[1\] is 0.5; give 1 for right and 0 for wrong"),
        (lambda: mcnemar([1, 0], [1]), "a has 2 rows and b 1"),
    ],
)
def test_what_makes_no_interval_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.float32])
def test_wilson_computes_in_doubles_whatever_it_is_given(kind):
    assert wilson(kind(81000), kind(100000)) == wilson(81000, 100000)
