"""BLEU: published values, its definition counted by hand, laws, and what is refused."""

import json
import math
from collections import Counter
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, State, bleu, sentence_bleu

module = import_module("minift.metrics.bleu")

# Papineni et al. 2002, section 2.1, examples 1 and 2.
GUIDE = (
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the "
    "Party",
    "It is the practical guide for the army always to heed the directions of the party",
)
FIRST = "It is a guide to action which ensures that the military always obeys the commands of the party"
SECOND = "It is to insure the troops forever hearing the activity guidebook that party direct"
CAT = ("the cat is on the mat", "there is a cat on the mat")
# sacrebleu's own tests, test_bleu.py: hypotheses, two references each, scores by order
DOG = (
    ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."],
    [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ],
)
ZAHAR = (
    "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;",
    "producţia de zahăr brut se exprimă în zahăr alb;",
)


def check_published(module):
    bleu = module.bleu
    counts = [
        bleu([h], [references], "none", max_ngram_order=2)
        for h, references in ((FIRST, GUIDE), (SECOND, GUIDE), (" ".join(7 * ["the"]), CAT))
    ]  # the paper's modified precisions: 17/18 and 10/17, 8/14 and 1/13, 2/7
    assert [c.counts for c in counts] == [[17, 10], [8, 1], [2, 0]]
    assert [c.totals for c in counts] == [[18, 17], [14, 13], [7, 6]]
    # nltk's bleu_score, documentation: 0.5045666840058485; the length nearest to 18 is 18, so bp is 1
    assert bleu([FIRST], [GUIDE], "none").score == pytest.approx(50.45666840058485, rel=1e-14)
    assert bleu([SECOND], [GUIDE], "none", "floor").score == pytest.approx(3.703131191121491, rel=1e-14)
    dog = bleu(*DOG)  # sacrebleu's tests: 48.530827
    assert dog.score == pytest.approx(48.530827, abs=5e-7) and float(dog) == dog.score
    assert (dog.counts, dog.totals, dog.sys_len, dog.ref_len) == ([14, 7, 5, 3], [17, 14, 11, 8], 17, 18)
    assert dog.bp == pytest.approx(math.exp(-1 / 17), rel=1e-15)
    # sacrebleu's tests, test_sentence_bleu.py, to their 0.002; the cut at orders they lack changes nothing
    for method, score in (("exp", 8.493), ("none", 0.0), ("floor", 4.51688), ("add-k", 14.882)):
        assert bleu([ZAHAR[0]], [ZAHAR[1]], "13a", method).score == pytest.approx(score, abs=0.002)
    assert bleu(["the cat"], ["the cat sat"], effective_order=True).score == pytest.approx(
        100 * math.exp(1 - 3 / 2), rel=1e-14
    )
    assert bleu(["the cat"], ["the cat sat"]).score == 0
    assert bleu(["", ""], ["a", "b"]).score == bleu(["this is a cat"], ["okay thanks"]).score == 0


def check_conventions(module):
    added = module.bleu(["a b c"], ["a b d"], smooth_method="add-k", smooth_value=2)
    # 2/3, (1 + 2)/(2 + 2), (0 + 2)/(1 + 2), (0 + 2)/(0 + 2)
    assert (added.counts, added.totals) == ([2, 3, 2, 2], [3, 4, 3, 2])
    assert added.score == pytest.approx(100 * (2 / 3 * 3 / 4 * 2 / 3) ** (1 / 4), rel=1e-14)
    halved = module.bleu(["a b c x"], ["a b d y"])
    assert halved.precisions == [50.0, 100 / 3, 100 / (2 * 2), 100 / (4 * 1)]
    # of 2 and 4 tokens both are as near to 3, and the shorter counts
    assert module.bleu(["a b c"], [["a b c d", "a b"]]).ref_len == 2
    assert module.bleu(["A b\n"], ["a B"], "char", lowercase=True, max_ngram_order=1).counts == [2]
    # a line's end belongs to no text: before it, a hyphen joins nothing
    assert module.bleu(["a-\n"], ["a-"], max_ngram_order=1).counts == [1]
    line = module.bleu(*DOG, tokenize="intl", smooth_method="floor", effective_order=True).signature
    assert line.startswith("nrefs:2|case:mixed|eff:yes|tok:intl|smooth:floor[0.10]|version:minift-")
    line = module.bleu(["a", "b"], ["a", ["b", "c"]], lowercase=True).signature
    assert line.startswith("nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:minift-")


def test_published_values():
    check_published(module)


def test_conventions():
    check_conventions(module)


MUTANTS = [
    (check_published, "100 * correct[n] / total[n]", "100 * correct[n] / max(total)"),
    (check_published, "else exp(1 - ref_len / sys_len)", "else exp(sys_len / ref_len - 1)"),
    (check_published, "1.0 if sys_len >= ref_len", "1.0 if sys_len > 0"),
    (check_published, "100 * value / total[n]", "value / total[n]"),
    (check_published, "if not any(correct):", "if not all(correct):"),
    (
        check_published,
        "if not all(precisions[:orders]):\n        return 0.0",
        "if not all(precisions):\n        return 1.0",
    ),
    (check_published, "(abs(n - len(hypothesis)), n)", "n"),
    (check_published, "several(own, order)", "several(lengths, order)"),
    (check_published, "[own.sum(), sum(near)]", "[lengths.sum(), sum(near)]"),
    (check_published, "sum(map(log, precisions[:orders])) / orders", "sum(map(log, precisions[:orders]))"),
    (check_conventions, "2**missed * total[n]", "2 * total[n]"),
    (check_conventions, '"add-k" and n:', '"add-k":'),
    (check_conventions, "total[n] += value", "total[n] += 0"),
    (check_conventions, "(abs(n - len(hypothesis)), n)", "(abs(n - len(hypothesis)), -n)"),
    (check_conventions, ").rstrip())", "))"),
    (check_conventions, "text.lower() if lowercase", "text if lowercase"),
    (check_conventions, "Counter(map(len, references))", "Counter({1: len(references)})"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, module, old, new)


texts = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)
rows = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


@given(rows)
def test_the_score_is_that_of_its_definition(rows):
    score = bleu(*zip(*rows, strict=True), smooth_method="none", max_ngram_order=2)
    log_p = 0
    for n in (1, 2):
        matches = total = 0
        for text, references in rows:
            own, *others = [
                Counter(zip(*(t.split()[i:] for i in range(n)), strict=False)) for t in (text, *references)
            ]
            matches += sum(min(k, max(other[gram] for other in others)) for gram, k in own.items())
            total += own.total()
        assert (score.counts[n - 1], score.totals[n - 1]) == (matches, total)
        log_p += (math.log(matches / total) if matches else -math.inf) / 2
    c = sum(len(text.split()) for text, _ in rows)
    r = sum(
        min((abs(len(t.split()) - len(text.split())), len(t.split())) for t in references)[1]
        for text, references in rows
    )
    assert (score.sys_len, score.ref_len) == (c, r)
    bp = min(1, math.exp(1 - r / c)) if c else 0
    assert score.score == pytest.approx(100 * bp * math.exp(log_p), rel=1e-13)  # a log, a mean, an exp


@given(st.lists(texts.filter(lambda text: len(text) > 6), min_size=1, max_size=4))
def test_texts_score_100_against_themselves_and_0_against_texts_of_other_words(texts):
    assert bleu(texts, texts).score == pytest.approx(100, rel=1e-14)
    assert bleu(texts, [text.upper() for text in texts]).score == 0


def test_rows_are_counted_in_blocks(monkeypatch):
    hypotheses, references = DOG[0] * 40, DOG[1] * 40
    whole = bleu(hypotheses, references)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert bleu(hypotheses, references) == whole


def test_batches_of_rows_with_one_and_with_two_references_are_of_var_references():
    state = State(bleu, tokenize="none", max_ngram_order=2)
    state.update(["a b c"], ["a b d"]).update(["b c"], [["b c d", "b"]])
    assert state.compute() == bleu(["a b c", "b c"], ["a b d", ["b c d", "b"]], "none", max_ngram_order=2)
    assert state.compute().signature.startswith("nrefs:var|")


def test_a_sentence_without_effective_order_warns_once_a_call(recwarn):
    assert sentence_bleu("a b c", "a b c").score == pytest.approx(100, rel=1e-14)
    assert not recwarn.list
    with pytest.warns(MetricWarning, match="shorter than max_ngram_order is 0") as seen:
        assert sentence_bleu("a b c", ["a b c"], effective_order=False).score == 0
    assert len(seen) == 1


def test_a_hundred_hypotheses_that_look_tokenized_warn(recwarn):
    bleu(99 * ["a ."], 99 * ["a ."])
    assert not recwarn.list
    with pytest.warns(MetricWarning, match=r"100 hypotheses end in ' \.', as tokens do"):
        bleu(100 * ["a ."], 100 * ["a ."])


def test_the_result_reads_as_sacrebleus():
    assert str(bleu(*DOG)) == (
        "BLEU = 48.53 82.4/50.0/45.5/37.5 (BP = 0.943 ratio = 0.944 hyp_len = 17 ref_len = 18)"
    )


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: bleu("a", ["a"]), "hypotheses is one string, 'a'; give a list"),
        (lambda: bleu(["a"], "a"), "references is one string, 'a'; give a list"),
        (lambda: bleu([], []), "hypotheses is empty; give at least one text"),
        (lambda: bleu(None, None), "hypotheses is None; give a list"),
        (lambda: bleu(["a"], None), "references is None; give a list"),
        (lambda: bleu(["a", 3], ["a", "b"]), r"hypotheses\[1\] is 3; give a string"),
        (lambda: bleu(["a"], [[]]), r"references\[0\] is \[\]; give a string, or a list of strings"),
        (lambda: bleu(["a", "b"], ["a", None]), r"references\[1\] is None; give a string, or a list"),
        (lambda: bleu(["a", "b"], ["a"]), "2 hypotheses and 1 references; give for each row"),
        (lambda: bleu(["a", "b"], [["a", "b"]]), r"streams: give list\(zip\(\*references\)\)"),
        (
            lambda: bleu(["a"], ["a"], tokenize="zh"),
            "tokenize 'zh' is not one of '13a', 'intl', 'char', 'none'",
        ),
        (lambda: bleu(["a"], ["a"], smooth_method="add"), "smooth_method 'add' is not one of 'exp', 'floor'"),
        (
            lambda: bleu(["a"], ["a"], smooth_value=1),
            "smooth_value 1 is for 'floor' and 'add-k'; 'exp' takes",
        ),
        (lambda: bleu(["a"], ["a"], "13a", "floor", math.nan), "smooth_value nan must be a finite number"),
        (
            lambda: bleu(["a"], ["a"], "13a", "add-k", -1),
            "smooth_value -1 must be a finite number of at least 0",
        ),
        (lambda: bleu(["a"], ["a"], max_ngram_order=0), "max_ngram_order is 0; give a whole number"),
        (
            lambda: sentence_bleu(["a"], ["a"], effective_order=True),
            r"hypotheses\[0\] is \['a'\]; give a string",
        ),
        (lambda: sentence_bleu("a", [], effective_order=True), r"references\[0\] is \[\]; give a string"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def fixture_score(case) -> float | list[int]:
    args = case.get("args", {})
    if case["kind"] == "corpus_bleu":
        return bleu(case["hypotheses"], list(zip(*case["reference_streams"], strict=True)), **args).score
    if case["kind"] == "sentence_bleu":
        return sentence_bleu(case["hypothesis"], case["references"], **args).score
    if case["kind"] == "bleu_counts":
        score = bleu(case["hypotheses"], list(zip(*case["reference_streams"], strict=True)), **args)
        return [*score.counts, *score.totals]
    references = [[" ".join(tokens) for tokens in case["reference_tokens"]]]
    method = "floor" if "epsilon" in case.get("smoothing", "") else "none"
    score = bleu([" ".join(case["hypothesis_tokens"])], references, "none", method)
    if case["kind"] == "token_bleu_fraction":
        return score.score / 100
    return [score.counts[case["n"] - 1], score.totals[case["n"] - 1]]


def test_scores_are_those_of_the_reference_implementations(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "bleu.json").read_text(encoding="utf-8"))
    assert len(cases) == 24
    for case in cases:
        if case["kind"] == "modified_precision":
            expected = [case["expected_numerator"], case["expected_denominator"]]
        elif case["kind"] == "bleu_counts":
            expected = [*case["expected"]["correct"], *case["expected"]["total"]]
        else:
            expected = case["expected"]
        assert fixture_score(case) == pytest.approx(expected, rel=0, abs=case.get("tol", 0)), case["id"]


def test_summaries_score_as_sacrebleu_scored_them(shared_data):
    lines = (shared_data / "metric_refs" / "summaries_scored.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) == 80
    for row in rows:  # written with eight decimals
        score = sentence_bleu(row["prediction"], row["target"], effective_order=True).score
        assert score == pytest.approx(row["bleu"], rel=0, abs=0.51e-8)
