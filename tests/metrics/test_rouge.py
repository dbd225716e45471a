"""ROUGE against values worked by hand, its laws, and reference scores where they are at hand."""

import importlib
import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, subsequence
from minift.metrics.rouge import VARIANTS, rouge, rouge_rows
from minift.metrics.subsequence import lcs_length, lcs_places, places
from minift.metrics.totals import Totals

MODULE = importlib.import_module("minift.metrics.rouge")  # its name in the package is the function's

words = st.lists(st.sampled_from("abcd"), max_size=12)
texts = words.map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)

# prediction, reference, {variant: (overlap, n-grams of the prediction, n-grams of the reference)}
WORKED = {
    # Lin 2004, section 3: "police the gunman" is the longest common subsequence, "the gunman" the one pair
    "police kill": (
        "police kill the gunman",
        "police killed the gunman",
        {"rouge1": (3, 4, 4), "rouge2": (1, 3, 3), "rougeL": (3, 4, 4)},
    ),
    # the same words in another order keep only "the gunman" in sequence
    "order": (
        "the gunman kill police",
        "police killed the gunman",
        {"rouge1": (3, 4, 4), "rouge2": (1, 3, 3), "rougeL": (2, 4, 4)},
    ),
    # the reference has one "the", so one of three counts: P = 1/3, R = 1/2, F1 = 2 (1/6) / (5/6) = 2/5
    "clipping": ("the the the", "the cat", {"rouge1": (1, 3, 2), "rouge2": (0, 2, 1), "rougeL": (1, 3, 2)}),
    # words: the cat s 9 lives | the cats 9 lives; common: the, 9, lives; pairs: 9-lives
    "punctuation": (
        "The cat's 9 lives!",
        "the CATS: 9-lives",
        {"rouge1": (3, 5, 4), "rouge2": (1, 4, 3), "rougeL": (3, 5, 4)},
    ),
    # one word has no pairs
    "one word": ("cat", "cat", {"rouge1": (1, 1, 1), "rouge2": (0, 0, 0), "rougeL": (1, 1, 1)}),
}


@pytest.mark.parametrize("prediction, reference, counts", WORKED.values(), ids=WORKED)
def test_scores_are_those_worked_by_hand(prediction, reference, counts):
    scores = rouge([prediction], [reference])
    for variant, (overlap, predicted, referred) in counts.items():
        P, R = overlap / max(1, predicted), overlap / max(1, referred)
        F = 2 * overlap / (predicted + referred) if overlap else 0
        assert scores[variant] == pytest.approx((P, R, F), rel=1e-15)


@given(st.lists(st.sampled_from("abcd"), min_size=2).map(" ".join))
def test_a_text_scores_one_against_itself(text):
    assert rouge([text], [text.upper() + "!"]) == dict.fromkeys(VARIANTS, (1, 1, 1))


@pytest.mark.parametrize("text", ["", "  \n", "?!", "Привет мир", "你好 世界", "é"])
def test_a_text_without_latin_words_scores_zero_against_any(text):
    zero = dict.fromkeys(VARIANTS, (0, 0, 0))
    assert rouge([text], [text]) == rouge([text], ["a cat sat"]) == rouge(["a cat sat"], [text]) == zero


@given(texts, texts)
def test_swapping_prediction_and_reference_swaps_precision_and_recall(a, b):
    there, back = rouge([a], [b]), rouge([b], [a])
    for variant in VARIANTS:
        P, R, F = there[variant]
        assert back[variant] == (R, P, F)


@given(texts, texts)
def test_scores_lie_between_zero_and_one_and_f1_between_precision_and_recall(a, b):
    for P, R, F in rouge([a], [b]).values():
        assert 0 <= min(P, R) <= F + 2**-50
        assert F - 2**-50 <= max(P, R) <= 1


@given(texts, texts)
def test_a_common_subsequence_needs_common_words(a, b):
    scores = rouge([a], [b])
    assert scores["rougeL"][0] <= scores["rouge1"][0]


def lcs_by_definition(a, b) -> int:
    @cache
    def length(i, j):
        if i == len(a) or j == len(b):
            return 0
        return 1 + length(i + 1, j + 1) if a[i] == b[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@given(words, words)
def test_the_longest_common_subsequence_is_that_of_its_definition(a, b):
    assert lcs_length(a, b) == lcs_by_definition(a, b)


@given(pairs)
def test_the_score_of_a_set_is_the_mean_of_its_rows(rows):
    predictions, references = zip(*rows, strict=True)
    mean, each = rouge(predictions, references), rouge(predictions, references, per_row=True)
    for variant in VARIANTS:
        assert each[variant].shape == (len(rows), 3)
        assert mean[variant] == pytest.approx(each[variant].mean(axis=0), rel=1e-15)  # numpy's sum rounds


@given(pairs)
def test_a_row_scores_the_same_alone(rows):
    each = rouge(*zip(*rows, strict=True), per_row=True)
    for i, (prediction, reference) in enumerate(rows):
        alone = rouge([prediction], [reference])
        assert all(np.array_equal(each[variant][i], alone[variant]) for variant in VARIANTS)


# Two sentences swapped, of 2 and 3 words: in sequence stays the longer, line by line all.
SWAPPED = ("a b\nc d e", "c d e\na b")
# Lin 2004, section 3.2: w1 w2 is the LCS with the first line, w1 w3 w5 with the second, their union 4 of 5.
UNION = ("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")


def check_lines_stems_and_references(module):
    f1 = {variant: F for variant, (_, _, F) in module.rouge(*zip(SWAPPED, strict=True)).items()}
    assert (f1["rougeL"], f1["rougeLsum"]) == pytest.approx((0.6, 1), rel=1e-15)
    joined = [[text.replace("\n", " ")] for text in SWAPPED]
    assert module.rouge(*joined)["rougeLsum"] == pytest.approx([0.6] * 3, rel=1e-15)
    assert module.rouge(*zip(UNION, strict=True))["rougeLsum"] == (0.4, 0.8, 2 * 0.4 * 0.8 / (0.4 + 0.8))
    assert module.rouge(["c d\na b"], ["a b c d"])["rougeLsum"] == (1, 1, 1)
    # a line's word in the unions of two lines of the reference counts as often as the prediction has it
    assert module.rouge(["a b"], ["a\na"])["rougeLsum"] == (0.5, 0.5, 0.5)
    assert module.rouge(["running was"], ["run wa"])["rouge1"] == (0, 0, 0)
    assert module.rouge(["running was"], ["run wa"], use_stemmer=True)["rouge1"] == (0.5, 0.5, 0.5)
    # F1 of 1/3, of 1/2 twice: of equal ones the first, with P = 1/3 and R = 1
    several = module.rouge(["a b c"], [["c x y", "a", "a b x y z"]], variants=["rouge1"])
    assert several["rouge1"] == (1 / 3, 1, 0.5)
    better = module.rouge(["a b c"], [["a", "a b c d"]], variants=["rouge1"])
    assert better["rouge1"] == pytest.approx((1, 0.75, 6 / 7), rel=1e-15)
    # each variant chooses by itself: words of the one, pairs of the other
    chosen = module.rouge(["a b c"], [["c b a", "a b"]], variants=["rouge1", "rouge2"])
    assert chosen["rouge1"] == (1, 1, 1) and chosen["rouge2"] == (0.5, 1, 2 / 3)
    assert module.rouge(["a b c d"], ["a b c e"], variants=["rouge3"]) == {"rouge3": (0.5, 0.5, 0.5)}
    assert module.rouge(["a a a", "b"], ["a a", "c"], variants=["rouge1"])["rouge1"] == (1 / 3, 0.5, 0.4)


def test_lines_stems_and_several_references():
    check_lines_stems_and_references(MODULE)


def check_subsequences(module):
    a = "abcabbaacbabc"
    for b in ("", "a", "cba", "bacbba", "xabxcxbx", "aaaaabbbbbccccc", a[::-1], a):
        assert module.lcs_length(a, b) == module.lcs_length(b, a) == lcs_by_definition(a, b)
        found = module.lcs_places(module.places(a), len(a), b)
        assert found == walked(a, b)


MUTANTS = [
    (check_lines_stems_and_references, MODULE, old, new)
    for old, new in (
        ('text.lower().split("\\n")', "[text.lower()]"),
        ("if len(word) > 3", "if len(word) > 2"),
        ("key=lambda s: s[2]", "key=lambda s: s[1]"),
        ("max(of_variant, key", "min(of_variant, key"),
        ("len(prediction) < 2 and len(reference) < 2", "len(reference) < 2"),
        ("union |= lcs", "union = lcs"),
        ("_shared(common, words)", "len(common)"),
        ("left[item] -= 1", "pass"),
        ("len(r) - n + 1)", "len(r))"),
        ("2 * P * R / (P + R)", "P * R / (P + R)"),
    )
] + [
    (check_subsequences, subsequence, old, new)
    for old, new in (
        ("bits.get(word, 0) | bit", "bit"),
        ("V = (V + U) | (V - U)\n    return", "V = (V + U) | V\n    return"),
        ("U = V & M\n            V", "U = M\n            V"),
        ("(V & full).bit_count()", "V.bit_count()"),
        ("M | ~V", "M"),
        ("below = last - 1", "below = last"),
        ("below = (1 << i) - 1", "pass"),
        ("in reversed(rows)", "in rows"),
        ("if M & last", "if last"),
    )
]


@pytest.mark.parametrize("check, module, old, new", MUTANTS)
def test_mutants_die(check, module, old, new):
    assert not survives(check, module, old, new)


def walked(a, b) -> int:
    """One longest common subsequence by its table, from its end: both, else back in b if that keeps more."""
    L = [[lcs_by_definition(a[:i], b[:j]) for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    i, j, bits = len(a), len(b), 0
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            bits |= 1 << i
        elif L[i][j - 1] > L[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return bits


@given(words, words)
def test_the_places_of_a_subsequence_are_those_of_the_walk_through_the_table(a, b):
    found = lcs_places(places(a), len(a), b)
    assert found == walked(a, b) and found.bit_count() == lcs_length(a, b)


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6), st.data())
def test_sums_over_batches_are_those_over_all_rows(rows, data):
    predictions, references = map(list, zip(*rows, strict=True))
    cut = data.draw(st.integers(0, len(rows)))
    parts = [(predictions[part], references[part]) for part in (slice(cut), slice(cut, None))]
    sums = [rouge_rows(*part) for part in parts if part[0]]
    assert rouge(sum(sums[1:], sums[0]), None) == rouge(predictions, references)
    assert isinstance(sums[0], Totals)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: rouge("a", "a"), "predictions is one string, 'a'"),
        (lambda: rouge(["a"], "a"), "references is one string, 'a'"),
        (lambda: rouge(["a"], ["a", "b"]), "1 predictions and 2 references"),
        (lambda: rouge(["a"], []), "1 predictions and 0 references"),
        (lambda: rouge([], []), "predictions is empty"),
        (lambda: rouge(["a", None], ["a", "b"]), r"predictions\[1\] is None"),
        (lambda: rouge(["a"], [["a", 1]]), r"references\[0\] is \['a', 1\]"),
        (lambda: rouge(["a"], [[]]), r"references\[0\] is \[\]"),
        (lambda: rouge(["a"], ["a"], variants=["rouge0"]), "'rouge0' is not one of rouge1 to rouge9"),
        (lambda: rouge(["a"], ["a"], variants=["rougeLSum"]), "'rougeLSum' is not one of"),
        (lambda: rouge(["a"], ["a"], variants=[]), "variants is empty"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_scores_are_those_of_the_reference_implementations(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "rouge.json").read_text(encoding="utf-8"))
    assert len(cases) == 10
    for case in cases:
        scores = rouge([case["prediction"]], [case["target"]], case["use_stemmer"], variants=case["type"])
        P, R, F = scores[case["type"]]
        got = {"precision": P, "recall": R, "fmeasure": F}
        assert got == pytest.approx(case["expected"], rel=0, abs=case["tol"]), case["id"]


@pytest.mark.parametrize("column, use_stemmer", [("plain", False), ("stem", True)])
def test_summaries_score_as_rouge_score_scored_them(shared_data, column, use_stemmer):
    lines = (shared_data / "metric_refs" / "summaries_scored.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    sides = [[row[side] for row in rows] for side in ("prediction", "target")]
    scores = rouge(*sides, use_stemmer, per_row=True)
    for variant in VARIANTS:  # written with ten digits
        expected = [row[column][variant] for row in rows]
        np.testing.assert_allclose(scores[variant], expected, rtol=0, atol=0.51e-10)


def test_references_that_may_be_streams_warn_and_a_list_is_no_flag():
    with pytest.warns(MetricWarning, match="each of 2 rows has 2 references; if these are"):
        rouge(["a", "b"], [["a", "b"], ["b", "a"]])
    with pytest.raises(ValueError, match=r"use_stemmer is \['rouge1'\]; give True or False"):
        rouge(["a"], ["b"], ["rouge1"])
