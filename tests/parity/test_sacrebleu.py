"""BLEU, chrF and the tokenizers against sacrebleu: the same numbers, texts, warnings and refusals."""

import logging
import unicodedata

import pytest

pytest.importorskip("sacrebleu")

import regex
import sacrebleu
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.bleu import _get_tokenizer

from minift.metrics import MetricWarning, bleu, chrf, sentence_bleu, sentence_chrf
from minift.metrics.signature import VERSION
from minift.metrics.tokenizers import TOKENIZERS

pytestmark = pytest.mark.parity

SCALE = 100 * 1e-12  # scores are of 0 to 100


def known(character: str) -> bool:
    """Whether Python's Unicode tables say the same of a character as those of regex, which may be newer."""
    kind = unicodedata.category(character)[0]
    return all((kind == name) == bool(regex.match(rf"\p{{{name}}}", character)) for name in "PNS")


# Digits, marks, symbols and whitespace in and outside ASCII and the basic plane; what 13a replaces.
AWKWARD = [
    *"0159.,-'&<>;!$%()+/:=@[]^_`{|}~\"\\#* \n\t\r\x0b\x1c\x85\u00a0\u2028\u3000\u200b\ufeff\u0301",
    *"\u0660\uff15½²Ⅷ猫ßİſ“”。、‘–—€×©\U0001f600\U0001d7d8\U0001f100\U000e0001",
    *("&quot;", "&amp;", "&lt;", "&gt;", "amp;", "<skipped>", "-\n", " .", "...", "1,000.5", "don't"),
]
WORDS = ["the", "The", "cat", "sat", "on", "a", "mat.", "(cat)", "2.5", "x"]
pieces = st.sampled_from(AWKWARD) | st.sampled_from(WORDS) | st.characters(codec="utf-8").filter(known)
awkward = st.lists(pieces, max_size=12).map("".join)
plain = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)


@st.composite
def corpora(draw):
    """Hypotheses, and one to three references for each, which share words; now and then very long ones."""
    text = draw(st.sampled_from([plain, plain, awkward]))
    most = draw(st.integers(1, 3))
    rows = draw(st.lists(st.tuples(text, st.lists(text, min_size=1, max_size=most)), min_size=1, max_size=4))
    repeated = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 30]))
    rows = [(h, refs if draw(st.booleans()) else [*refs, h + " mat"]) for h, refs in rows]
    if repeated > 1:
        rows = [(f"{h} " * repeated, [f"{r} " * repeated for r in refs]) for h, refs in rows] * 2
    hypotheses, references = map(list, zip(*rows, strict=True))
    return hypotheses, references


def streams(references):
    """sacrebleu's form: for each set of references a list with one for each row, or None."""
    most = max(map(len, references))
    return [[own[i] if i < len(own) else None for own in references] for i in range(most)]


@st.composite
def bleu_options(draw):
    method = draw(st.sampled_from(["exp", "floor", "add-k", "none"]))
    value = st.none() | st.sampled_from([0, 1, 0.01, 0.5, 2.5]) if method in ("floor", "add-k") else st.none()
    return {
        "tokenize": draw(st.sampled_from(list(TOKENIZERS))),
        "smooth_method": method,
        "smooth_value": draw(value),
        "lowercase": draw(st.booleans()),
        "effective_order": draw(st.booleans()),
        "max_ngram_order": draw(st.sampled_from([4, 4, 4, 1, 2, 6])),
    }


chrf_options = st.fixed_dictionaries(
    {
        "char_order": st.sampled_from([6, 6, 6, 1, 3, 0]),
        "word_order": st.sampled_from([0, 2, 2, 1]),
        "beta": st.sampled_from([2, 2, 1, 3, 0, 0.5]),
        "lowercase": st.booleans(),
        "whitespace": st.booleans(),
        "eps_smoothing": st.booleans(),
    }
).filter(lambda options: options["char_order"] + options["word_order"])


def check_bleu(ours, theirs, peer):
    assert ours.score == pytest.approx(theirs.score, rel=0, abs=SCALE)
    assert ours.precisions == pytest.approx(theirs.precisions, rel=0, abs=SCALE)
    assert ours.bp == pytest.approx(theirs.bp, rel=0, abs=1e-12)
    assert (ours.sys_len, ours.ref_len) == (theirs.sys_len, theirs.ref_len)
    assert (ours.counts, ours.totals) == (theirs.counts, theirs.totals)
    assert str(ours) == str(theirs)
    assert ours.signature == str(peer.get_signature()).replace(sacrebleu.__version__, f"minift-{VERSION}")


@CASES
@given(corpora(), bleu_options())
def test_bleu_is_sacrebleus(corpus, options):
    hypotheses, references = corpus
    peer = BLEU(**options)
    check_bleu(bleu(*corpus, **options), peer.corpus_score(hypotheses, streams(references)), peer)
    options["effective_order"] = True
    peer = BLEU(**options)
    ours = sentence_bleu(hypotheses[0], references[0], **options)
    check_bleu(ours, peer.sentence_score(hypotheses[0], references[0]), peer)


@CASES
@given(corpora(), chrf_options)
def test_chrf_is_sacrebleus(corpus, options):
    hypotheses, references = corpus
    peer = CHRF(**options)
    for ours, theirs in (
        (chrf(*corpus, **options), peer.corpus_score(hypotheses, streams(references))),
        (sentence_chrf(hypotheses[-1], references[-1], **options), None),
    ):
        if theirs is None:
            theirs = peer.sentence_score(hypotheses[-1], references[-1])
        assert ours.score == pytest.approx(theirs.score, rel=0, abs=SCALE)
        assert str(ours) == str(theirs)
        signature = str(peer.get_signature()).replace(sacrebleu.__version__, f"minift-{VERSION}")
        assert ours.signature == signature


@CASES
@given(awkward | plain, st.text(max_size=20).map(lambda text: "".join(filter(known, text))))
def test_tokens_are_sacrebleus(text, other):
    for name, cut in TOKENIZERS.items():
        for line in (text, other, f"{text} {other}"):
            assert cut(line) == _get_tokenizer(name)()(line).split(), name


def logged(call) -> int:
    """How many sentences sacrebleu logs."""
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    logging.getLogger("sacrebleu").addHandler(handler)
    try:
        call()
    finally:
        logging.getLogger("sacrebleu").removeHandler(handler)
    return len(seen)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (lambda: sentence_bleu("a", "a", effective_order=False), lambda: BLEU().sentence_score("a", ["a"])),
        (
            lambda: sentence_bleu("a", "a", effective_order=True),
            lambda: BLEU(effective_order=True).sentence_score("a", ["a"]),
        ),
        (lambda: bleu(100 * ["a ."], 100 * ["a"]), lambda: BLEU().corpus_score(100 * ["a ."], [100 * ["a"]])),
        (lambda: bleu(99 * ["a ."], 99 * ["a"]), lambda: BLEU().corpus_score(99 * ["a ."], [99 * ["a"]])),
        (
            lambda: bleu(101 * ["a . "], 101 * ["a"]),
            lambda: BLEU().corpus_score(101 * ["a . "], [101 * ["a"]]),
        ),
        (
            lambda: bleu(100 * ["a ."], 100 * ["a"], "none"),
            lambda: BLEU(tokenize="none").corpus_score(100 * ["a ."], [100 * ["a"]]),
        ),
    ],
)
def test_a_warning_stands_where_sacrebleu_logs_one(ours, theirs, recwarn):
    expected = logged(theirs) > 0
    ours()
    assert [w.category for w in recwarn.list] == expected * [MetricWarning]


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (lambda: bleu([], []), lambda: BLEU().corpus_score([], [[]])),
        (lambda: bleu([3], ["a"]), lambda: BLEU().corpus_score([3], [["a"]])),
        (lambda: bleu(["a", None], ["a", "b"]), lambda: BLEU().corpus_score(["a", None], [["a", "b"]])),
        (lambda: bleu(["a"], [3]), lambda: BLEU().corpus_score(["a"], [[3]])),
        (lambda: bleu(["a"], [[None]]), lambda: BLEU().corpus_score(["a"], [[None]])),
        (lambda: bleu(["a"], ["a"], "none", "plus"), lambda: BLEU(smooth_method="plus")),
        (lambda: bleu(["a"], ["a"], "words"), lambda: BLEU(tokenize="words")),
        (
            lambda: sentence_bleu(["a"], ["a"], effective_order=True),
            lambda: BLEU().sentence_score(["a"], ["a"]),
        ),
        (lambda: chrf([], []), lambda: CHRF().corpus_score([], [[]])),
        (lambda: sentence_chrf(3, ["a"]), lambda: CHRF().sentence_score(3, ["a"])),
    ],
)
def test_what_sacrebleu_refuses_is_refused(ours, theirs):
    with pytest.raises((TypeError, AssertionError, KeyError, IndexError, AttributeError)):
        theirs()
    with pytest.raises(ValueError, match="give|is not one of"):
        ours()


def test_rows_that_sacrebleu_drops_or_reads_otherwise_are_refused():
    """It scores as many rows as the shorter side has, and ignores a smooth_value without use."""
    assert BLEU().corpus_score(["a b", "c"], [["a b"]]).sys_len == 2
    with pytest.raises(ValueError, match="2 hypotheses and 1 references"):
        bleu(["a b", "c"], ["a b"])
    assert BLEU(smooth_value=0.5).corpus_score(["a"], [["a"]]).score == 0
    with pytest.raises(ValueError, match=r"smooth_value 0\.5 is for 'floor' and 'add-k'"):
        bleu(["a"], ["a"], smooth_value=0.5)
