"""Scores of entities: published values, spellings by hand and by law, and what is refused."""

import math
import warnings
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import MetricWarning, State, entities
from minift.metrics.entities import entity_counts, entity_f1, entity_precision, entity_recall, entity_report

# The examples of seqeval's documentation.
README = (
    [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
    [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
)
F1_EXAMPLE = (
    [["O", "O", "B-MISC", "I-MISC", "B-MISC", "O", "O"], ["B-PER", "I-PER", "O"]],
    [["O", "O", "B-MISC", "I-MISC", "B-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]],
)
# What each scheme reads: tags, and for each entity its type, first and last tag.
READ = [
    (None, "B-A I-A O B-B", "A01 B33"),
    (None, "I-A I-A B-A I-B", "A01 A22 B33"),  # as IOB1
    (None, "O E-A E-A S-A I-A", "A11 A22 A33 A44"),
    (None, "B-A E-A I-A E-A B-A B-A", "A01 A23 A44 A55"),
    (None, "B I O B I-_", "_01 _34"),
    (None, "B-A-B I-A-B I-A", "A-B01 A22"),
    ("IOB1", "I-A I-A B-A I-A I-B", "A01 A23 B44"),
    ("IOB1", "B-A I-A O B-A", "A11"),  # B only after the same type
    ("IOB1", "I-A B-A B-B I-B", "A00 B33"),
    ("IOB2", "B-A I-A I-B O I-A B-A", "A01 A55"),
    ("IOE2", "I-A E-A E-B I-A I-A O", "A01 B22"),
    ("IOBES", "B-A I-A E-A S-B B-A I-A O E-A", "A02 B33"),
    ("IOBES", "B-A B-A E-A B-A E-B", "A12"),
    ("BILOU", "B-A I-A L-A U-B B-A L-B", "A02 B33"),
]
# right, true, predicted: A 1 2 1, B 1 1 2, C 0 1 0, D 0 0 1
UNEVEN = ([["B-A", "O", "B-A", "O"], ["B-B", "O", "B-C"]], [["B-A", "O", "O", "B-B"], ["B-B", "O", "B-D"]])


def check_published(module):
    assert [module.entity_f1(*README, average) for average in ("micro", "macro", "weighted")] == [
        0.5,
        0.5,
        0.5,
    ]
    assert module.entity_f1(*README, None).tolist() == [0, 1]
    averages = {"micro": 2 / 3, "macro": 3 / 4, "weighted": 2 / 3}
    for score in (module.entity_precision, module.entity_recall, module.entity_f1):
        assert {a: score(*F1_EXAMPLE, a) for a in averages} == pytest.approx(averages, rel=2**-51)
        assert score(*F1_EXAMPLE, None).tolist() == [0.5, 1]
    by_hand = {
        module.entity_precision: ([1, 1 / 2, 0, 0], 2 / 4, (2 * 1 + 1 / 2) / 4),
        module.entity_recall: ([1 / 2, 1, 0, 0], 2 / 4, (2 * 1 / 2 + 1) / 4),
        module.entity_f1: ([2 / 3, 2 / 3, 0, 0], 2 * 2 / 8, (2 * 2 / 3 + 2 / 3) / 4),
    }
    for score, (each, micro, weighted) in by_hand.items():
        assert score(*UNEVEN, None, None, 0).tolist() == each
        assert score(*UNEVEN, "macro", None, 0) == pytest.approx(sum(each) / 4, rel=2**-51)
        assert score(*UNEVEN, "micro") == micro
        assert score(*UNEVEN, "weighted", None, 0) == pytest.approx(weighted, rel=2**-51)
    assert module.entity_report(*README, zero_division=0).split("\n")[2:] == [
        "        MISC       0.00      0.00      0.00         1",
        "         PER       1.00      1.00      1.00         1",
        "",
        "   micro avg       0.50      0.50      0.50         2",
        "   macro avg       0.50      0.50      0.50         2",
        "weighted avg       0.50      0.50      0.50         2",
        "",
    ]


def check_spellings(module):
    for scheme, tags, expected in READ:
        found = module._spans(tags.split(), scheme, {"O": ("O", None)}, "y")
        assert found == {(e[:-2], int(e[-2]), int(e[-1]) + 1) for e in expected.split()}, (scheme, tags)


def test_published_values():
    check_published(entities)


def test_every_scheme_reads_its_own_spelling():
    check_spellings(entities)


MUTANTS = [
    (check_spellings, r".[ES]|.[BI](\+I)*(\+E)?", r".[ES]|.[BI](\+I)*"),
    (check_spellings, r".[ES]|.[BI](\+I)*", r".S|.[BIE](\+I)*"),
    (check_spellings, r"(\+B(?!\|B)|.I)", r"(\+B|.I)"),
    (check_spellings, r"(\+B(?!\|B)|.I)", r"(.B(?!\|B)|.I)"),
    (check_spellings, r'"IOB2": r".B', r'"IOB2": r".[BI]'),
    (check_spellings, r".S|.B(\+I)*\+E", r".S|.B(\+I)*(\+E)?"),
    (check_spellings, r".E|.I(\+I)*\+E", r".I(\+I)*\+E"),
    (check_spellings, r".U|.B(\+I)*\+L", r".U|.B(.I)*.L"),
    (check_spellings, '"+" if kind == before', '"+" if before'),
    (check_spellings, "tag[2:] if scheme", 'tag.split("-")[-1] if scheme'),
    (check_spellings, 'kind or "_"', "kind"),
    (check_spellings, "before = kind\n", "before = None\n"),
    (check_published, "spans[0] & spans[1], *spans", "spans[0] & spans[1], *spans[::-1]"),
    (check_published, "return 2 * right, true + predicted", "return right, true + predicted"),
    (check_published, "types = sorted(true | predicted)", "types = sorted(true)"),
    (
        check_published,
        "counter.update(kind for kind, _, _ in found)",
        "counter.update({k for k, _, _ in found})",
    ),
    (check_published, "scores(average, float(zero_division)), true.sum()", "(0, 0, 0), 1"),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, entities, old, new)


def spell(scheme, lengths) -> tuple[list[str], set]:
    """The tags of words outside (type O) and entities (type, length), and the entities."""
    tags, found, before = [], set(), None
    for kind, length in lengths:
        at = len(tags)
        if kind == "O":
            tags += ["O"]
        else:
            found.add((kind, at, length))
            letters = ["I"] * length
            if scheme in (None, "IOB2", "BIO", "IOBES", "BILOU") or (scheme == "IOB1" and before == kind):
                letters[0] = "B"
            if scheme in ("IOE2", "IOBES", "BILOU"):
                letters[-1] = "L" if scheme == "BILOU" else "E"
            if length == 1 and scheme in ("IOBES", "BILOU"):
                letters = ["S" if scheme == "IOBES" else "U"]
            tags += [f"{letter}-{kind}" for letter in letters]
        before = kind
    return tags, found


pieces = st.lists(st.tuples(st.sampled_from("OOABC"), st.integers(1, 3)), max_size=8)


@given(st.lists(st.tuples(pieces, pieces), min_size=1, max_size=4))
def test_counts_are_those_of_the_sets_of_entities_in_every_spelling(rows):
    for scheme in entities.SPELLINGS:
        truth, tagged, expected = [], [], (Counter(), Counter(), Counter())
        for both in rows:
            (a, true), (b, predicted) = (spell(scheme, lengths) for lengths in both)
            longest = max(len(a), len(b))
            truth.append(a + ["O"] * (longest - len(a)))
            tagged.append(b + ["O"] * (longest - len(b)))
            for counter, found in zip(expected, (true & predicted, true, predicted), strict=True):
                counter.update(kind for kind, _, _ in found)
        assert tuple(entity_counts(truth, tagged, scheme)) == expected
        if scheme == "IOBES":
            assert entity_counts(truth, tagged, None) == entity_counts(truth, tagged, scheme)
        batches = State(entity_report, scheme=scheme, zero_division=0)
        for row in range(len(rows)):
            batches.update(truth[row : row + 1], tagged[row : row + 1])
        if sum(expected[1].values()) + sum(expected[2].values()):
            assert batches.compute() == entity_report(truth, tagged, scheme, zero_division=0)


@pytest.mark.parametrize(
    "call, value, sentence",
    [
        (
            lambda **z: entity_precision([["B-A"]], [["O"]], **z),
            0,
            "precision has no denominator in 1 of 1 types",
        ),
        (lambda **z: entity_recall([["O"]], [["B-A"]], **z), 0, "recall has no denominator"),
        (lambda **z: entity_f1([["O"]], [["O"]], **z), 0, "F1 has no denominator"),
        (
            lambda **z: entity_recall(*UNEVEN, "macro", **z),
            1.5 / 4,
            "recall has no denominator in 1 of 4 types",
        ),
    ],
)
def test_a_score_without_a_denominator_is_zero_and_says_so_unless_it_is_told(call, value, sentence):
    with pytest.warns(MetricWarning, match=sentence):
        assert call() == value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(zero_division=1) > value


def test_rows_without_any_entity():
    nothing = ([["O", "O"], []], [["O", "O"], []])
    with pytest.warns(MetricWarning, match="hold no entity, so the mean over types is undefined"):
        assert math.isnan(entity_f1(*nothing, "macro"))
    assert entity_f1(*nothing, None).tolist() == [] and entity_f1(*nothing, "weighted", None, 1) == 1
    with pytest.raises(ValueError, match="hold no entity, so there is nothing to report"):
        entity_report(*nothing)


@pytest.mark.parametrize(
    "y_true, y_pred, options, sentence",
    [
        ([["O"], ["B-A", "O"]], [["O"], ["B-A"]], {}, "sentence 1 has 2 tags in y_true and 1 in y_pred"),
        ([["O"]], [["O"], ["O"]], {}, "y_true has 1 rows and y_pred 2"),
        (
            [["O"], ["O", "PER"]],
            [["O"], ["O", "O"]],
            {},
            r"y_true\[1\]\[1\] is 'PER', which is no tag; give O, or",
        ),
        ([["O"]], [["o"]], {}, r"y_pred\[0\]\[0\] is 'o'"),
        ([["O"]], [["O-PER"]], {}, "is 'O-PER', which is no tag"),
        ([["O"]], [[""]], {}, "is '', which is no tag"),
        ([["O"]], [["B_PER"]], {}, "is 'B_PER'"),
        ([["O"]], [[None]], {}, "is None, which is no tag"),
        ([["O"]], [[["O"]]], {}, r"is \['O'\], which is no tag"),
        ([["O"]], [["U-PER"]], {}, "L and U need scheme='BILOU'"),
        (
            [["O"]],
            [["E-PER"]],
            {"scheme": "IOB2"},
            "is no tag of IOB2; give O, or one of B, I and a type, as B-PER",
        ),
        ([["O"]], [["O"]], {"scheme": "IO"}, "scheme 'IO' is not one of None, 'IOB1', 'IOB2'"),
        ([["O"]], [["O"]], {"average": "binary"}, "average 'binary' is not one of 'micro'"),
        ([["O"]], [["O"]], {"zero_division": 2}, "zero_division 2 is not 0, 1 or nan"),
        (["O", "B-A"], ["O", "B-A"], {}, r"y_true\[0\] is 'O'; give a list of tags for each sentence"),
        ("O", "O", {}, "y_true is 'O'; give a list"),
        ([], [], {}, r"y_true is \[\]; give a list"),
    ],
)
def test_what_is_no_tagging_is_refused(y_true, y_pred, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        entity_f1(y_true, y_pred, **options)
