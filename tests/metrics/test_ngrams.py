"""N-grams as sorted numbers: the counts are those of their definition, however large the numbers grow."""

from collections import Counter
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

module = import_module("minift.metrics.ngrams")

rows = st.lists(st.lists(st.text("abc", max_size=9), min_size=2, max_size=4), min_size=1, max_size=5)


def by_definition(rows, n):
    """Clipped n-grams of the first text of each row, from counters."""
    for row in rows:
        own, *others = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in row]
        most = Counter()
        for other in others:
            most |= other
        yield (own & most).total()


def counted(module, rows, order):
    texts = [text for row in rows for text in row]
    row = np.repeat(np.arange(len(rows)), list(map(len, rows)))
    side = np.concatenate([np.arange(len(row)) for row in rows])
    ids, lengths = module.numbered(list("".join(texts))), np.array(list(map(len, texts)))
    return module.clipped(ids, lengths, row, side, order).tolist()


def check_counts(module):
    for rows in (
        [["abcabc", "abc", "bcabca"], ["aaa", "aa"], ["", "a"]],
        [["abcd" * 5, "dcba" * 5, "cdab", "abcd"], ["abab", "ba"]],
    ):
        for n, counts in enumerate(counted(module, rows, 7), start=1):
            assert counts == list(by_definition(rows, n))
    texts = [["ab", "c"], ["abcd"], [], ["a" * 40, "b"], ["c"]]
    assert list(module.blocks(texts, 7)) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5)]
    assert module.several(np.array([0, 2, 5]), 3).tolist() == [[0, 2, 5], [0, 1, 4], [0, 0, 3]]


@given(rows, st.sampled_from([62, 12]))
def test_matches_are_those_of_counters_also_where_ranks_stand_for_numbers(rows, bits):
    old, module.BITS = module.BITS, bits
    try:
        for n, counts in enumerate(counted(module, rows, 5), start=1):
            assert counts == list(by_definition(rows, n))
    finally:
        module.BITS = old


def test_numbers_of_ten_thousand_letters_do_not_overflow():
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 10_000)))
    rows = [[alphabet, alphabet[::-1]], [alphabet, alphabet]]
    *_, last = counted(module, rows, 6)
    assert last == [0, 10_000 - 5]


MUTANTS = [
    ("n * rows + row[text]", "row[text]"),
    ("bound = max(bounds)", "bound = min(bounds)"),
    ("values[1:] != values[:-1]", "values[1:] > values[:-1] + 1"),
    ("gram[:-1] * size + ids[n - 1 :]", "gram[:-1] + ids[n - 1 :]"),
    ("gram[:-1] * size + ids[n - 1 :]", "gram[:-1] * size"),
    ("np.unique(gram, return_inverse=True)[1]", "gram // 2"),
    ("text[: len(gram)] == text[n - 1 :]", "text[: len(gram)] >= 0"),
    ("(line * bound + np.concatenate(grams)) * sides", "np.concatenate(grams) * sides"),
    ("np.add.reduceat(np.where(side == 0, count, 0), first)", "np.add.reduceat(count, first)"),
    (
        "np.maximum.reduceat(np.where(side == 0, 0, count), first)",
        "np.add.reduceat(count * (side > 0), first)",
    ),
    ("np.minimum(own, most)", "own * (most > 0)"),
    ("np.maximum(lengths - np.arange(order)", "np.maximum(lengths - 1 - np.arange(order)"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_all, module, old, new)


def check_all(module):
    check_counts(module)
    huge = [["".join(map(chr, range(0x4E00, 0x4E00 + 3000))), "x", "x"], ["abcdefg", "abcdefg"]]
    for n, counts in enumerate(counted(module, huge, 7), start=1):
        assert counts == list(by_definition(huge, n))
