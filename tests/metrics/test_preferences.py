"""Ratings, win rates and strengths: published tables, by hand, laws, and what is refused."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import State, preferences
from minift.metrics.preferences import aggregate_ratings, bradley_terry, win_rate
from minift.metrics.uncertainty import wilson

# Agresti 2002, "Categorical Data Analysis", table 10.10: wins of the American League's teams in 1987, and
# their estimated log strengths over Baltimore's, as the R package BradleyTerry2 prints them.
TEAMS = ["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"]
WINS = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
LOGS = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0]
# The example of Wikipedia, "Bradley-Terry model": strengths with geometric mean 1.
FOUR = [[0, 2, 0, 1], [3, 0, 5, 0], [0, 3, 0, 1], [4, 0, 3, 0]]
STRENGTHS = dict(zip("ABCD", [0.640, 1.043, 0.660, 2.270], strict=True))

duels = st.lists(
    st.tuples(*2 * [st.sampled_from("abcd")], st.sampled_from(["win", "tie", "loss"])).filter(
        lambda duel: duel[0] != duel[1]
    ),
    min_size=1,
    max_size=40,
)
ratings = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=8)


def check_strengths(module):
    found = module.bradley_terry(np.array(WINS), TEAMS)
    last = found["Baltimore"]
    for team, expected in zip(TEAMS, LOGS, strict=True):
        over = found[team]["strength"] / last["strength"]
        assert math.log(over) == pytest.approx(expected, rel=0, abs=5.1e-5)  # its four decimals
        points = 400 * math.log10(over)
        assert found[team]["elo"] - last["elo"] == pytest.approx(points, rel=0, abs=1e-9)
    assert list(found) == TEAMS  # strongest first
    assert sum(p["strength"] for p in found.values()) == pytest.approx(1, rel=0, abs=1e-14)
    assert sum(p["elo"] for p in found.values()) / 7 == pytest.approx(1000, rel=0, abs=1e-9)
    found = module.bradley_terry(FOUR, list("ABCD"))
    scale = math.prod(p["strength"] for p in found.values()) ** 0.25
    assert {n: round(p["strength"] / scale, 3) for n, p in found.items()} == STRENGTHS
    # 3 wins and 3 ties in 7: odds of 4.5 to 2.5.
    found = module.bradley_terry([("x", "y", o) for o in ["win"] * 3 + ["tie", 0.5, 0.5, "loss"]])
    assert found["x"]["strength"] == pytest.approx(9 / 14, rel=0, abs=1e-11)  # where the iteration ends


def check_ratings(module):
    found = module.aggregate_ratings([[4, 5, 5], [2, None, 3], [1]])
    assert found["items"] == [
        {"mean": 14 / 3, "median": 5, "majority": [5]},
        {"mean": 2.5, "median": 2.5, "majority": [2, 3]},
        {"mean": 1, "median": 1, "majority": [1]},
    ]
    assert found["overall"] == {"mean": 20 / 6, "median": 3.5, "majority": [5], "ratings": 6}
    found = module.win_rate(["win", "win", "tie", "loss", 1, 0.5, 0, False])
    assert {k: found[k] for k in ("wins", "ties", "losses")} == {"wins": 3, "ties": 2, "losses": 3}
    assert found["win_rate"] == 4 / 8 and (found["low"], found["high"]) == wilson(4, 8)


def test_published_strengths():
    check_strengths(preferences)


def test_ratings_and_wins_by_hand():
    check_ratings(preferences)


MUTANTS = [
    (check_strengths, "met, won = wins + wins.T, wins.sum(axis=1)", "met, won = wins, wins.sum(axis=1)"),
    (check_strengths, "return p / p.sum()", "return p"),
    (check_strengths, "weight + 1, won", "weight + 1, 1.01 * won"),
    (check_strengths, "400 * (log10(p_i) - middle)", "400 * log10(p_i)"),
    (check_strengths, "400 * (log10(p_i)", "173 * (log10(p_i)"),
    (check_strengths, "= count / 2", "= count // 2"),
    (check_strengths, "int(2 * wins[i, j])", "int(2 * wins[j, i])"),
    (check_strengths, "SETTLED = 1e-9", "SETTLED = 3"),
    (check_strengths, "(b, a): 2 * lost + tied", "(b, a): 2 * lost"),
    (check_strengths, 'key=lambda item: -item[1]["strength"]', 'key=lambda item: item[1]["strength"]'),
    (check_ratings, "ordered[(n - 1) // 2]", "ordered[n // 2]"),
    (check_ratings, "a if a == b else (a + b) / 2", "b"),
    (check_ratings, "if count == most]", "if count > 1]"),
    (check_ratings, "wilson(wins + ties / 2, n)", "wilson(wins, n)"),
    (check_ratings, "(2 * wins + ties) / (2 * n)", "(wins + ties) / n"),
    (check_ratings, 'counts["tie"], counts["loss"])', 'counts["loss"], counts["tie"])'),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, preferences, old, new)


def connected(pairs: set) -> bool:
    names = {name for pair in pairs for name in pair}
    reach = {(a, b) for a, b in pairs} | {(n, n) for n in names}
    for k in names:
        reach |= {(a, b) for a in names for b in names if (a, k) in reach and (k, b) in reach}
    return len(reach) == len(names) ** 2


@given(duels, st.randoms())
def test_strengths_predict_each_players_wins_or_the_group_that_never_won_is_named(rows, random):
    won, met = Counter(), Counter()
    for a, b, outcome in rows:
        points = {"win": 1, "tie": 0.5, "loss": 0}[outcome]
        won[a, b] += points
        won[b, a] += 1 - points
        met[a, b] += 1
        met[b, a] += 1
    if not connected({pair for pair, points in won.items() if points}):
        with pytest.raises(ValueError, match="none of .* has won or tied against any of") as caught:
            bradley_terry(rows)
        losers, others = str(caught.value).removeprefix("none of ").split(" has won or tied against any of ")
        others = others.split(", so their")[0].split(", ")
        assert not any(won[a, b] for a in losers.split(", ") for b in others)
        assert {*losers.split(", "), *others} == {name for pair in met for name in pair}
        return
    found = bradley_terry(rows)
    p = {name: player["strength"] for name, player in found.items()}
    for a in p:
        expected = sum(n * p[a] / (p[a] + p[c]) for (b, c), n in met.items() if b == a)
        assert expected == pytest.approx(sum(won[a, b] for b in p), rel=0, abs=1e-10)  # 1e-12 of <= 40 duels
    flipped = [(b, a, {"win": "loss", "tie": "tie", "loss": "win"}[o]) for a, b, o in rows]
    assert bradley_terry(random.sample(flipped, len(flipped))) == found


@given(st.lists(st.sampled_from(["win", "tie", "loss"]), min_size=1, max_size=50))
def test_the_other_sides_rate_is_the_rest_and_the_interval_is_not_too_narrow(outcomes):
    found = win_rate(outcomes)
    other = win_rate([{"win": "loss", "tie": "tie", "loss": "win"}[o] for o in outcomes])
    assert found["win_rate"] + other["win_rate"] == pytest.approx(1, rel=0, abs=2**-52)
    assert found["low"] <= found["win_rate"] <= found["high"]
    values = [{"win": 1, "tie": 0.5, "loss": 0}[o] for o in outcomes]
    p = found["win_rate"]
    assert np.var(values) <= p * (1 - p) + 1e-15  # what the docstring says of ties, but for rounding


@given(ratings)
def test_overall_is_one_item_of_all_ratings_and_shifts_with_the_scale(items):
    found = aggregate_ratings(items)
    joined = aggregate_ratings([[r for item in items for r in item]])
    alone = {k: v for k, v in found["overall"].items() if k != "ratings"}
    assert joined["items"] == [alone]
    assert alone["mean"] == pytest.approx(np.mean([r for i in items for r in i]), rel=0, abs=1e-14)
    assert alone["median"] == np.median([r for i in items for r in i])
    shifted = aggregate_ratings([[r + 10 for r in item] for item in items], scale=(11, 15))
    assert shifted["overall"]["majority"] == [m + 10 for m in alone["majority"]]


def test_a_chain_of_players_that_barely_meet_still_settles():
    wins = np.diag([3.0] * 9, 1) + np.diag([1.0] * 9, -1)
    found = bradley_terry(wins, [f"{i}" for i in range(10)])
    p = [player["strength"] for player in found.values()]
    assert [a / b for a, b in pairwise(p)] == pytest.approx([3] * 9, rel=1e-8)  # 9 links


def test_strengths_that_do_not_settle_are_an_error(monkeypatch):
    monkeypatch.setattr(preferences, "LIMIT", 3)
    with pytest.raises(ValueError, match="not settled after 3 rounds"):
        bradley_terry(np.array(WINS), TEAMS)


@given(duels)
def test_batches_of_duels_add(rows):
    assume(
        connected({(a, b) for a, b, o in rows if o != "loss"} | {(b, a) for a, b, o in rows if o != "win"})
    )
    state = State(bradley_terry)
    for row in rows[::-1]:
        state.update([row])
    assert state.compute() == bradley_terry(rows)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: aggregate_ratings([[1, 2], [3, 6]]), r"ratings\[1\]\[1\] is 6; give a number from 1 to 5"),
        (lambda: aggregate_ratings([[math.nan]]), r"ratings\[0\]\[0\] is nan"),
        (lambda: aggregate_ratings([["good"]]), r"ratings\[0\]\[0\] is 'good'"),
        (lambda: aggregate_ratings([3, 4]), r"ratings\[0\] is 3; give a list"),
        (lambda: aggregate_ratings([[1], [None]]), r"ratings\[1\] has no rating"),
        (lambda: aggregate_ratings([]), "ratings is empty"),
        (lambda: aggregate_ratings([[1]], scale=(5, 1)), "lowest below the highest"),
        (lambda: win_rate([]), "outcomes is empty"),
        (lambda: win_rate(["win", "draw"]), r"outcomes\[1\] 'draw' is not one of 'win', 'tie', 'loss'"),
        (lambda: win_rate([1, 0.3]), r"outcomes\[1\] is 0.3; give 'win'"),
        (lambda: win_rate("win"), "outcomes is 'win'; give a list"),
        (lambda: bradley_terry([]), "comparisons is empty"),
        (lambda: bradley_terry([("a", "b")]), r"comparisons\[0\] is \('a', 'b'\)"),
        (lambda: bradley_terry([("a", "a", "win")]), "two different names"),
        (lambda: bradley_terry([("a", "b", "won")]), r"comparisons\[0\]\[2\] 'won' is not one of"),
        (lambda: bradley_terry([("a", "b", "win")]), "none of b has won or tied against any of a"),
        (lambda: bradley_terry([[0, 1]], ["a", "b"]), r"shape \(1, 2\) for names"),
        (lambda: bradley_terry([[0, -1], [1, 0]], ["a", "b"]), "wins of 'a' over 'b' are -1.0"),
        (lambda: bradley_terry([[1, 1], [1, 0]], ["a", "b"]), "wins of 'a' over 'a' are 1.0"),
    ],
)
def test_what_is_no_preference_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("n", [10, 1000, 10**5])
def test_strengths_that_hang_on_few_comparisons_are_exact(n):
    """a and b, and c and d, met often and evenly; a beat c in 3 of 4: p_a / p_c is 3."""
    wins = [[0, n, 3, 0], [n, 0, 0, 0], [1, 0, 0, n], [0, 0, n, 0]]
    found = bradley_terry(wins, list("abcd"))
    assert found["a"]["strength"] / found["c"]["strength"] == pytest.approx(3, rel=1e-11)


def test_a_long_chain_of_players_settles():
    n = 200
    wins = np.diag(np.full(n - 1, 3.0), 1) + np.diag(np.ones(n - 1), -1)
    found = bradley_terry(wins, [f"{i:03}" for i in range(n)])
    elo = [found[f"{i:03}"]["elo"] for i in range(n)]
    assert np.diff(elo) == pytest.approx(np.full(n - 1, -400 * math.log10(3)), rel=1e-9)


def test_a_player_without_results_is_not_forgotten_by_batches():
    m = [[0, 3, 0], [1, 0, 0], [0, 0, 0]]
    state = State(bradley_terry, names=["a", "b", "c"]).update(m).update(m)
    with pytest.raises(ValueError, match="against any of c, so their strengths"):
        state.compute()


@pytest.mark.parametrize("call", [win_rate, bradley_terry, aggregate_ratings])
def test_counts_in_a_mapping_are_not_read_by_their_keys(call):
    with pytest.raises(ValueError, match="give a list with an entry for each row"):
        call({"win": 30, "loss": 2})
