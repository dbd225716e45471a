"""ROUGE against values worked by hand, its laws, and reference scores where they are at hand."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.metrics.rouge import VARIANTS, lcs_length, rouge

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
        assert mean[variant] == tuple(each[variant].mean(axis=0))


@given(pairs)
def test_a_row_scores_the_same_alone(rows):
    each = rouge(*zip(*rows, strict=True), per_row=True)
    for i, (prediction, reference) in enumerate(rows):
        alone = rouge([prediction], [reference])
        assert all(np.array_equal(each[variant][i], alone[variant]) for variant in VARIANTS)


@pytest.mark.parametrize("predictions, references", [("a", "a"), (["a"], "a"), ("a", ["a"])])
def test_a_text_in_place_of_a_list_is_an_error(predictions, references):
    with pytest.raises(ValueError, match="are lists of texts"):
        rouge(predictions, references)


@pytest.mark.parametrize("predictions, references", [(["a"], []), (["a"], ["a", "b"]), ([], [])])
def test_lists_of_other_lengths_and_no_rows_are_errors_with_the_numbers(predictions, references):
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions and {len(references)} references"):
        rouge(predictions, references)


def test_scores_are_those_of_the_reference_implementations(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "rouge.json").read_text(encoding="utf-8"))
    cases = [case for case in cases if case["type"] in VARIANTS and not case["use_stemmer"]]
    assert cases
    for case in cases:
        P, R, F = rouge([case["prediction"]], [case["target"]])[case["type"]]
        got = {"precision": P, "recall": R, "fmeasure": F}
        assert got == pytest.approx(case["expected"], rel=0, abs=case["tol"]), case["id"]


def test_summaries_score_as_rouge_score_scored_them(shared_data):
    lines = (shared_data / "metric_refs" / "summaries_scored.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    scores = rouge([row["prediction"] for row in rows], [row["target"] for row in rows], per_row=True)
    for variant in VARIANTS:  # written with ten digits
        expected = [row["plain"][variant] for row in rows]
        np.testing.assert_allclose(scores[variant], expected, rtol=0, atol=0.51e-10)
