"""Agreement of raters: published tables, the definitions pair by pair, laws, and what is refused."""

import json
import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, State, agreement
from minift.metrics.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha

N = None
# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section D: four observers, twelve units.
FOUR = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]
ALPHAS = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849, "ratio": 0.797}
# P = (1 + 1 + 1/3 + 1) / 4 and Pe = (8/12)^2 + (4/12)^2, so (5/6 - 5/9) / (4/9).
FLEISS = [[3, 0], [0, 3], [2, 1], [3, 0]]
# r = (3, 2, 3), c = (1, 2, 5); the rows (0, 2), (0, 1) and (1, 2) disagree. n times 3, 4 and 6 steps, over
# 64 - (3 + 4 + 15) = 42, 24 + 2 * 18 = 60 and 24 + 4 * 18 = 96.
Y1, Y2 = [0, 0, 1, 1, 2, 2, 2, 0], [2, 1, 1, 2, 2, 2, 2, 0]
BY_HAND = {None: 1 - 24 / 42, "linear": 1 - 32 / 60, "quadratic": 1 - 48 / 96}

raters = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=25)
tables = st.integers(2, 5).flatmap(
    lambda r: st.lists(st.lists(st.integers(0, 3), min_size=r, max_size=r), min_size=1, max_size=12)
)
matrices = st.tuples(st.integers(2, 4), st.integers(1, 8)).flatmap(
    lambda size: st.lists(
        st.lists(st.sampled_from([N, 0, 1, 2, 5, 9]), min_size=size[1], max_size=size[1]),
        min_size=size[0],
        max_size=size[0],
    )
)


def counted(rows: list[list[int]]) -> list[list[int]]:
    return [[row.count(j) for j in range(4)] for row in rows]


def pairwise_kappa(y1, y2, distance) -> float:
    """From the definition: disagreement in the rows over that of any row's y1 with any row's y2."""
    seen = sum(distance(a, b) for a, b in zip(y1, y2, strict=True)) / len(y1)
    chance = sum(distance(a, b) for a in y1 for b in y2) / len(y1) ** 2
    return 1 - seen / chance if chance else math.nan


def pairwise_alpha(matrix, level: str) -> float:
    """From the definition: disagreement within units over that among all ratings that have a partner."""
    units = [[v for v in column if v is not None] for column in zip(*matrix, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    ratings = [v for unit in units for v in unit]
    n = Counter(ratings)

    def distance(c, k):
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return (c - k) ** 2
        if level == "ratio":
            return ((c - k) / (c + k)) ** 2 if c != k else 0.0
        between = sum(n[g] for g in n if min(c, k) <= g <= max(c, k))
        return (between - (n[c] + n[k]) / 2) ** 2

    seen = sum(sum(distance(*p) for p in permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    chance = sum(2 * distance(*p) for p in combinations(ratings, 2)) / (len(ratings) - 1)
    return 1 - seen / chance


def check_kappas(module):
    # Cohen's example as tables on Wikipedia, "Cohen's kappa": 20, 5, 10, 15 and 45, 15, 25, 15.
    for (yes, a, b, no), expected in (((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 3 / 23)):
        y1, y2 = [1] * (yes + a) + [0] * (b + no), [1] * yes + [0] * a + [1] * b + [0] * no
        assert module.cohen_kappa(y1, y2) == pytest.approx(expected, rel=0, abs=2e-16)  # half-ulps
    for weights, expected in BY_HAND.items():
        assert module.cohen_kappa(Y1, Y2, weights=weights) == pytest.approx(expected, rel=0, abs=2e-16)
    assert module.cohen_kappa([0, 0, 1, 1, 5], [0, 1, 1, 1, 0], labels=[1, 0]) == 0.5
    assert module.fleiss_kappa(FLEISS) == 0.625


def check_alphas(module):
    for level, expected in ALPHAS.items():
        assert module.krippendorff_alpha(FOUR, level) == pytest.approx(
            expected, rel=0, abs=5e-4
        )  # three digits
        exact = pairwise_alpha(FOUR, level)
        assert module.krippendorff_alpha(FOUR, level) == pytest.approx(
            exact, rel=0, abs=1e-14
        )  # sums of 40 terms


def test_published_kappas_and_kappas_by_hand():
    check_kappas(agreement)


def test_published_alphas():
    check_alphas(agreement)


def test_the_reference_file(shared_data):
    rows = json.loads((shared_data / "metric_refs" / "agreement.json").read_text())
    for row in rows:
        if row["kind"] == "cohen_kappa":
            cells = [(i, j, n) for i, line in enumerate(row["table"]) for j, n in enumerate(line)]
            y1, y2 = ([cell[side] for cell in cells for _ in range(cell[2])] for side in (0, 1))
            found = cohen_kappa(y1, y2)
        elif row["kind"] == "fleiss_kappa":
            found = fleiss_kappa(row["table"])
        else:
            found = krippendorff_alpha(row["coders_by_units"], row["level"])
        assert found == pytest.approx(
            row["expected"], rel=0, abs=1e-15
        )  # expected is a double, rounded elsewhere
        digits = len(str(row["published"]).partition(".")[2])
        assert found == pytest.approx(row["published"], abs=0.5 * 10**-digits * (1 + 1e-9))
    assert len(rows) == 5


MUTANTS = [
    (check_kappas, "int(i != j)", "int(i == j)"),
    (check_kappas, '"linear": abs(i - j)', '"linear": (i - j) ** 2'),
    (check_kappas, '"quadratic": (i - j) ** 2', '"quadratic": abs(i - j)'),
    (check_kappas, "n * n - sum(r[i] * c[i]", "n * n - sum(r[i] * r[i]"),
    (check_kappas, "up * (n - to) + to * (n - up)", "2 * up * (n - to)"),
    (check_kappas, "n * sum(i * i * (r[i] + c[i])", "n * sum(i * (r[i] + c[i])"),
    (check_kappas, "- 2 * mean_r * mean_c", "- 2 * mean_r * mean_r"),
    (check_kappas, "expected - sum(rows) * observed", "expected - observed"),
    (check_kappas, "known = (first >= 0) & (second >= 0)", "known = (first >= -1) & (second >= -1)"),
    (check_kappas, "(same - ratings) * ratings", "same * ratings"),
    (check_kappas, "categories.tolist()) * (raters - 1)", "categories.tolist())"),
    (check_kappas, "ratings * ratings * (raters - 1) - chance", "ratings * ratings * raters - chance"),
    (check_alphas, "o = count / (m - 1)", "o = count / m"),
    (check_alphas, "(n - 1) * 2 * observed", "n * 2 * observed"),
    (check_alphas, "np.cumsum(n_c) - n_c / 2", "np.cumsum(n_c)"),
    (check_alphas, "o[c != k].sum(), n * n", "o[c < k].sum() / 2, n * n"),
    (check_alphas, "n_c * x * x).sum() - (n_c", "n_c * x * x).sum() + 1 - (n_c"),
    (check_alphas, "both = c + k", "both = c + k + 1"),
    (check_alphas, "same = units[apart:] == units[:-apart]", "same = units[apart:] >= units[:-apart]"),
    (check_alphas, "range(1, int(m.max(initial=1)))", "range(1, 2)"),
    (check_alphas, "there = np.array([[v is not None and", "there = np.array([[v is not None or"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, agreement, old, new)


@pytest.mark.filterwarnings("ignore::minift.metrics.MetricWarning")
@given(raters)
def test_kappa_is_its_definition_and_symmetric(pairs):
    y1, y2 = map(list, zip(*pairs, strict=True))
    labels = sorted({*y1, *y2})
    at = [[labels.index(v) for v in y] for y in (y1, y2)]
    distances = {None: lambda a, b: a != b, "linear": lambda a, b: abs(a - b)}
    distances["quadratic"] = lambda a, b: (a - b) ** 2
    for weights, distance in distances.items():
        found = cohen_kappa(y1, y2, weights=weights)
        assert found == pytest.approx(pairwise_kappa(*at, distance), abs=1e-12, rel=0, nan_ok=True)
        assert found == pytest.approx(cohen_kappa(y2, y1, weights=weights), abs=0, rel=0, nan_ok=True)
        flipped = cohen_kappa(y1, y2, labels=labels[::-1], weights=weights)  # distances are the same
        assert found == pytest.approx(flipped, abs=0, rel=0, nan_ok=True)


@given(tables)
def test_fleiss_kappa_is_its_definition(rows):
    table = counted(rows)
    r, n = len(rows[0]), len(rows)
    shares = [sum(line[j] for line in table) / (n * r) for j in range(4)]
    chance = sum(s * s for s in shares)
    assume(chance < 1)
    agree = sum(sum(a == b for a, b in permutations(row, 2)) / (r * (r - 1)) for row in rows) / n
    assert fleiss_kappa(table) == pytest.approx((agree - chance) / (1 - chance), rel=0, abs=1e-12)


@given(matrices, st.sampled_from(list(ALPHAS)), st.randoms())
def test_alpha_is_its_definition_and_knows_no_order_of_coders_or_units(matrix, level, random):
    ratings = [v for c in zip(*matrix, strict=True) if sum(x is not None for x in c) > 1 for v in c]
    assume(len({v for v in ratings if v is not None}) > 1)
    found = krippendorff_alpha(matrix, level)
    assert found == pytest.approx(pairwise_alpha(matrix, level), rel=0, abs=1e-12)
    columns = list(zip(*random.sample(matrix, len(matrix)), strict=True))
    shuffled = list(zip(*random.sample(columns, len(columns)), strict=True))
    assert krippendorff_alpha(shuffled, level) == found
    with_nan = [[math.nan if v is None else v for v in line] for line in matrix]
    assert krippendorff_alpha(with_nan, level) == found
    if level == "nominal":
        assert krippendorff_alpha([[v if v is None else f"v{v}" for v in line] for line in matrix]) == found


def test_alpha_does_not_change_with_the_scales_unit_or_zero():
    shifted = [[v if v is None else 1e9 + v / 8 for v in line] for line in FOUR]  # exact in doubles
    assert krippendorff_alpha(shifted, "interval") == pytest.approx(
        krippendorff_alpha(FOUR, "interval"), abs=1e-12
    )
    large = [[v if v is None else v * 2.0**1000 for v in line] for line in FOUR]
    for level in ("interval", "ratio"):
        assert krippendorff_alpha(large, level) == krippendorff_alpha(FOUR, level)


def test_batches_of_units_join_their_values():
    state = State(krippendorff_alpha, level="ordinal")
    for start in (0, 5, 8):
        state.update([line[start : {0: 5, 5: 8, 8: 12}[start]] for line in FOUR])
    assert state.compute() == krippendorff_alpha(FOUR, "ordinal")
    state = State(fleiss_kappa).update([[3, 0]]).update([[2, 0]])
    with pytest.raises(ValueError, match="different numbers of raters"):
        state.compute()


def test_raters_of_one_label_are_undefined_and_say_so():
    for call in (
        lambda: cohen_kappa([1, 1], [1, 1]),
        lambda: cohen_kappa([1, 2], [3, 3], labels=[1, 2]),
        lambda: fleiss_kappa([[2, 0], [2, 0]]),
        lambda: krippendorff_alpha([[1, 1, 2], [1, 1, None]]),
    ):
        with pytest.warns(MetricWarning) as caught:
            assert math.isnan(call())
        assert len(caught) == 1
    with pytest.warns(MetricWarning, match="taken as 0.0"):
        assert cohen_kappa([1, 1], [1, 1], replace_undefined_by=0.0) == 0.0


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: cohen_kappa([0, 1], [0]), "has 2 rows and .* 1"),
        (lambda: cohen_kappa([0, 1], [0, 1], weights="cubic"), "weights 'cubic' is not one of"),
        (lambda: cohen_kappa([0, 1], [0, 1], labels=[7]), r"none of labels \[7\] is in y1"),
        (lambda: cohen_kappa([0], [0], replace_undefined_by=2), "2 is not within -1 to 1"),
        (lambda: fleiss_kappa([[2, 1], [3, 0], [1, 1]]), "row 2 of table sums to 2 and row 0 to 3"),
        (lambda: fleiss_kappa([[1, 0], [0, 1]]), "at least 2"),
        (lambda: fleiss_kappa([[2, -1]]), r"table\[0, 1\] is -1; give counts"),
        (lambda: fleiss_kappa([[2, 0.5]]), r"table\[0, 1\] is 0.5"),
        (lambda: fleiss_kappa([3, 0]), r"shape \(2,\)"),
        (lambda: krippendorff_alpha([1, 2]), r"ratings has shape \(2,\); give \(coders, units\)"),
        (lambda: krippendorff_alpha([[1, 2], [1]]), r"give \(coders, units\)"),
        (lambda: krippendorff_alpha([[1, N], [N, 2]]), "no unit has two ratings"),
        (lambda: krippendorff_alpha([[1, "a"], [1, 2]]), r"ratings\[0, 1\] is 'a' and the first is 1"),
        (lambda: krippendorff_alpha([[1, math.inf], [1, 2]]), r"ratings\[0, 1\] is inf"),
        (lambda: krippendorff_alpha([["a", "b"], ["a", "a"]], "ordinal"), "'ordinal' needs numbers"),
        (lambda: krippendorff_alpha([[1, -1], [1, 2]], "ratio"), "at least 0, and one is -1"),
        (lambda: krippendorff_alpha([[1, 2], [1, 2]], "rational"), "level 'rational' is not one of"),
    ],
)
def test_what_is_no_agreement_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_missing_ratings_that_numpy_made_strings_are_refused():
    with pytest.raises(ValueError, match="numpy made strings of missing ratings"):
        krippendorff_alpha(np.array([["a", np.nan, "b"], ["a", "b", "b"]]))
