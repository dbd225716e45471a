"""Scores of entities against seqeval 1.2.2, lenient and strict.

Where seqeval only warns that a tag "seems not to be NE tag", or reads the first letter of any word as one, we
refuse: tests/metrics/test_entities.py.
"""

import warnings

import numpy as np
import pytest

pytest.importorskip("seqeval")

import seqeval.metrics
import seqeval.scheme
from cases import CASES, cases
from hypothesis import example, given
from hypothesis import strategies as st

from minift.metrics import MetricWarning, entity_f1, entity_precision, entity_recall, entity_report

pytestmark = pytest.mark.parity

PAIRS = [
    (entity_precision, seqeval.metrics.precision_score),
    (entity_recall, seqeval.metrics.recall_score),
    (entity_f1, seqeval.metrics.f1_score),
]
SCHEMES = {None: "BIESO", "IOB1": "IOB", "IOB2": "IOB", "IOE2": "IOE", "IOBES": "IOBES", "BILOU": "BILOU"}
# Types within types, without a type, with a hyphen within and at the ends, beyond ASCII.
TYPES = ["-A", "-B", "", "-", "-_", "-A-B", "--A", "-A-", "-é\U0001f600", "- a"]
LETTERS = st.text("BIESLUO", min_size=1, max_size=12)


def tags(scheme, kinds) -> list[str]:
    return ["O"] + [letter + kind for letter in SCHEMES[scheme] if letter != "O" for kind in kinds]


@st.composite
def sentences(draw):
    """A scheme, and the tags of sentences twice, often alike; one text is much faster to draw than lists."""
    scheme = draw(st.sampled_from(list(SCHEMES)))
    known = tags(scheme, draw(st.sampled_from([["-A", "-B"], TYPES])))
    letters = [chr(ord("A") + i) for i in range(len(known))]
    text, edits = (draw(st.text([*letters, "\n"], max_size=24)), draw(st.text([*letters, "="], max_size=8)))
    other = "".join(
        a if "\n" in (a, b) or b == "=" else b for a, b in zip(text, edits.ljust(24, "="), strict=False)
    )
    return scheme, *(
        [[known[ord(c) - ord("A")] for c in row] for row in t.split("\n")] for t in (text, other)
    )


def run(function, *arguments, **options):
    """The score and the warnings' kinds, or the kind of error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return function(*arguments, **options), [w.category for w in said]
        except ValueError:
            return ValueError, []


def strict(scheme) -> dict:
    return {} if scheme is None else {"mode": "strict", "scheme": getattr(seqeval.scheme, scheme)}


@CASES
@given(sentences(), st.sampled_from(["micro", "macro", "weighted", None]), st.sampled_from([None, 0, 1]))
@example(("IOB1", [["I-A", "B-A", "B-B", "I-B"]], [["O", "B-A", "I-A", "B-A"]]), None, None)
@example((None, [[], ["O"]], [[], ["O"]]), "micro", None)
@example((None, [["O"]], [["B-A"]]), "weighted", None)
def test_scores_and_reports_are_those_of_seqeval(case, average, zero_division):
    scheme, truth, tagged = case
    given_value = {} if zero_division is None else {"zero_division": zero_division}
    for ours, theirs in PAIRS:
        found, said = run(ours, truth, tagged, average, scheme, **given_value)
        expected, warned = run(theirs, truth, tagged, average=average, **strict(scheme), **given_value)
        # A quotient, a product and a mean of at most a dozen types: a few dozen roundings of 2^-53.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        assert bool(said) == bool(warned), (ours, said, warned)
        assert all(category is MetricWarning for category in said) and len(said) <= 1
    # With 13 digits a score that is a tie, as 0.125 at two digits, does not show which way it was rounded.
    found, said = run(entity_report, truth, tagged, scheme, 13, **given_value)
    expected, warned = run(
        seqeval.metrics.classification_report, truth, tagged, digits=13, **strict(scheme), **given_value
    )
    assert found == expected
    assert bool(said) == bool(warned) and all(category is MetricWarning for category in said)


@pytest.mark.parametrize("digits", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["A", "a-long-name-of-a-type"])
def test_the_report_is_that_of_seqeval_at_any_width(digits, kind):
    truth = [[f"B-{kind}", f"I-{kind}", "O", "B-B"], ["B-B", "O", "B-C"]]
    tagged = [[f"B-{kind}", f"I-{kind}", "O", "O"], ["B-B", "B-B", "O"]]
    expected = seqeval.metrics.classification_report(truth, tagged, digits=digits, zero_division=0)
    assert entity_report(truth, tagged, None, digits, 0) == expected


@cases(200)
@given(st.sampled_from([s for s in SCHEMES if s]), LETTERS)
def test_letters_that_the_scheme_lacks_are_refused_by_both(scheme, letters):
    tags = [[letter if letter == "O" else f"{letter}-A" for letter in letters]]
    found, _ = run(entity_f1, tags, tags, None, scheme, zero_division=0)
    expected, _ = run(seqeval.metrics.f1_score, tags, tags, average=None, zero_division=0, **strict(scheme))
    assert (found is ValueError) == (expected is ValueError) == (not set(letters) <= set(SCHEMES[scheme]))
