"""Porter's stemmer, METEOR and edit distance against NLTK."""

import re

import pytest

pytest.importorskip("nltk")

from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from nltk.metrics.distance import edit_distance as nltk_edit_distance
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score

from minift.metrics.edit_distance import edit_distance
from minift.metrics.meteor import meteor
from minift.metrics.porter import ENDING2, STEP2, STEP3, STEP4, stem

pytestmark = pytest.mark.parity

STEMMER = PorterStemmer()
ENDINGS = [
    *STEP2,
    *STEP3,
    *STEP4,
    "ed",
    "ing",
    "ied",
    "ies",
    "s",
    "sses",
    "ss",
    "eed",
    "e",
    "ll",
    "y",
    "bly",
    "logy",
]


class NoSynonyms:
    """In place of WordNet."""

    def synsets(self, word):
        return []


def test_stems_of_real_words_are_those_of_nltk(shared_data):
    found = set()
    for folder in ("wikitext2", "tinyshakespeare", "mts_dialog", "sst2", "hellaswag", "banking77"):
        for path in sorted((shared_data / folder).iterdir()):
            text = path.read_text(encoding="utf-8", errors="ignore").lower()
            found |= set(re.findall("[a-z0-9]+", text)) | set(text.split())
    found = [word for word in sorted(found) if len(word) < 60 and "*" not in word]
    assert len(found) > 60_000
    assert [word for word in found[::3] if stem(word) != STEMMER.stem(word)] == []


def test_stems_of_every_pair_of_endings_are_those_of_nltk():
    starts = ["", "b", "ea", "bab", "babab", "sly", "ayb", "yy", "tt", "oll", "hop", "ex"]
    made = {start + one + two for start in starts for one in ENDINGS[::2] for two in ["", *ENDINGS]}
    assert len(made) > 10_000
    assert [word for word in sorted(made) if stem(word) != STEMMER.stem(word)] == []
    assert ENDING2.search("relational")[0] == "ational"  # the longest


@CASES
@given(st.text(max_size=10).filter(lambda w: "*" not in w) | st.text("abeiloty", max_size=10))
def test_stems_of_any_text_are_those_of_nltk(word):
    assert stem(word) == STEMMER.stem(word)


def test_nltk_takes_a_star_and_d_for_a_double_consonant():
    assert STEMMER.stem("ab*ding") == "abd" and stem("ab*ding") == "ab*d"  # "*d" is the name of a condition


tokens = st.sampled_from(
    ["the", "The", "cat", "cats", "CAT", "run", "running", "runs", "ran", "é", "a", "Σ", "ΑΣ", "İ"]
)
texts = st.lists(tokens, max_size=12).map(" ".join)
share = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


@CASES
@given(texts, st.lists(texts, min_size=1, max_size=3), share, st.sampled_from([0.0, 0.5, 1.0, 3.0]), share)
def test_meteor_is_that_of_nltk_without_synonyms(prediction, references, alpha, beta, gamma):
    split = [reference.split() for reference in references]
    options = {"alpha": alpha, "beta": beta, "gamma": gamma}
    for settings_ in ({}, options):
        expected = meteor_score(split, prediction.split(), wordnet=NoSynonyms(), **settings_)
        assert meteor([prediction], [references], **settings_) == expected


strings = st.text("ab", max_size=70) | st.text(max_size=30)


@CASES
@given(strings, strings)
def test_edit_distance_is_that_of_nltk(a, b):
    assert edit_distance(a, b) == nltk_edit_distance(a, b)
    assert edit_distance(list(a), list(b)) == edit_distance(a, b)
