"""What judges say of outputs: ratings on a scale, wins of one system over another, strengths from duels."""

from collections import Counter
from math import log10

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import choice, listed
from minift.metrics.totals import Totals
from minift.metrics.uncertainty import wilson

OUTCOMES = {"win": (1, 0, 0), "tie": (0, 1, 0), "loss": (0, 0, 1)}  # wins, ties, losses
LIMIT = 200  # rounds
STRIDE = 4.0  # largest change of a logarithm in a round
SETTLED = 1e-9  # change of a logarithm; the error after it is about its square


def aggregate_ratings(ratings, scale: tuple[float, float] = (1, 5)) -> dict:
    """The mean, the median and the majority of the ratings of each item, and of all ratings.

    mean = sum of ratings / ratings,   median = the middle rating, or half-way between the middle two
    majority = every rating that is given most often, so that a tie shows as two or more

    `ratings` holds for each item a list of its ratings, of any length from 1; None is a missing rating.
    "items" has the three for each item, "overall" those of all ratings with their number. A rating outside
    `scale` (lowest, highest) is an error.
    Range: that of the scale.
    Use: human or model judges who rate outputs one by one.
    Lies: a mean of 3 may be all threes or half ones and half fives: look at the majority; raters who never
    use the ends shrink every difference.
    Source: definitions; Likert 1932 for such scales.

    >>> aggregate_ratings([[4, 5, 5], [2, 3]])["overall"]
    {'mean': 3.8, 'median': 4, 'majority': [5], 'ratings': 5}
    """
    low, high = scale
    if not low < high:
        raise ValueError(f"scale {scale!r} must be (lowest, highest), the lowest below the highest")
    items, every = [], []
    for row, given in enumerate(listed(ratings, "ratings")):
        own = []
        for place, rating in enumerate(listed(given, f"ratings[{row}]")):
            if rating is None:
                continue
            number = isinstance(rating, (int, float, np.number)) and not isinstance(rating, bool)
            if not number or not low <= rating <= high:
                raise ValueError(f"ratings[{row}][{place}] is {rating!r}; give a number from {low} to {high}")
            own.append(rating.item() if isinstance(rating, np.number) else rating)
        if not own:
            raise ValueError(f"ratings[{row}] has no rating; give each item at least one, or leave it out")
        items.append(_middle(own))
        every += own
    if not items:
        raise ValueError("ratings is empty; give at least one item")
    return {"items": items, "overall": _middle(every) | {"ratings": len(every)}}


def _middle(ratings: list) -> dict:
    ordered, n = sorted(ratings), len(ratings)
    a, b = ordered[(n - 1) // 2], ordered[n // 2]
    counts = Counter(ordered)
    most = max(counts.values())
    return {
        "mean": exact.mean(exact.total(ratings), n),
        "median": a if a == b else (a + b) / 2,
        "majority": [rating for rating, count in counts.items() if count == most],
    }


def win_rate(outcomes) -> dict:
    """The share of comparisons that are won, a tie as half a win, with its 95 % interval.

    win_rate = (wins + ties / 2) / comparisons,   low and high: Wilson's interval of that share

    `outcomes` holds "win", "tie" or "loss" for each comparison, or 1, 0.5 or 0.
    Range: 0 to 1; 0.5 is no preference.
    Use: a judge who saw two answers to each prompt.
    Lies: judges favour the first and the longer answer, so ask both ways round; a rate against a weak
    opponent says little. With ties the interval is wider than it had to be: outcomes of 0, 1/2 and 1 vary at
    most as wins and losses of the same mean do.
    Source: Wilson 1927 for the interval; ties as halves as in AlpacaEval and MT-Bench.

    >>> win_rate(["win", "win", "tie", "loss"])["win_rate"]
    0.625
    """
    wins, ties, losses = count = outcome_counts(outcomes)
    n = sum(count)
    low, high = wilson(wins + ties / 2, n)
    rate = (2 * wins + ties) / (2 * n)
    return {"win_rate": rate, "low": low, "high": high, "wins": wins, "ties": ties, "losses": losses}


def outcome_counts(outcomes) -> Totals:
    """Wins, ties and losses."""
    if isinstance(outcomes, Totals):
        return outcomes
    counts = Counter(
        _outcome(outcome, f"outcomes[{row}]") for row, outcome in enumerate(listed(outcomes, "outcomes"))
    )
    if not counts:
        raise ValueError("outcomes is empty; give at least one comparison")
    return Totals(counts["win"], counts["tie"], counts["loss"])


def _outcome(value, name: str) -> str:
    if isinstance(value, str):
        choice(value, OUTCOMES, name)
        return value
    names = {1.0: "win", 0.5: "tie", 0.0: "loss"}
    if isinstance(value, (int, float, np.number, np.bool_)) and float(value) in names:
        return names[float(value)]
    raise ValueError(f"{name} is {value!r}; give 'win', 'tie' or 'loss', or 1, 0.5 or 0")


def bradley_terry(comparisons, names=None) -> dict:
    """Strengths of players from who beat whom, with no need that all have met.

    P(i beats j) = p_i / (p_i + p_j),   a tie counts as half a win for each
    until p makes everyone's expected wins the real ones:  p_i <- W_i / sum over j of n_ij / (p_i + p_j)
    elo_i = 1000 + 400 log10(p_i / geometric mean of p)

    `comparisons` holds (a, b, outcome for a), the outcome as in `win_rate`; or, with `names`, it is a matrix
    of wins of the row over the column, with halves for ties. {name: {"strength": p, sum 1, "elo": ...}},
    strongest first. Where a group has never won or tied against the rest there is no finite answer: an
    error that names the group.
    Range: strengths 0 to 1; a difference of 400 Elo is odds of 10 to 1.
    Use: a ranking of many systems from pairwise judgements.
    Lies: it assumes that one number orders all: with stone, paper and scissors all come out equal; few
    comparisons give far too definite numbers, so `bootstrap` them.
    Source: Bradley and Terry 1952; Zermelo 1929; Hunter 2004, "MM algorithms for generalized Bradley-Terry
    models", section 2 (the iteration, and when there is an answer).

    >>> duels = [("ann", "bob", "win")] * 3 + [("ann", "bob", "loss")]
    >>> bradley_terry(duels)["ann"]
    {'strength': 0.75, 'elo': 1095.4242509439325}
    """
    (halves,) = duel_counts(comparisons, names)
    names = sorted({name for pair in halves for name in pair})
    place = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for (winner, loser), count in halves.items():
        wins[place[winner], place[loser]] = count / 2 if winner != loser else 0
    _all_connected(wins > 0, names)
    p = _strengths(wins)
    middle = float(np.log10(p).mean())
    found = {
        name: {"strength": float(p_i), "elo": 1000 + 400 * (log10(p_i) - middle)}
        for name, p_i in zip(names, p, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["strength"]))


def duel_counts(comparisons, names=None) -> Totals:
    """(winner, loser) -> twice the wins, so that ties count 1 for each side; (name, name) took part."""
    if isinstance(comparisons, Totals):
        return comparisons
    if names is not None:
        return Totals(_from_matrix(comparisons, list(names)))
    halves = Counter()
    for row, duel in enumerate(listed(comparisons, "comparisons")):
        if isinstance(duel, str) or not np.iterable(duel) or len(duel) != 3:
            raise ValueError(f"comparisons[{row}] is {duel!r}; give (a, b, outcome for a)")
        a, b, outcome = duel
        if not isinstance(a, str) or not isinstance(b, str) or a == b:
            raise ValueError(f"comparisons[{row}] is between {a!r} and {b!r}; give two different names")
        won, tied, lost = OUTCOMES[_outcome(outcome, f"comparisons[{row}][2]")]
        halves.update({(a, b): 2 * won + tied, (b, a): 2 * lost + tied, (a, a): 1, (b, b): 1})
    if not halves:
        raise ValueError("comparisons is empty; give at least one")
    return Totals(halves)


def _from_matrix(wins, names: list) -> Counter:
    wins = np.asarray(wins, dtype=np.float64)
    if wins.shape != (len(names), len(names)) or len(set(names)) < max(2, len(names)):
        raise ValueError(
            f"the matrix of wins has shape {wins.shape} for names {names}; give a line and a column for each "
            "of at least two different names"
        )
    wrong = ~(np.isfinite(wins) & (wins >= 0) & (2 * wins % 1 == 0)) | (
        np.eye(len(names), dtype=bool) & (wins != 0)
    )
    if wrong.any():
        i, j = map(int, np.argwhere(wrong)[0])
        raise ValueError(
            f"wins of {names[i]!r} over {names[j]!r} are {wins[i, j]}; give numbers of at least 0, with "
            "halves for ties, and 0 on the diagonal"
        )
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    return Counter({(names[i], names[j]): int(2 * wins[i, j]) for i, j in pairs} | {(n, n): 1 for n in names})


def _all_connected(beat: np.ndarray, names: list[str]) -> None:
    """Whether from everyone a chain of wins leads to everyone else."""
    for edges, below in ((beat, True), (beat.T, False)):
        reached = np.zeros(len(names), bool)
        new = reached.copy()
        new[0] = True
        while new.any():
            reached |= new
            new = edges[new].any(axis=0) & ~reached
        if not reached.all():
            sides = [[name for name, r in zip(names, reached, strict=True) if r == side] for side in (1, 0)]
            losers, others = sides if below else sides[::-1]
            raise ValueError(
                f"none of {', '.join(losers)} has won or tied against any of {', '.join(others)}, so their "
                "strengths have no finite ratio; compare them more, or rank them apart"
            )


def _strengths(wins: np.ndarray) -> np.ndarray:
    """Strengths that sum to 1, by Newton's method on their logarithms, in which the likelihood is concave."""
    met, won = wins + wins.T, wins.sum(axis=1)  # (players, players), (players,)
    x = np.zeros(len(won))

    def likelihood(x):
        return -(wins * np.logaddexp(0, x - x[:, None])).sum()

    for _ in range(LIMIT):
        beats = 1 / (1 + np.exp(x - x[:, None]))  # (players, players)
        weight = met * beats * beats.T
        # Only differences of x count: the ones keep its mean, and what is due sums to 0.
        step = np.linalg.solve(np.diag(weight.sum(axis=1)) - weight + 1, won - (met * beats).sum(axis=1))
        step *= min(1, STRIDE / np.abs(step).max(initial=STRIDE))
        now = likelihood(x)
        while likelihood(x + step) < now - abs(now) * 2**-40:
            step /= 2
        x = x + step
        if np.abs(step).max() < SETTLED:
            p = np.exp(x - x.max())
            return p / p.sum()
    raise ValueError(
        f"the strengths have not settled after {LIMIT} rounds; some players hang on the others by a few wins "
        "among very many: compare them more, or rank them apart"
    )
