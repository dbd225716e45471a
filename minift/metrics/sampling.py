"""Scores of several samples for each problem: whether one of k passes, whether the majority of k is right.

Both are means of fractions of integers, added as such and rounded once.
"""

from collections import Counter
from collections.abc import Hashable
from math import comb, lcm

import numpy as np

from minift.metrics.checks import listed, same_rows, whole
from minift.metrics.totals import Totals


def pass_at_k(n, c, k: int) -> float:
    """The chance that at least one of k samples passes, from n samples of which c passed.

    pass@k = 1 - C(n - c, k) / C(n, k), the share of the k-subsets of the n samples that hold a right one

    `c` is a number or one for each problem, then the score is the mean; `n` one number for all, or one for
    each. k above an n is an error: those samples were never drawn.
    Range: 0 to 1, higher is better; it grows with k.
    Use: code or proofs that a check can accept, so that one right sample in k is enough.
    Lies: 1 - (1 - c/n)^k is too low, and "any of the first k" swings; n near k swings too. It says nothing of
    whether the right one can be told from the others, and the temperature that is best for k = 1 is not for
    k = 100.
    Source: Chen et al. 2021, "Evaluating large language models trained on code", equation 1.

    >>> pass_at_k(n=10, c=[3, 0], k=1)
    0.15
    """
    whole(k, "k")
    (problems,) = problem_counts(n, c, k)
    shares = Counter()
    for (n_i, c_i), count in problems.items():
        if k > n_i:
            raise ValueError(f"k {k} is above n = {n_i} of a problem; draw more samples or take a smaller k")
        shares[comb(n_i, k) - comb(n_i - c_i, k), comb(n_i, k)] += count
    return _mean(shares)


def problem_counts(n, c, k: int = 1) -> Totals:
    """(samples, right ones) -> problems."""
    if isinstance(n, Totals):
        return n
    c = _many(c)
    n = _many(n) if np.iterable(n) else [n] * len(c)
    if not c:
        raise ValueError("c is empty; give at least one problem")
    same_rows(n, c, ("n", "c"))
    for row, (n_i, c_i) in enumerate(zip(n, c, strict=True)):
        whole(n_i, f"n[{row}]", 1)
        whole(c_i, f"c[{row}]", 0)
        if c_i > n_i:
            raise ValueError(f"c[{row}] is {c_i} of n = {n_i} samples; give 0 <= c <= n")
        if n_i < k:
            raise ValueError(f"k {k} is above n[{row}] = {n_i}; draw more samples or take a smaller k")
    return Totals(Counter(zip(n, c, strict=True)))


def maj_at_k(answers, references, k: int | None = None) -> float:
    """The share of problems whose most frequent answer among the first k is right.

    maj@k = mean over problems of [reference is a leader] / leaders

    Leaders are the answers given most often; of several the score is what picking one at random would have
    in the mean. `answers` holds a list of answers for each problem, of which None (no answer found) is
    never a leader; `k` is by default all of them. Answers are equal when `==` says so: bring numbers to one
    form first (extraction.final_number).
    Range: 0 to 1, higher is better.
    Use: reasoning with a short final answer, sampled at a temperature above 0.
    Lies: it hides how thin the majority is; it can be below the accuracy of one sample where most are wrong
    in one way.
    Source: Wang et al. 2023, "Self-consistency improves chain of thought reasoning in language models".

    >>> maj_at_k([["18", "18", "26"], ["3", "4"]], ["18", "4"])
    0.75
    """
    (leaders,) = leader_counts(answers, references, k)
    return _mean(Counter({(min(1, t), max(1, t)): count for t, count in leaders.items()}))


def leader_counts(answers, references, k: int | None = None) -> Totals:
    """Leaders where the reference is one of them, and else 0 -> problems."""
    if isinstance(answers, Totals):
        return answers
    answers, references = listed(answers, "answers"), listed(references, "references")
    same_rows(answers, references, ("answers", "references"))
    if not answers:
        raise ValueError("answers is empty; give at least one problem")
    if k is not None:
        whole(k, "k", 1)
    counts = Counter()
    for row, (given, reference) in enumerate(zip(answers, references, strict=True)):
        given = _many(listed(given, f"answers[{row}]"))
        if len(given) < (k or 1):
            raise ValueError(f"answers[{row}] has {len(given)} answers; give at least {k or 1}")
        if reference is None:
            raise ValueError(f"references[{row}] is None; give the right answer")
        for answer in (*given, reference):
            if answer is not None and isinstance(answer, str) != isinstance(reference, str):
                raise ValueError(
                    f"answers[{row}] has {answer!r} and the reference is {reference!r}, never equal; "
                    "give both as strings, or both as numbers"
                )
            if not isinstance(answer, Hashable):
                raise ValueError(f"answers[{row}] has {answer!r:.60}; give strings or numbers")
        votes = Counter(answer for answer in given[:k] if answer is not None)
        most = max(votes.values(), default=0)
        counts[sum(v == most for v in votes.values()) if most and votes[reference] == most else 0] += 1
    return Totals(counts)


def _mean(shares: Counter) -> float:
    """The mean of fractions: (over, under) -> how many."""
    under = lcm(*(u for _, u in shares))
    return sum(count * over * (under // u) for (over, u), count in shares.items()) / (under * shares.total())


def _many(values) -> list:
    """A list of Python's numbers or strings."""
    if isinstance(values, np.ndarray):
        return np.atleast_1d(values).tolist()
    return list(values) if np.iterable(values) else [values]
