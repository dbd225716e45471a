"""chrF: published values, its definition counted by hand, laws, and what is refused."""

import json
import math
from collections import Counter
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import State, chrf, sentence_chrf

module = import_module("minift.metrics.chrf")

# sacrebleu's own tests, test_chrf.py, with beta 3 and eps_smoothing
PUBLISHED = [
    ("abcdefg", "hijklmnop", 0.0),
    ("aa", "ab", 8.3333),
    ("a b c", "abc", 50.0),
    (
        " Die    Beziehung zwischen  Obama und Netanjahu ist nicht gerade  freundlich. ",
        "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich.",
        64.1302698,
    ),
]


def check_published(module):
    for hypothesis, reference, score in PUBLISHED:
        found = module.chrf([hypothesis], [reference], beta=3, eps_smoothing=True)
        assert float(found) == found.score == pytest.approx(score, abs=1e-4)  # their four decimals
    assert module.chrf(["a", "b"], ["a", "c"], beta=3).score == 50
    assert module.chrf(["a"], ["a"], beta=3).score == 100


def check_by_hand(module):
    def score(*arguments, **options):
        return module.chrf(*arguments, **options).score

    def f(P, R, beta=2):
        return 100 * (1 + beta**2) * P * R / (beta**2 * P + R)

    # characters: 2 of 3 and of 4; pairs: 1 of 2 and of 3
    assert score(["abx"], ["abcd"], char_order=2) == pytest.approx(
        f((2 / 3 + 1 / 2) / 2, (1 / 2 + 1 / 3) / 2)
    )
    # the reference has no pairs, so neither side has
    assert score(["ab"], ["a"], char_order=2) == pytest.approx(f(1 / 2, 1))
    assert score(["ab", "ab"], ["a", "ab"], char_order=2) == pytest.approx(f((3 / 4 + 1) / 2, 1))
    # words: the mark at the end stands alone, or else the one at the start
    words = {"char_order": 0, "word_order": 1, "beta": 1}
    assert score([",x ."], [", x ."], **words) == 100
    assert score(["(hi)"], [") x"], **words) == 50
    assert score(["(hi) a"], ["( hi a"], **words) == pytest.approx(f(1 / 3, 1 / 3, 1))
    assert score(["a b c"], ["a b d"], char_order=1, word_order=2) == pytest.approx(
        f((2 / 3 + 2 / 3 + 1 / 2) / 3, (2 / 3 + 2 / 3 + 1 / 2) / 3)
    )
    # with whitespace: a, space, b of 3 and of 4
    assert score(["a b"], ["a  b"], char_order=1, whitespace=True) == pytest.approx(f(1, 3 / 4))
    assert score(["a b"], ["a  b"], char_order=1) == 100
    assert score(["AB"], ["ab"], char_order=1, lowercase=True) == 100
    # the second reference is better, and only its counts go into the sum
    assert score(["ab", "c"], [["xyz", "ac"], "d"], char_order=1) == pytest.approx(f(1 / 3, 1 / 3))
    # 1 of 2 and of 1, or 2 of 2 and of 4, have the same F, and the first goes into the sum
    assert score(["ab", "c"], [["a", "abxy"], "c"], char_order=1, beta=1) == pytest.approx(f(2 / 3, 2 / 2, 1))
    line = module.chrf(["a"], [["a", "b"]], word_order=2, eps_smoothing=True).signature
    assert line.startswith("nrefs:2|case:mixed|eff:no|nc:6|nw:2|space:no|version:minift-")
    line = module.chrf(["a", "b"], ["a", ["b", "c"]], lowercase=True, whitespace=True).signature
    assert line.startswith("nrefs:var|case:lc|eff:yes|nc:6|nw:0|space:yes|version:minift-")


def test_published_values():
    check_published(module)


def test_values_by_hand():
    check_by_hand(module)


MUTANTS = [
    (check_published, "/ counts.shape[1]", "/ 5"),
    (check_published, "beta**2 * P + R", "P + beta**2 * R"),
    (check_published, "(1 + beta**2) * P * R /", "beta**2 * P * R /"),
    (check_by_hand, "own * (other > 0), other", "own, other"),
    (check_by_hand, "several(lengths[1::2], order)", "several(lengths[0::2], order)"),
    (check_by_hand, "both = (hypothesis > 0) & (reference > 0)", "both = (hypothesis >= 0)"),
    (check_by_hand, "len(word) > 1 and word[-1] in", "word[-1] in"),
    (check_by_hand, "return word[:-1], word[-1]", "return (word[:-1],)"),
    (check_by_hand, "return word[0], word[1:]", "return (word,)"),
    (check_by_hand, "if not whitespace:", "if whitespace:"),
    (check_by_hand, "pairs[_best(_f(pairs, beta, eps_smoothing), sizes)]", "pairs[:: sizes[0]]"),
    (check_by_hand, "np.searchsorted(largest, first)", "np.searchsorted(largest, first + sizes) - 1"),
    (check_by_hand, "[text.lower() for text in texts]", "texts"),
    (check_by_hand, "if sizes.max() > 1:", "if False:"),
    (check_by_hand, "text // 2, text % 2, order)", "text // 4, text % 2, order)"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, module, old, new)


texts = st.text("abc .猫\U0001f600\n", max_size=14)
rows = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


def by_definition(hypothesis, reference, order):
    """(orders, 3) n-grams of characters of both, and shared."""
    a, b = ("".join(text.split()) for text in (hypothesis, reference))
    for n in range(1, order + 1):
        own, other = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, b))
        yield [own.total() if other else 0, other.total(), (own & other).total()]


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_the_score_is_that_of_its_definition(rows):
    each = [list(by_definition(*row, 4)) for row in rows]
    sums = [[sum(column) for column in zip(*triples, strict=True)] for triples in zip(*each, strict=True)]
    orders = [(k / h, k / r) for h, r, k in sums if h and r]
    P, R = (sum(side) / len(orders) for side in zip(*orders, strict=True)) if orders else (0, 0)
    expected = 500 * P * R / (4 * P + R) if P else 0
    score = chrf(*zip(*rows, strict=True), char_order=4).score
    assert score == pytest.approx(expected, rel=1e-14)  # the same roundings in another order


@given(rows)
def test_of_several_references_a_row_takes_the_one_it_scores_best_with(rows):
    for hypothesis, references in rows:
        scores = [sentence_chrf(hypothesis, reference, word_order=1).score for reference in references]
        assert sentence_chrf(hypothesis, references, word_order=1).score == max(scores)
    best = [max(refs, key=lambda r: sentence_chrf(h, r, word_order=1).score) for h, refs in rows]
    hypotheses, references = zip(*rows, strict=True)
    assert chrf(hypotheses, references, word_order=1).score == chrf(hypotheses, best, word_order=1).score


def test_rows_are_counted_in_blocks(monkeypatch):
    hypotheses, references = ["abc", "b c", "", "cab"] * 20, ["abd", ["x", "c b"], "a", "cab"] * 20
    whole = chrf(hypotheses, references, word_order=2)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert chrf(hypotheses, references, word_order=2) == whole


def test_batches_choose_references_by_the_settings_of_the_state():
    rows = (["aab", "b"], [["ab", "aabxxxx"], "c"])
    for beta in (0, 3):
        state = State(chrf, char_order=1, beta=beta)
        state.update(["aab"], [["ab", "aabxxxx"]]).update(["b"], ["c"])
        assert state.compute() == chrf(*rows, char_order=1, beta=beta)


def test_lone_surrogates_and_empty_texts_are_counted():
    assert chrf(["\ud800a"], ["\ud800a"]).score == 100
    assert chrf(["", " "], ["", "\n"]).score == chrf([""], ["a"]).score == chrf(["a"], [""]).score == 0


def test_the_result_names_its_variant():
    assert str(chrf(["a cat"], ["a cat"])) == "chrF2 = 100.00"
    assert str(sentence_chrf("a cat", "a cat", word_order=2, beta=1)) == "chrF1++ = 100.00"


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: chrf("a", ["a"]), "hypotheses is one string, 'a'; give a list"),
        (lambda: chrf([], []), "hypotheses is empty; give at least one text"),
        (lambda: chrf(["a", "b"], ["a"]), "2 hypotheses and 1 references; give for each row"),
        (lambda: chrf(["a"], [[None]]), r"references\[0\] is \[None\]; give a string, or a list of strings"),
        (lambda: chrf(["a"], ["a"], char_order=-1), "char_order is -1; give a whole number of at least 0"),
        (lambda: chrf(["a"], ["a"], word_order=1.5), "word_order is 1.5; give a whole number of at least 0"),
        (lambda: chrf(["a"], ["a"], char_order=0), "char_order and word_order are both 0"),
        (lambda: chrf(["a"], ["a"], beta=-1), "beta -1 must be a finite number of at least 0"),
        (lambda: chrf(["a"], ["a"], beta=math.nan), "beta nan must be a finite number"),
        (lambda: sentence_chrf(["a"], ["a"]), r"hypotheses\[0\] is \['a'\]; give a string"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_scores_are_those_of_the_reference_implementation(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "chrf.json").read_text(encoding="utf-8"))
    assert len(cases) == 11
    for case in cases:
        score = chrf(case["hypotheses"], case["references"], **case["args"]).score
        assert score == pytest.approx(case["expected"], rel=0, abs=case["tol"]), case["id"]


def test_summaries_score_as_sacrebleu_scored_them(shared_data):
    lines = (shared_data / "metric_refs" / "summaries_scored.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) == 80
    for row in rows:  # written with eight decimals
        score = sentence_chrf(row["prediction"], row["target"]).score
        assert score == pytest.approx(row["chrf"], rel=0, abs=0.51e-8)
