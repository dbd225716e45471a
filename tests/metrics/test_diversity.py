"""Diversity of texts: values by hand, definitions, and what is refused."""

import math
from collections import Counter
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, State, bleu, distinct_n, self_bleu, sentence_bleu

module = import_module("minift.metrics.diversity")

texts = st.lists(st.text("abc .", max_size=12), min_size=2, max_size=6)


def check_by_hand(module):
    # the cat, cat sat, the cat, cat ran: 3 of 4
    assert module.distinct_n(["the cat sat", "the  cat\nran"]) == 3 / 4
    assert module.distinct_n(["the cat sat", "the  cat\nran"], n=1) == 4 / 6
    assert module.distinct_n(["a a a a", "A"], n=3) == 1 / 2
    # unigrams only: a b of "a b b" stand in "a b" or in "a b b b", of which "b b" as often; and so on
    score = module.self_bleu(["a b b", "a b", "c"], max_ngram_order=1)
    # 2/3 against "a b"; 2/2 against "a b b", where "c" is as near in length and shorter; 0
    assert score == pytest.approx((100 * 2 / 3 + 100 + 0) / 3, rel=1e-14)
    # of "x x" and "x x x", and "x": 2 of 2 elsewhere; 2 of 3; 1 of 1
    score = module.self_bleu(["x x", "x x x", "x"], max_ngram_order=1)
    assert score == pytest.approx((100 + 100 * 2 / 3 + 100 * math.exp(1 - 2)) / 3, rel=1e-14)
    # of 4, 5 and 1 words: 4 is nearer to 5
    score = module.self_bleu(["z z z z", "z z z z z", "z"], max_ngram_order=1)
    assert score == pytest.approx((100 * math.exp(1 - 5 / 4) + 80 + 100 * math.exp(1 - 4)) / 3, rel=1e-14)
    # two texts hold the largest count, so each finds it elsewhere
    assert module.self_bleu(["x x", "x x", "y y"], max_ngram_order=1) == pytest.approx(200 / 3, rel=1e-14)


def test_values_by_hand():
    check_by_hand(module)


def check_definition(module):
    """A fixed case in which every branch counts."""
    texts = ["a b c a b", "a b c", "b c a b c a", "a b c", "c c c c", "", "a"]
    options = {"tokenize": "none", "smooth_method": "floor", "max_ngram_order": 3}
    each = [
        sentence_bleu(text, texts[:i] + texts[i + 1 :], effective_order=True, **options).score
        for i, text in enumerate(texts)
    ]
    assert module.self_bleu(texts, **options) == pytest.approx(sum(each) / 7, rel=1e-14)


MUTANTS = [
    (check_by_hand, "len(counts) / counts.total()", "len(counts) / (counts.total() + 1)"),
    (check_by_hand, "(words[i:] for i in range(n))", "(words[i:] for i in range(2))"),
    (check_by_hand, "& (holders == 1)", ""),
    (check_by_hand, "second, most)", "0, most)"),
    (check_by_hand, "second, most)", "most, most)"),
    (check_by_hand, "np.minimum(count, elsewhere)", "elsewhere"),
    (check_by_hand, "if times[length] > 1:", "if times[length] > 0:"),
    (check_by_hand, "(abs(n - length), n)", "n"),
    (check_by_hand, "(abs(n - length), n)", "(abs(n - length), -n)"),
    (check_definition, "several(lengths, max_ngram_order)", "several(lengths + 1, max_ngram_order)"),
    (check_definition, "mean(total(scores), len(scores))", "max(scores)"),
    (check_definition, "known[max(at - 1, 0) : at] +", ""),
    (check_definition, "count < most", "count <= most"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, module, old, new)


@given(texts, st.sampled_from(["13a", "char"]), st.sampled_from(["exp", "none", "add-k"]), st.integers(1, 5))
def test_self_bleu_is_the_mean_of_each_text_against_all_others(texts, tokenize, method, order):
    options = {"tokenize": tokenize, "smooth_method": method, "max_ngram_order": order}
    for effective_order in (True, False):
        options["effective_order"] = effective_order
        each = [bleu([text], [texts[:i] + texts[i + 1 :]], **options).score for i, text in enumerate(texts)]
        assert self_bleu(texts, **options) == pytest.approx(sum(each) / len(each), rel=1e-14)  # another order


@given(texts, st.integers(1, 3))
def test_distinct_n_is_that_of_its_definition_and_over_batches_the_same(texts, n):
    grams = [tuple(t.split()[i : i + n]) for t in texts for i in range(len(t.split()) - n + 1)]
    if not grams:
        return
    assert distinct_n(texts, n) == len(set(grams)) / len(grams)
    state = State(distinct_n, n=n)
    for text in texts:
        state.update([text])
    assert state.compute() == distinct_n(texts, n)
    assert state.statistics == (Counter(grams),)


@given(texts)
def test_the_order_of_texts_changes_nothing_and_copies_raise_self_bleu(texts):
    assert self_bleu(texts[::-1]) == self_bleu(texts)
    assert self_bleu(texts + texts) >= self_bleu(texts) - 1e-12  # the rounding of an exp of a mean of logs


def test_texts_without_n_words_score_zero_with_a_warning():
    with pytest.warns(MetricWarning, match="no text has 2 words, and distinct_n is taken as 0"):
        assert distinct_n(["a", "", "b"]) == 0


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: distinct_n("a b"), "texts is one string, 'a b'; give a list"),
        (lambda: distinct_n([]), "texts is empty; give at least one text"),
        (lambda: distinct_n(["a b", 3]), r"texts\[1\] is 3; give a string"),
        (lambda: distinct_n(["a b"], n=0), "n is 0; give a whole number of at least 1"),
        (lambda: distinct_n(["a b"], n=2.0), "n is 2.0; give a whole number of at least 1"),
        (lambda: self_bleu(["a b"]), "one text has nothing to compare it with; give at least two texts"),
        (lambda: self_bleu("a b"), "texts is one string, 'a b'; give a list"),
        (lambda: self_bleu(["a", "b"], tokenize="zh"), "tokenize 'zh' is not one of '13a'"),
        (lambda: self_bleu(["a", "b"], smooth_value=1), "smooth_value 1 is for 'floor' and 'add-k'"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
