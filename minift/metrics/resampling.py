"""How far a score may be off, of any metric: draw rows again, or swap two systems' outputs, and score anew.

`rows` is a vector of scores, whose mean is then the score, or with a `metric` a tuple of what the metric
takes, each with an entry for each row: bootstrap((y_true, y_pred), f1). Systems `a` and `b` are given alike.
The same seed gives the same numbers; the seed is numpy's default_rng's.
"""

from dataclasses import dataclass

import numpy as np

from minift.metrics import exact
from minift.metrics.checks import numbers, same_rows, whole

DRAWS = 1 << 22  # row numbers at a time
ROUNDING = 2.0**-40  # of a score: a smaller difference of two is none


def bootstrap(rows, metric=None, samples: int = 1000, seed: int = 0, level: float = 0.95):
    """A score and its percentile bootstrap interval: (score, low, high).

    s_b = metric(n rows drawn from the n with replacement), b = 1 .. samples
    low, high = the (1 - level) / 2 and (1 + level) / 2 quantiles of the s_b

    Without `metric` the score is the mean of `rows`. Fewer than two rows, or a metric that is nan or
    infinite on a sample, is an error.
    Range: that of the metric.
    Use: metrics without a formula for their error: F1, BLEU, a median, a ratio.
    A metric of texts is computed anew on each sample, words and all: 1,000 samples take minutes.
    Lies: with 20 rows it is too narrow; it cannot show values beyond the rows there are (a score of 1 gives
    1 to 1: use `wilson`); rows that belong together must be drawn together.
    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3; scipy.stats.bootstrap
    with method "percentile".

    >>> bootstrap([1, 1, 1, 0, 1, 0, 1, 1], samples=500)
    (0.75, 0.5, 1.0)
    """
    columns = _columns(rows, metric, "rows")
    (drawn,) = _drawn([columns], metric, samples, seed)
    return (_once(metric, columns), *_quantiles(drawn, level))


def paired_bootstrap(a, b, metric=None, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict:
    """The difference of two systems' scores on the same rows when these are drawn anew.

    d = metric(a) - metric(b),   d_b the same on n rows drawn with replacement, for both the same rows
    low, high = quantiles of the d_b,   wins = share of the d_b above 0, those at 0 as halves
    p = (1 + number of b with |d_b| - mean |d_b| >= |d|) / (1 + samples)

    {"difference", "low", "high", "wins", "p"}; the rest as `bootstrap`.
    Range: wins and p 0 to 1; wins is 0.5, and p 1, where the systems are identical.
    Use: two systems' BLEU, ROUGE or F1 on one test set.
    Lies: it is about other rows from the same source, not about another source, seed or training run; and
    p rejects more often than it should on small test sets.
    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation" (wins); Riezler
    and Maxwell 2005, section 3 (p). sacrebleu counts > where they count >=.

    >>> found = paired_bootstrap([1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0])
    >>> found["difference"], found["wins"]
    (0.5, 0.9955)
    """
    a, b = _two(a, b, metric)
    of_a, of_b = _drawn([a, b], metric, samples, seed)
    rounding = ROUNDING * max(np.abs(of_a).max(), np.abs(of_b).max())
    drawn = np.append(of_a - of_b, _once(metric, a) - _once(metric, b))
    drawn[np.abs(drawn) <= rounding] = 0.0
    drawn, d = drawn[:-1], float(drawn[-1])
    low, high = _quantiles(drawn, level)
    far = np.abs(drawn)
    p = (1 + int((far - far.mean() >= abs(d) - rounding).sum())) / (1 + samples)
    wins = (2 * int((drawn > 0).sum()) + int((drawn == 0).sum())) / (2 * samples)
    return {"difference": d, "low": low, "high": high, "wins": wins, "p": p}


def approximate_randomization(a, b, metric=None, trials: int = 10_000, seed: int = 0) -> float:
    """How often two systems differ as much as they do, or more, when it is random which is which: p.

    p = (1 + trials with |metric(a') - metric(b')| >= |metric(a) - metric(b)|) / (1 + trials)
    a', b' are a and b with the entries of each row swapped with chance 1/2

    Arguments as for `paired_bootstrap`.
    Range: 1 / (1 + trials) to 1; a small p speaks against "no difference".
    Use: the test to prefer for two systems on one test set; it assumes nothing of the metric.
    Lies: a large p shows no equality, and a small p with many rows can be a difference of no use.
    Source: Riezler and Maxwell 2005, "On some pitfalls in automatic evaluation and significance testing for
    MT", section 3; Noreen 1989.

    >>> approximate_randomization([1, 1, 1, 1], [0, 0, 0, 0], trials=9999) > 0.1
    True
    """
    a, b = _two(a, b, metric)
    whole(trials, "trials")
    if metric is None:
        d = a[0] - b[0]
        real = abs(float(d.sum())) - len(d) * 2.0**-50 * float(np.abs(d).sum())  # what rounding may take
    else:
        scores = _once(metric, a), _once(metric, b)
        real = abs(scores[0] - scores[1]) - ROUNDING * max(map(abs, scores))
    as_far = 0
    for swaps in _swaps(trials, len(a[0]), seed):
        if metric is None:
            as_far += int((np.abs(d.sum() - 2 * (swaps @ d)) >= real).sum())
        else:
            as_far += sum(_swapped(metric, a, b, swap) >= real for swap in swaps.astype(bool))
    return (1 + as_far) / (1 + trials)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; its text is the sentence to report."""

    text: str
    better: str | None  # the name, or None where no difference is shown
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.text


def compare(
    a,
    b,
    metric=None,
    names: tuple[str, str] = ("a", "b"),
    higher_is_better: bool = True,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Which of two systems is better on the same rows, by how much, or that no difference is shown.

    difference, low, high of `paired_bootstrap`;   no difference is shown when low <= 0 <= high

    Arguments as there; `names` are the systems'. The result prints as one sentence, and has better (a name
    or None), difference, low and high.
    Range: that of the metric's differences.
    Use: the last line of an experiment.
    Lies: "no difference shown" is not "no difference": look how wide the interval is. One comparison in
    twenty shows one where there is none.
    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation".

    >>> print(compare([1, 1, 0, 1, 1, 1], [0, 1, 0, 0, 1, 0], names=("large", "small")))
    large is better than small by 0.5 (95 % interval 0.166667 to 0.833333, 6 rows)
    """
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"names {names!r} must be two different names, of a and of b")
    found = paired_bootstrap(a, b, metric, samples, seed, level)
    d, low, high = (found[key] for key in ("difference", "low", "high"))
    rows = len(_columns(a, metric, "a")[0])
    if low <= 0 <= high:
        better, text = None, f"no difference shown between {names[0]} and {names[1]}: {d:.6g}"
        around = f"{low:.6g} to {high:.6g}"
    else:
        better, other = names if (low > 0) == higher_is_better else names[::-1]
        text = f"{better} is better than {other} by {abs(d):.6g}"
        around = " to ".join(f"{end:.6g}" for end in sorted((abs(low), abs(high))))
    return Comparison(f"{text} ({100 * level:g} % interval {around}, {rows} rows)", better, d, low, high)


def _columns(rows, metric, name: str) -> list:
    """What the metric takes, each an array or a list with an entry for each row."""
    if metric is None:
        columns = [numbers(rows, name)]
    else:
        given = rows if isinstance(rows, tuple) else (rows,)
        columns = [column if isinstance(column, np.ndarray) else list(column) for column in given]
        if not columns:
            raise ValueError(f"{name} is empty; give a tuple of what the metric takes")
        for i, column in enumerate(columns):
            if isinstance(given[i], (str, dict)):
                raise ValueError(f"{name}[{i}] is {given[i]!r:.60}; give a list with an entry for each row")
            same_rows(columns[0], column, (f"{name}[0]", f"{name}[{i}]"))
    if len(columns[0]) < 2:
        raise ValueError(f"{name} has {len(columns[0])} rows; give at least 2, as of one there is no spread")
    return columns


def _two(a, b, metric) -> tuple[list, list]:
    a, b = _columns(a, metric, "a"), _columns(b, metric, "b")
    same_rows(a[0], b[0], ("a", "b"))
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} columns and b {len(b)}; give both what the metric takes")
    return a, b


def _once(metric, columns: list) -> float:
    if metric is None:
        return exact.mean(exact.total(columns[0]), len(columns[0]))
    score = metric(*columns)
    if np.ndim(score) == 0 and hasattr(score, "__float__"):  # BLEU's result has it, too
        score = float(score)
    if not isinstance(score, float) or not np.isfinite(score):
        raise ValueError(
            f"the metric gives {score!r:.60} on a sample of {len(columns[0])} rows; give a function that "
            "returns one finite number, and rows that it is defined on however they are drawn"
        )
    return score


def _draws(samples: int, n: int, seed: int):
    """n row numbers for each sample, some samples at a time; the same numbers however many."""
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS // n)
    for start in range(0, samples, at_once):
        yield rng.integers(0, n, (min(at_once, samples - start), n))


def _swaps(trials: int, n: int, seed: int):
    """n numbers 0.0 or 1.0 for each trial, the bits of whole words, likewise."""
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS // n)
    for start in range(0, trials, at_once):
        words = rng.integers(0, 1 << 64, (min(at_once, trials - start), -(-n // 64)), dtype=np.uint64)
        yield np.unpackbits(words.astype("<u8").view(np.uint8), axis=1)[:, :n].astype(np.float64)


def _drawn(systems: list, metric, samples: int, seed: int) -> np.ndarray:
    """The scores of the systems on the same drawn rows; (systems, samples)."""
    whole(samples, "samples")
    scores = [[] for _ in systems]
    for draws in _draws(samples, len(systems[0][0]), seed):
        for found, columns in zip(scores, systems, strict=True):
            if metric is None:
                first = columns[0][0]  # taken off, so that equal scores have their mean
                found += (first + (columns[0] - first)[draws].mean(axis=1)).tolist()
            else:
                found += [_once(metric, [_take(column, draw) for column in columns]) for draw in draws]
    return np.array(scores)


def _take(column, draw: np.ndarray):
    return column[draw] if isinstance(column, np.ndarray) else [column[i] for i in draw.tolist()]


def _swapped(metric, a: list, b: list, swap: np.ndarray) -> float:
    """How far the systems are apart when they exchange the rows in `swap`."""
    sides = []
    for own, other in ((a, b), (b, a)):
        mixed = []
        for x, y in zip(own, other, strict=True):
            if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
                mixed.append(np.where(swap.reshape(-1, *(1,) * (x.ndim - 1)), y, x))
            else:
                mixed.append([y[i] if s else x[i] for i, s in enumerate(swap.tolist())])
        sides.append(_once(metric, mixed))
    return abs(sides[0] - sides[1])


def _quantiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level {level!r} must be between 0 and 1, as 0.95")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
