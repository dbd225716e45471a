"""Edit distance: published and hand-worked values, its definition, and error rates over a corpus."""

import importlib
import json
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics.edit_distance import (
    character_error_rate,
    character_errors,
    edit_distance,
    word_error_rate,
    word_errors,
)

MODULE = importlib.import_module("minift.metrics.edit_distance")  # in the package its name is the function's
KNOWN = [
    ("rain", "shine", 3),  # NLTK's documentation
    ("kitten", "sitting", 3),
    ("saturday", "sunday", 3),
    ("intention", "execution", 5),  # Jurafsky and Martin, "Speech and Language Processing", section 2.5
    ("ABCDEFG", "", 7),
    ("ab" * 40, "ba" * 40, 2),
    ("a" * 70, "b" * 65, 70),
    ("abcd" * 20, "d" + "abcd" * 20, 1),
    ("\U0001f600é", "\U0001f601é", 1),
]
strings = st.text("abc", max_size=20)


def by_definition(a, b) -> int:
    @cache
    def D(i, j):
        if not i or not j:
            return i + j
        return min(D(i - 1, j) + 1, D(i, j - 1) + 1, D(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return D(len(a), len(b))


def check(module):
    for a, b, expected in KNOWN:
        assert module.edit_distance(a, b) == module.edit_distance(b, a) == expected
        assert module.edit_distance(list(a), tuple(b)) == expected
    for a, b in (("abcabba", "cbabac"), ("aabbaabbab", "babbabaa"), ("abacadaba", "daabacab")):
        assert module.edit_distance(a, b) == by_definition(a, b)
    # 2 words of 6 are missing, and 1 + 1 of the second row is wrong: 4 of 8
    hypotheses, references = ["the cat sat mat", "a b  c"], ["the cat sat on the mat", "a d"]
    assert module.word_error_rate(hypotheses, references) == 4 / 8
    assert module.character_error_rate([" ab c", ""], ["abc\n", "d"]) == 2 / 4
    assert module.word_error_rate(["a b c d"], ["x"]) == 4


def test_known_distances_and_rates():
    check(MODULE)


MUTANTS = [
    ("(M & up) + up", "M & up"),
    ("^ up) | M | down", "^ up) | M"),
    ("more = (down | ~(keeps | up)) << 1 | 1", "more = (down | ~(keeps | up)) << 1"),
    ("less = (up & keeps) << 1", "less = up & keeps"),
    ("(less | ~(keeps | more))", "~(keeps | more)"),
    ("more & keeps & full", "more & full"),
    (" - row[1].bit_count()", ""),
    ("len(a) + row[0]", "len(b) + row[0]"),
    ("row = places(b), (full, 0)", "row = places(a), (full, 0)"),
    ("sum(len(r) for _, r in pairs)", "sum(len(h) for h, _ in pairs)"),
    ("references, str.strip", "references, str"),
    ("references, str.split)", "references, str)"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check, MODULE, old, new)


@given(strings, strings)
def test_the_distance_is_that_of_its_definition(a, b):
    assert edit_distance(a, b) == by_definition(a, b)


@given(strings, strings, strings)
def test_it_is_a_metric(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@given(st.text(max_size=300), st.integers(0, 300), st.characters())
def test_one_more_character_anywhere_is_one_edit(text, at, character):
    assert edit_distance(text, text[:at] + character + text[at:]) == 1


@given(st.lists(st.tuples(st.text("ab ", max_size=9), st.text("ab ", max_size=9)), min_size=2, max_size=6))
def test_errors_of_batches_add(rows):
    rows.append(("a", "b"))  # a reference with words
    hypotheses, references = map(list, zip(*rows, strict=True))
    for rate, errors in ((word_error_rate, word_errors), (character_error_rate, character_errors)):
        parts = errors(hypotheses[:2], references[:2]) + errors(hypotheses[2:], references[2:])
        assert rate(parts, None) == rate(hypotheses, references)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: edit_distance("abc", ["a"]), "a is str and b list; give both strings or both lists"),
        (lambda: word_error_rate(["a"], [" "]), "the references have no words"),
        (lambda: character_error_rate(["a"], [""]), "the references have no characters"),
        (lambda: word_error_rate("a b", "a b"), "hypotheses is one string"),
        (lambda: word_error_rate(["a"], ["a", "b"]), "hypotheses has 1 rows and references 2"),
        (lambda: word_error_rate(["a"], [["a", "b"]]), r"references\[0\] is \['a', 'b'\]; give a string"),
        (lambda: character_error_rate([], []), "hypotheses is empty"),
    ],
)
def test_what_has_no_rate_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_distances_are_those_of_the_reference(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "nltk_examples.json").read_text(encoding="utf-8"))
    (case,) = [case for case in cases if case["id"] == "edit_distance"]
    assert edit_distance(case["a"], case["b"]) == case["expected"]
