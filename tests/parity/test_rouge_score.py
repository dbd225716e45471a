"""ROUGE against the package rouge-score, without its stemmer."""

import pytest

pytest.importorskip("rouge_score")

from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from minift.metrics.rouge import VARIANTS, rouge

pytestmark = pytest.mark.parity

SCORER = RougeScorer(VARIANTS, use_stemmer=False)
# Letters whose lower case holds ASCII (Kelvin, dotted I), letters and digits that look like ASCII, marks,
# joiners and breaks that stand inside and between words.
AWKWARD = [
    *"\u212a\u0130\u0131\u017f\uff41\uff11\u0663\u00b2\u00df\u0301\U0001f600",
    *"\u200b\u00ad\ufeff\u2019\u2014\u2028\u3000\x85\x1c\x00\n'-_.,/",
]

words = st.sampled_from(["the", "The", "cat", "cats", "sat", "ON", "on", "mat", "9", "10", "a1", "x"])
texts = st.lists(words, max_size=25).map(" ".join) | st.text(max_size=40)
breaks = st.lists(st.tuples(st.integers(0, 200), st.sampled_from(AWKWARD)), min_size=1, max_size=8)


def put(text: str, pieces) -> str:
    """The text with awkward characters put in at (wrapped) positions."""
    for position, piece in pieces:
        at = position % (len(text) + 1)
        text = text[:at] + piece + text[at:]
    return text


@settings(max_examples=1500)
@given(texts, texts, breaks, breaks)
def test_scores_are_those_of_rouge_score_with_and_without_awkward_characters(a, b, in_a, in_b):
    rows = [(a, b), (put(a, in_a), put(b, in_b))]
    scores = rouge(*zip(*rows, strict=True), per_row=True)
    for i, (prediction, reference) in enumerate(rows):
        expected = SCORER.score(reference, prediction)
        for variant in VARIANTS:
            assert scores[variant][i].tolist() == pytest.approx(list(expected[variant]), rel=0, abs=1e-12)
