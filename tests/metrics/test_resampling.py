"""Bootstrap, randomization and comparisons: plain loops over the same draws, laws, and what is refused."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import bleu, f1, resampling
from minift.metrics.resampling import approximate_randomization, bootstrap, compare, paired_bootstrap

A, B = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 1, 3, 2, 4, 8, 2, 5, 3, 3]
pairs = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=8)


def median(values) -> float:
    return float(np.median(values))


def loop(columns, metric, samples: int, seed: int) -> list[float]:
    """The scores of drawn rows, one draw and one row at a time."""
    draws = np.random.default_rng(seed).integers(0, len(columns[0]), (samples, len(columns[0])))
    return [metric(*([column[i] for i in draw] for column in columns)) for draw in draws.tolist()]


def mean(values) -> float:
    return sum(values) / len(values)


def check_bootstrap(module):
    for metric, by_hand in ((None, mean), (median, median)):
        rows = A if metric is None else (A,)
        for level, places in ((0.95, (0.025, 0.975)), (0.5, (0.25, 0.75))):
            found = module.bootstrap(rows, metric, samples=401, seed=7, level=level)
            drawn = sorted(loop([A], by_hand, 401, 7))
            # 400 steps between 401 scores, so the quantiles are scores themselves
            assert found == pytest.approx((by_hand(A), *(drawn[round(400 * p)] for p in places)), rel=1e-14)


def check_paired(module):
    found = module.paired_bootstrap(A, B, samples=201, seed=3, level=0.9)
    d = [x - y for x, y in zip(loop([A], mean, 201, 3), loop([B], mean, 201, 3), strict=True)]
    far = mean([abs(x) for x in d])
    expected = {
        "difference": 0.6,
        "low": sorted(d)[10],
        "high": sorted(d)[190],
        "wins": (sum(x > 1e-9 for x in d) + sum(abs(x) <= 1e-9 for x in d) / 2) / 201,
        "p": (1 + sum(abs(x) - far >= 0.6 for x in d)) / 202,
    }
    assert found == pytest.approx(expected, rel=1e-14)
    assert expected["low"] > 0 and 2 / 202 < expected["p"] < 0.5  # that is, the case is not a trivial one
    same = module.paired_bootstrap(A, A)
    assert same == {"difference": 0, "low": 0, "high": 0, "wins": 0.5, "p": 1}
    assert module.compare(A, B, names=("big", "small")).better == "big"
    assert module.compare([1, 0, 0], [0, 0, 0]).better is None  # the interval ends at 0, so it holds 0
    assert module.compare(B, A, names=("small", "big")).better == "big"
    assert module.compare(A, B, names=("big", "small"), higher_is_better=False).better == "small"
    assert str(module.compare(A, A[::-1])).startswith(
        "no difference shown between a and b: 0 (95 % interval -"
    )
    text = "big is better than small by 0.6 (95 % interval 0.1 to 1.1, 10 rows)"
    assert str(module.compare(B, A, names=("small", "big"), seed=3, samples=201)) == text


def check_randomization(module):
    # 2 of the 2^6 ways to swap are as far apart; with trials this many the p of the draws is near that.
    p = module.approximate_randomization([1] * 6, [0] * 6, trials=20_000)
    assert abs(p - 2 / 64) < 6 * (2 / 64 * (62 / 64) / 20_000) ** 0.5 + 1 / 20_000  # 6 standard deviations
    assert module.approximate_randomization([0.1, 0.2], [0.3, 0.7], trials=99) > 0.3
    assert module.approximate_randomization([1] * 60, [0] * 60, trials=99) == 1 / 100
    # Ties count, though sums of tenths in another order differ in their last bits.
    whole = module.approximate_randomization([3, 8, 0, 0], [0, 0, 1, 7], trials=999)
    assert module.approximate_randomization([0.3, 0.8, 0, 0], [0, 0, 0.1, 0.7], trials=999) == whole
    assert module.approximate_randomization(A, A, trials=9) == 1
    by_metric = module.approximate_randomization((A,), (B,), mean, trials=500, seed=5)
    assert by_metric == module.approximate_randomization(A, B, trials=500, seed=5)
    assert 1 / 501 < by_metric < 0.2


def test_intervals_are_those_of_a_plain_loop():
    check_bootstrap(resampling)


def test_paired_intervals_are_those_of_a_plain_loop():
    check_paired(resampling)


def test_randomization_counts_what_is_as_far_apart():
    check_randomization(resampling)


MUTANTS = [
    (check_bootstrap, "[(1 - level) / 2, (1 + level) / 2]", "[(1 - level), level]"),
    (check_bootstrap, "(1 + level) / 2]", "(1 + level) / 2 - 0.01]"),
    (check_bootstrap, "yield rng.integers(0, n, (", "yield rng.integers(0, n - 1, ("),
    (
        check_bootstrap,
        "rng = np.random.default_rng(seed)\n    at_once = max(1, DRAWS // n)\n    for start in range(0, s",
        "rng = np.random.default_rng(0)\n    at_once = max(1, DRAWS // n)\n    for start in range(0, s",
    ),
    (check_bootstrap, "(columns[0] - first)[draws].mean(axis=1)", "(columns[0] - first)[draws].mean(axis=0)"),
    (check_bootstrap, "[column[i] for i in draw.tolist()]", "[column[i] for i in draw.tolist()[1:]]"),
    (check_paired, "np.append(of_a - of_b,", "np.append(of_b - of_a,"),
    (check_paired, "far - far.mean() >= abs(d)", "far >= abs(d)"),
    (check_paired, ">= abs(d) - rounding", ">= abs(d) + rounding"),
    (check_paired, "(1 + int((far", "(int((far"),
    (check_paired, "int((drawn == 0).sum())", "0"),
    (check_paired, "(low > 0) == higher_is_better", "(low > 0) != higher_is_better"),
    (check_paired, "if low <= 0 <= high", "if low < 0 < high"),
    (check_paired, "sorted((abs(low), abs(high)))", "(abs(low), abs(high))"),
    (check_randomization, "- len(d) * 2.0**-50 * float(np.abs(d).sum())", ""),
    (check_randomization, "d.sum() - 2 * (swaps @ d)", "d.sum() - swaps @ d"),
    (check_randomization, "(1 + as_far) / (1 + trials)", "as_far / trials"),
    (check_randomization, "scores[1]) - ROUNDING", "scores[1]) + ROUNDING"),
    (check_randomization, "((a, b), (b, a))", "((a, b), (a, b))"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, resampling, old, new)


def test_a_seed_gives_the_same_numbers_however_many_rows_are_drawn_at_a_time(monkeypatch):
    found = []
    for draws in (1 << 22, 1, 37):
        monkeypatch.setattr(resampling, "DRAWS", draws)
        randomized = approximate_randomization(A, B, trials=300, seed=4)
        found.append((bootstrap(A, samples=300, seed=4), paired_bootstrap(A, B, samples=300), randomized))
    assert found[0] == found[1] == found[2]
    assert bootstrap(A, seed=1) != bootstrap(A, seed=2)


def test_metrics_of_several_columns_take_texts_and_arrays():
    y_true, y_pred = ["a", "b", "a", "b", "a", "b"] * 5, ["a", "b", "b", "b", "a", "a"] * 5
    score, low, high = bootstrap((y_true, y_pred), f1, samples=200)
    assert score == f1(y_true, y_pred) and low < score < high
    assert bootstrap((np.array(y_true), np.array(y_pred)), f1, samples=200) == (score, low, high)
    found = paired_bootstrap((y_true, y_pred), (y_true, y_true), f1, samples=200)
    assert found["difference"] == score - 1 and found["wins"] == 0 and found["high"] < 0
    p = approximate_randomization((y_true, y_pred), (y_true, y_true), f1, trials=200)
    assert p < 0.05  # ten of thirty rows differ, and all to one side: 2^-9 if all trials were made
    table = np.arange(12.0).reshape(6, 2)
    assert bootstrap(table, lambda t: float(t[:, 1].mean()), samples=50)[0] == 6


@given(pairs, st.integers(0, 2**31))
def test_randomization_is_near_the_share_of_all_swaps(rows, seed):
    a, b = map(list, zip(*rows, strict=True))
    d = [x - y for x, y in rows]
    swaps = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=len(d))
    ]
    share = sum(x >= abs(sum(d)) for x in swaps) / len(swaps)
    p = approximate_randomization(a, b, trials=2000, seed=seed)
    assert abs(p - share) <= 6 * math.sqrt(share * (1 - share) / 2000) + 1 / 2000  # 6 standard deviations


@given(pairs, st.integers(0, 2**31))
def test_sides_exchanged_give_the_mirror(rows, seed):
    a, b = zip(*rows, strict=True)
    one, other = (paired_bootstrap(*sides, samples=99, seed=seed) for sides in ((a, b), (b, a)))
    mirrored = {
        "difference": -one["difference"],
        "low": -one["high"],
        "high": -one["low"],
        "wins": 1 - one["wins"],
        "p": one["p"],
    }
    assert other == pytest.approx(mirrored, rel=0, abs=1e-13)  # scores to 9, sums of 8
    assert compare(a, b, seed=seed).better == compare(b, a, names=("b", "a"), seed=seed).better


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: bootstrap([1]), "rows has 1 rows; give at least 2"),
        (lambda: bootstrap([]), "rows is empty"),
        (lambda: bootstrap([1, math.nan]), r"rows\[1\] is nan"),
        (lambda: bootstrap(([1, 0], [1, 0])), r"rows has shape \(2, 2\)"),
        (lambda: bootstrap([1, 0], samples=0), "samples is 0; give a whole number"),
        (lambda: bootstrap([1, 0], level=95), "level 95 must be between 0 and 1"),
        (lambda: bootstrap(([1, 0], [1]), f1), r"rows\[0\] has 2 rows and rows\[1\] 1"),
        (lambda: bootstrap("text", len), r"rows\[0\] is 'text'; give a list"),
        (lambda: bootstrap((), len), "rows is empty"),
        (lambda: bootstrap([1, 2], lambda x: {"score": 1}), "the metric gives {'score': 1} on a sample of 2"),
        (lambda: bootstrap([1, 2], lambda x: math.nan), "the metric gives nan"),
        (lambda: bootstrap([0, 1], lambda x: 0 if sum(x) == 1 else math.inf), "the metric gives inf"),
        (lambda: paired_bootstrap([1, 0], [1, 0, 1]), "a has 2 rows and b 3"),
        (lambda: paired_bootstrap(([1, 0], [1, 0]), ([1, 0],), f1), "a has 2 columns and b 1"),
        (lambda: approximate_randomization([1, 0], [0, 1], trials=-1), "trials is -1"),
        (lambda: compare([1, 0], [0, 1], names="ab"), "must be two different names"),
        (lambda: compare([1, 0], [0, 1], names=("a", "a")), "must be two different names"),
    ],
)
def test_what_cannot_be_drawn_again_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_scores_whose_difference_is_rounding_show_none():
    found = paired_bootstrap([0.2, 0.2, 0.1, 0.1], [0.1, 0.1, 0.2, 0.2], samples=400)
    exact = paired_bootstrap([2, 2, 1, 1], [1, 1, 2, 2], samples=400)
    assert (found["wins"], found["p"]) == (exact["wins"], exact["p"]) and found["difference"] == 0
    assert compare([0.2, 0.6, 0.4, 0.3], [0.6, 0.8, 0.8, 0.1], samples=200, level=0.9).better is None
    assert bootstrap([0.7] * 7) == (0.7, 0.7, 0.7)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=2, max_size=12))
def test_randomization_of_means_is_the_same_with_a_metric_and_without(pairs):
    a, b = (np.array(side) / 10 for side in zip(*pairs, strict=True))
    assert approximate_randomization(a, b, trials=200) == approximate_randomization(a, b, np.mean, trials=200)


def test_results_that_hold_a_score_can_be_drawn_anew():
    texts = [f"the cat {word} on the mat" for word in ("sat", "lay", "ran")]
    score, low, high = bootstrap((texts, texts[::-1]), bleu, samples=20)
    assert low <= score <= high and f"{bleu(texts, texts):.1f}" == "100.0"
    with pytest.raises(ValueError, match="returns one finite number"):
        bootstrap(([1, 0, 1], [1, 0, 0]), lambda y, p: f1(y, p, average=None))
