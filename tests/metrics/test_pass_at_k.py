"""pass@k and maj@k: published values, all subsets counted, laws, and what is refused."""

import json
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import State, sampling
from minift.metrics.sampling import maj_at_k, pass_at_k

problems = st.lists(
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=8
)
votes = st.lists(
    st.lists(st.sampled_from(["1", "2", "3", None]), min_size=3, max_size=7), min_size=1, max_size=6
)


def subsets_with_a_right_one(n: int, c: int, k: int) -> Fraction:
    subsets = list(combinations([1] * c + [0] * (n - c), k))
    return Fraction(sum(any(s) for s in subsets), len(subsets))


def check_pass(module):
    # The sanity check in human-eval's README: 3 of 6 samples right, k = 1.
    assert module.pass_at_k(6, 3, 1) == 0.5
    assert module.pass_at_k(10, 3, 5) == 11 / 12
    assert module.pass_at_k(20, [7, 0], 10) == float(Fraction(184756 - 286, 184756) / 2)
    assert module.pass_at_k([4, 2, 2], [1, 1, 2], 2) == 2.5 / 3
    assert module.pass_at_k([3, 2, 2], [1, 1, 1], 1) == 4 / 9
    # As many right samples as miss n by less than k: certain, and next to certain with one less.
    assert module.pass_at_k(200, 101, 100) == 1.0 and module.pass_at_k(40, 20, 20) < 1.0
    # A hundred thousand problems of 0.1 each: a mean rounded once, where a sum of floats drifts.
    assert module.pass_at_k(10, [1] * 100_000, 1) == 0.1


def check_majority(module):
    answers, references = (
        [["18", "18", "26", "18"], ["3", "4", "4", "3"], ["7", "8", "9", "9"]],
        ["18", "4", "9"],
    )
    assert module.maj_at_k(answers, references) == (1 + 1 / 2 + 1) / 3
    assert module.maj_at_k(answers, references, k=3) == (1 + 1 + 1 / 3) / 3
    assert module.maj_at_k(answers, references, k=1) == 1 / 3
    assert module.maj_at_k([[None, None, "5"], [None, None]], ["5", "5"]) == 0.5
    assert module.maj_at_k([["1", "2", "2"], ["2"]], ["1", "2"]) == 0.5


def test_published_shares_and_shares_by_hand():
    check_pass(sampling)


def test_majorities_by_hand():
    check_majority(sampling)


def test_the_reference_file(shared_data):
    rows = json.loads((shared_data / "metric_refs" / "pass_at_k.json").read_text())
    for row in rows:
        assert pass_at_k(row["n"], row["c"], row["k"]) == row["expected"]
    assert len(rows) == 9


MUTANTS = [
    (check_pass, "comb(n_i, k) - comb(n_i - c_i, k)", "comb(n_i, k) - comb(c_i, k)"),
    (check_pass, "comb(n_i - c_i, k), comb(n_i, k)]", "comb(n_i - c_i, k), n_i**k]"),
    (check_pass, "] += count\n    return _mean", "] += 1\n    return _mean"),
    (check_pass, "under * shares.total()", "under * len(shares)"),
    (check_pass, "count * over * (under // u)", "count * over"),
    (check_pass, "[n] * len(c)", "[n + 1] * len(c)"),
    (check_pass, "lcm(*(u for _, u in shares))", "max(u for _, u in shares)"),
    (check_majority, "given[:k] if answer is not None", "given[:k]"),
    (check_majority, "in given[:k]", "in given"),
    (check_majority, "sum(v == most for v in votes.values())", "1"),
    (check_majority, "votes[reference] == most else 0", "votes[reference] else 0"),
    (check_majority, "max(1, t)): count", "max(1, t)): 1"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, sampling, old, new)


@given(problems, st.data())
def test_the_score_is_the_share_of_subsets_rounded_once(rows, data):
    n, c = map(list, zip(*rows, strict=True))
    k = data.draw(st.integers(1, min(n)))
    exact = sum(subsets_with_a_right_one(n_i, c_i, k) for n_i, c_i in rows) / len(rows)
    assert pass_at_k(n, c, k) == float(exact) == pass_at_k(np.array(n), np.array(c), k)
    state = State(pass_at_k, k=k)
    for n_i, c_i in rows[::-1]:
        state.update(n_i, c_i)
    assert state.compute() == float(exact)


@given(st.integers(1, 400), st.data())
def test_more_samples_or_more_right_ones_never_score_less(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    here = pass_at_k(n, c, k)
    assert 0 <= here <= 1 and (here == 1 or n - c >= k)
    assert here <= pass_at_k(n, min(n, c + 1), k) and here <= pass_at_k(n, c, min(n, k + 1))
    assert pass_at_k(n, c, 1) == c / n


@given(votes, st.data())
def test_a_majority_is_what_picking_among_the_leaders_gives(answers, data):
    references = [data.draw(st.sampled_from("123")) for _ in answers]
    k = data.draw(st.sampled_from([None, 1, 2, 3]))
    total = Fraction(0)
    for given_, right in zip(answers, references, strict=True):
        count = Counter(a for a in given_[:k] if a is not None)
        leaders = [a for a, n in count.items() if n == max(count.values())]
        total += Fraction(leaders.count(right), max(1, len(leaders)))
    assert maj_at_k(answers, references, k) == float(total / len(answers))
    state = State(maj_at_k, k=k)
    for row in zip(answers, references, strict=True):
        state.update(*([x] for x in row))
    assert state.compute() == float(total / len(answers))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: pass_at_k(5, 2, 6), r"k 6 is above n\[0\] = 5; draw more samples"),
        (lambda: pass_at_k([9, 5], [1, 2], 6), r"k 6 is above n\[1\] = 5"),
        (lambda: pass_at_k(sampling.problem_counts(5, 2), None, 6), "k 6 is above n = 5 of a problem"),
        (lambda: pass_at_k(5, 2, 0), "k is 0; give a whole number of at least 1"),
        (lambda: pass_at_k(5, 2, 1.5), "k is 1.5"),
        (lambda: pass_at_k(5, [1, 6], 1), r"c\[1\] is 6 of n = 5 samples"),
        (lambda: pass_at_k(5, [1, -1], 1), r"c\[1\] is -1"),
        (lambda: pass_at_k(5, [0.5], 1), r"c\[0\] is 0.5"),
        (lambda: pass_at_k(5, [True], 1), r"c\[0\] is True"),
        (lambda: pass_at_k([5, 5], [1], 1), "n has 2 rows and c 1"),
        (lambda: pass_at_k(5, [], 1), "c is empty"),
        (lambda: maj_at_k([["1"]], ["1"], k=2), r"answers\[0\] has 1 answers; give at least 2"),
        (lambda: maj_at_k([[]], ["1"]), r"answers\[0\] has 0 answers"),
        (lambda: maj_at_k(["12"], ["1"]), r"answers\[0\] is '12'; give a list"),
        (lambda: maj_at_k([["1"]], [None]), r"references\[0\] is None"),
        (lambda: maj_at_k([["1"]], ["1", "2"]), "answers has 1 rows and references 2"),
        (lambda: maj_at_k([], []), "answers is empty"),
        (lambda: maj_at_k([["1"]], ["1"], k=0), "k is 0"),
    ],
)
def test_what_is_no_sample_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
