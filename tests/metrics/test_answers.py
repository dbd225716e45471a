"""Answers as SQuAD counts them: worked examples, laws, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import answers
from minift.metrics.answers import exact_match, exact_matches, normalize_answer, token_f1, token_f1s

# Text, normalised: lower case, without punctuation, then without articles, then single spaces.
NORMALIZED = {
    "The Norman's  conquest, of 1066.": "normans conquest of 1066",
    "A-Team": "ateam",  # the punctuation goes first, and then no article is left
    "an": "",
    "a b an c the d": "b c d",
    "theatre another banana": "theatre another banana",
    "“quoted” – dash": "“quoted” – dash",  # other punctuation than ASCII's stays
    "$3.50\n\t(USD)": "350 usd",
    "": "",
}
# prediction, references, exact match, F1
WORKED = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos!"], 1, 1),
    ("the Broncos of Denver", ["Denver Broncos"], 0, 4 / 5),  # 2 of 3 and 2 of 2
    ("gold gold gold", ["gold"], 0, 1 / 2),  # clipped: 1 of 3 and 1 of 1
    ("gold gold", ["gold gold x"], 0, 4 / 5),  # 2 of 2 and 2 of 3
    ("gold", ["silver gold", "a gold"], 1, 1),
    ("one two", ["two three four", "one five"], 0, 1 / 2),
    ("", [""], 1, 1),
    ("the", [""], 1, 1),  # articles alone are no answer
    ("", ["the"], 1, 1),
    ("", ["gold"], 0, 0),
    ("gold", [""], 0, 0),
    ("", ["the", "gold"], 0, 0),  # a reference of nothing counts only where all are
    ("x", ["y"], 0, 0),
]


def check(module):
    for text, normal in NORMALIZED.items():
        assert module.normalize_answer(text) == normal
    for prediction, references, right, f1 in WORKED:
        assert module.exact_match([prediction], [references]) == right, prediction
        assert module.token_f1([prediction], [references]) == pytest.approx(f1, rel=1e-15), prediction
    rows = [row[0] for row in WORKED], [row[1] for row in WORKED]
    assert module.exact_match(*rows) == 5 / 13
    assert module.token_f1(*rows) == pytest.approx((5 + 4 / 5 + 4 / 5 + 1 / 2 + 1 / 2) / 13, rel=1e-15)


def test_worked_examples():
    check(answers)


MUTANTS = [
    ("text.lower()", "text"),
    (".translate(_PUNCTUATION)", ""),
    (r'r"\b(?:an?|the)\b"', 'r"an?|the"'),
    ("an?|the", "an|the"),
    ('or [""]', "or own"),
    ("if (answer := normalize_answer(text))", "if (answer := normalize_answer(text)) or True"),
    ("float(prediction == reference)", "0.0"),
    ("(Counter(prediction) & Counter(reference)).total()", "len(set(prediction) & set(reference))"),
    (
        "common / len(prediction), common / len(reference)",
        "common / len(prediction), common / len(prediction)",
    ),
    ("max(_f1(", "min(_f1("),
    ("2 * P * R / (P + R)", "P * R / (P + R)"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check, answers, old, new)


texts = st.lists(st.sampled_from(["the", "A", "cat", "cat.", "dog", "", "é", "?"]), max_size=5).map(" ".join)
rows = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)


@given(rows)
def test_f1_is_1_where_answers_match_and_sums_of_batches_add(rows):
    predictions, references = map(list, zip(*rows, strict=True))
    assert 0 <= exact_match(predictions, references) <= token_f1(predictions, references) <= 1
    for metric, counts in ((exact_match, exact_matches), (token_f1, token_f1s)):
        parts = [counts([p], [r]) for p, r in zip(predictions, references, strict=True)]
        assert metric(sum(parts[1:], parts[0]), None) == metric(predictions, references)


@given(texts, texts)
def test_f1_is_symmetric_and_normalising_once_is_enough(a, b):
    assert token_f1([a], [b]) == pytest.approx(token_f1([b], [a]), rel=1e-15)
    assert token_f1([a], [a]) == exact_match([a], [normalize_answer(a)]) == 1


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: exact_match("a", ["a"]), "predictions is one string"),
        (lambda: token_f1(["a"], ["a", "b"]), "1 predictions and 2 references"),
        (lambda: token_f1(["a"], [[]]), r"references\[0\] is \[\]"),
        (lambda: exact_match([None], ["a"]), r"predictions\[0\] is None"),
        (lambda: exact_match([], []), "predictions is empty"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
