"""METEOR without synonyms: hand-worked values, its laws, and NLTK's examples."""

import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics.meteor import align, meteor, meteor_rows

MODULE = importlib.import_module("minift.metrics.meteor")  # in the package its name is the function's
texts = st.lists(st.sampled_from(["a", "b", "cat", "cats", "Running", "run"]), max_size=8).map(" ".join)


def score(matched, chunks, p, r, alpha=0.9, beta=3.0, gamma=0.5) -> float:
    P, R = matched / p, matched / r
    return P * R / (alpha * P + (1 - alpha) * R) * (1 - gamma * (chunks / matched) ** beta)


def check(module):
    def one(prediction, reference, **options):
        return module.meteor([prediction], [reference], **options)

    same = pytest.approx
    assert one("a b c", "a b c") == same(1 - 0.5 / 27, rel=1e-15)
    assert one("the cat was sat on", "The Cat sat on the mat") == same(score(4, 3, 5, 6), rel=1e-15)
    # cats and cat by their stems; sat in neither
    assert one("cats ran sat", "the cat ran") == same(score(2, 1, 3, 3), rel=1e-15)
    assert one("cats cat", "cat") == same(score(1, 1, 2, 1), rel=1e-15)
    # "CAT" takes "cat" by its form, and leaves "cats" and "cat" to their stem: in reverse
    assert one("cat CAT", "cat cats") == one("cat cats", "cat CAT") == same(score(2, 2, 2, 2), rel=1e-15)
    # exact before stem: "cat" takes "cat", and "cats" the other
    assert sorted(module.align(["cat", "cats"], ["cats", "cat"])) == [(0, 1), (1, 0)]
    # from the end of the prediction, the last free word of the reference: two breaks where none need be
    assert sorted(module.align(list("ab"), list("abxa"))) == [(0, 3), (1, 1)]
    assert sorted(module.align(list("aab"), list("aaxba"))) == [(0, 1), (1, 4), (2, 3)]
    assert one("a b", "a b x a") == same(score(2, 2, 2, 4), rel=1e-15)
    assert one("a c b", "a b") == same(score(2, 2, 3, 2), rel=1e-15)
    assert one("x y", "a b") == one("", "a") == one("a", "") == one("", "") == 0
    options = {"alpha": 0.3, "beta": 2.0, "gamma": 0.25}
    assert one("a b c", "c x a b", **options) == same(score(3, 2, 3, 4, **options), rel=1e-15)
    assert one("a b", ["x", "a b", "a"]) == same(1 - 0.5 / 8, rel=1e-15)
    assert module.meteor(["a b", "x"], ["a b", "y"]) == same((1 - 0.5 / 8) / 2, rel=1e-15)


def test_worked_values():
    check(MODULE)


MUTANTS = [
    ("for form in (str, stem)", "for form in (str,)"),
    ("for form in (str, stem)", "for form in (stem,)"),
    ("places.pop()", "places.pop(0)"),
    ("in reversed(list(p.items()))", "in list(p.items())"),
    ("del p[i], r[j]", "del p[i]"),
    ("(i - 1, j - 1) not in pairs", "(i - 1, j) not in pairs"),
    ("(alpha * P + (1 - alpha) * R)", "(alpha * R + (1 - alpha) * P)"),
    ("1 - gamma * (chunks", "1 - 0.5 * (chunks"),
    (") ** beta", ") ** 3"),
    ("max(_score(", "min(_score("),
    ("prediction.lower().split()", "prediction.split()"),
    ("reference.lower().split()", "reference.split()"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check, MODULE, old, new)


@given(texts, texts)
def test_words_are_aligned_one_to_one_and_none_of_a_stem_is_left_on_both_sides(p, r):
    p, r = p.lower().split(), r.lower().split()
    pairs = align(p, r)
    left, right = ([pair[side] for pair in pairs] for side in (0, 1))
    assert len(set(left)) == len(set(right)) == len(pairs)
    stems = [
        {MODULE.stem(w) for i, w in enumerate(words) if i not in used}
        for words, used in ((p, left), (r, right))
    ]
    assert not stems[0] & stems[1]


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_it_lies_between_0_and_1_and_sums_of_batches_add(rows):
    predictions, references = map(list, zip(*rows, strict=True))
    whole = meteor(predictions, references)
    parts = [meteor_rows([p], [r]) for p, r in zip(predictions, references, strict=True)]
    assert 0 <= whole <= 1 and meteor(sum(parts[1:], parts[0]), None) == whole


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: meteor("a", "a"), "predictions is one string"),
        (lambda: meteor(["a"], ["a", "b"]), "1 predictions and 2 references"),
        (lambda: meteor(["a"], ["a"], alpha=1.1), "alpha 1.1 is not a number from 0 to 1"),
        (lambda: meteor(["a"], ["a"], beta=-1), "beta -1 is not a number from 0 to inf"),
        (lambda: meteor(["a"], ["a"], gamma=float("nan")), "gamma nan is not a number from 0 to 1"),
        (lambda: meteor([["a"]], ["a"]), r"predictions\[0\] is \['a'\]; give a string"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_scores_are_those_of_nltks_examples(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "nltk_examples.json").read_text(encoding="utf-8"))
    cases = [case for case in cases if case["id"].startswith("meteor")]
    assert len(cases) == 3
    for case in cases:
        found = meteor([case["hypothesis"]], [case["reference"]])
        # printed with four digits where no tolerance is given
        assert found == pytest.approx(case["expected"], rel=0, abs=case.get("tol", 5e-5)), case["id"]
