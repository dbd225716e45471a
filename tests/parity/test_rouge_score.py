"""ROUGE against the package rouge-score, with and without its stemmer, with lines and several references."""

import pytest

pytest.importorskip("rouge_score")

from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from minift.metrics.rouge import VARIANTS, rouge

pytestmark = pytest.mark.parity

ALL = (*VARIANTS, "rouge3", "rouge9")
SCORERS = {use_stemmer: RougeScorer(ALL, use_stemmer=use_stemmer) for use_stemmer in (False, True)}
# Letters whose lower case holds ASCII (Kelvin, dotted I), letters and digits that look like ASCII, marks,
# joiners and breaks that stand inside and between words.
AWKWARD = [
    *"\u212a\u0130\u0131\u017f\uff41\uff11\u0663\u00b2\u00df\u0301\U0001f600",
    *"\u200b\u00ad\ufeff\u2019\u2014\u2028\u3000\x85\x1c\x00\n'-_.,/",
]

words = st.sampled_from(
    ["the", "The", "cat", "cats", "sat", "ON", "on", "mat", "9", "10", "a1", "x", "running", "runs"]
)
lines = st.lists(st.sampled_from([*"aabbcd", "runs", "run", "running", "\n", ". \n"]), max_size=25).map(
    " ".join
)
texts = st.lists(words, max_size=25).map(" ".join) | lines | st.text(max_size=40)
breaks = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(AWKWARD)), min_size=1, max_size=8)


def put(text: str, pieces) -> str:
    """The text with awkward characters put in at (wrapped) positions."""
    for position, piece in pieces:
        at = position % (len(text) + 1)
        text = text[:at] + piece + text[at:]
    return text


@cases(500)
@given(texts, st.lists(texts, min_size=1, max_size=3), breaks, breaks, st.booleans())
def test_scores_are_those_of_rouge_score_with_and_without_awkward_characters(a, own, in_a, in_b, use_stemmer):
    rows = [(a, own), (put(a, in_a), [put(b, in_b) for b in own])]
    scores = rouge(*zip(*rows, strict=True), use_stemmer, per_row=True, variants=ALL)
    for i, (prediction, references) in enumerate(rows):
        expected = SCORERS[use_stemmer].score_multi(references, prediction)
        for variant in ALL:
            assert scores[variant][i].tolist() == list(expected[variant])


@cases(200)
@given(lines, lines, st.booleans())
def test_lines_score_as_with_rouge_score(prediction, reference, use_stemmer):
    expected = SCORERS[use_stemmer].score(reference, prediction)["rougeLsum"]
    found = rouge([prediction], [reference], use_stemmer, variants="rougeLsum")["rougeLsum"]
    assert found == pytest.approx(tuple(expected), rel=0, abs=1e-15)  # the mean of one row, rounded once more


@pytest.mark.parametrize("variant", ["rouge0", "rouge10", "rougeW", "rouge-L"])
def test_what_rouge_score_refuses_is_refused(variant):
    with pytest.raises(ValueError):
        RougeScorer([variant]).score("a", "a")
    with pytest.raises(ValueError, match="is not one of rouge1 to rouge9"):
        rouge(["a"], ["a"], variants=[variant])
