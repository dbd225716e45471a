"""TER against sacrebleu: search, tokens, several references, and its signature's fields."""

import pytest

pytest.importorskip("sacrebleu")

from cases import CASES, cases
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.lib_ter import translation_edit_rate
from sacrebleu.metrics.ter import TER

from minift.metrics.shifts import edits
from minift.metrics.ter import ter, words

pytestmark = pytest.mark.parity

AWKWARD = [
    *"ab12 .,-'s\n&;:!?\"()[]{}|~`_^%/@#$*+<>\\=\r\t\x85\u2028\u3000\u00a0\U0001f600\u0130\u00df\u0301",
    *"\u4e2d\u6587\u3072\u3089\u30ab\u30bf\u3002\u3001\uff0e\uff01\u300c\u30fb\u3250\u4dc0\u31c5\u2e85\ufe35\uf905",
    *("&quot;", "&amp;", "&lt;", "'s ", "\n-", "&amp;lt;", "word "),
]
awkward = st.lists(st.sampled_from(AWKWARD), max_size=14).map("".join) | st.text(max_size=15)
some = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12)


@CASES
@given(awkward, st.lists(awkward, min_size=1, max_size=2), st.tuples(*4 * [st.booleans()]))
def test_scores_of_awkward_texts_are_those_of_sacrebleu(hypothesis, references, options):
    metric = TER(*options)
    expected = metric.sentence_score(hypothesis, references)
    found = ter([hypothesis], [references], *options)
    assert (found.score, found.num_edits, found.ref_length) == (
        *(expected.score, expected.num_edits, expected.ref_length),
    )
    fields = str(metric.get_signature()).rsplit("|", 1)[0]
    assert found.signature.rsplit("|", 1)[0] == fields
    assert words(hypothesis, *options) == metric._preprocess_segment(hypothesis).split()


@st.composite
def moved(draw, words=some):
    """Words, and the same with blocks moved and words replaced."""
    h = draw(words)
    r = list(h)
    for _ in range(draw(st.integers(0, 3))):
        start, end, to = (draw(st.integers(0, len(r))) for _ in range(3))
        rest = r[: min(start, end)] + r[max(start, end) :]
        r = rest[:to] + r[min(start, end) : max(start, end)] + rest[to:]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(r)))
        r = r[:at] + draw(st.sampled_from([[], ["x"], ["a", "y"]])) + r[at + draw(st.integers(0, 2)) :]
    return h, r


@CASES
@given(moved() | st.tuples(some, some))
def test_edits_are_those_of_sacrebleu(pair):
    h, r = pair
    assert edits(h, r) == translation_edit_rate(h, r)[0]


long = st.builds(
    lambda names, size, step: [str(i * step % names) for i in range(size)],
    st.sampled_from([3, 7, 40, 97]), st.integers(0, 75), st.integers(1, 30),
)  # fmt: skip


@cases(30)  # sacrebleu takes up to a second for one
@given(moved(long) | st.tuples(long, long) | st.tuples(some, long) | st.tuples(long, some))
def test_edits_of_long_texts_are_those_of_sacrebleu_with_its_beam_and_its_limits(pair):
    h, r = pair
    assert edits(h, r) == translation_edit_rate(h, r)[0]


@cases(30)
@given(st.lists(st.tuples(awkward, awkward, awkward), min_size=1, max_size=5))
def test_a_corpus_scores_as_with_sacrebleu(rows):
    hypotheses, *streams = map(list, zip(*rows, strict=True))
    expected = TER().corpus_score(hypotheses, streams)
    found = ter(hypotheses, list(zip(*streams, strict=True)))
    assert found.num_edits == expected.num_edits
    assert found.score == pytest.approx(expected.score, rel=1e-12)  # its sum of mean lengths rounds
