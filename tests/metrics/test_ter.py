"""TER: published and hand-worked values, its search, its tokens, and what is refused."""

import importlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import shifts
from minift.metrics.edit_distance import edit_distance
from minift.metrics.shifts import common_runs, edits, shift
from minift.metrics.ter import ter, ter_counts, words

MODULE = importlib.import_module("minift.metrics.ter")  # in the package its name is the function's
HYPOTHESIS = "THIS WEEK THE SAUDIS denied information published in the new york times"
REFERENCE = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
# h, r, edits
WORKED = [
    (HYPOTHESIS, REFERENCE, 4),  # Snover et al. 2006, figure 1: one shift, two substitutions, one insertion
    ("d e f g h a b c", "a b c d e f g h", 1),
    ("a b c d e f", "d e f a b c", 1),
    ("a b c", "a b c", 0),
    ("", "a b", 2),
    ("a b", "", 2),
    ("", "", 0),
    ("a x b", "b y a", 3),  # a shift leaves two edits; without it all three are replaced
    ("c a b d", "a b c d", 1),
    ("b a d c", "a b c d", 2),
    ("a b c a b c x y", "x y a b c a b c", 1),
    ("1 2 3 4 5 6 7 8 9 10 11 12 x y", "x y 1 2 3 4 5 6 7 8 9 10 11 12", 1),  # the two move, not the twelve
    # one more than the ten words that may move at once
    (" ".join("abcdefghijk" + "lmnopqrstuvw"), " ".join("lmnopqrstuvw" + "abcdefghijk"), 2),
    # 51 words away is too far for a shift, 50 is not: a deletion and an insertion, or a shift
    (" ".join(["x", *map(str, range(51))]), " ".join([*map(str, range(51)), "x"]), 2),
    (" ".join(["x", *map(str, range(50))]), " ".join([*map(str, range(50)), "x"]), 1),
    # moved by 40 words, past the beam, where no move shows a gain: all are replaced
    (" ".join([*map(str, range(30)), *"ab" * 20]), " ".join([*"ab" * 20, *map(str, range(30))]), 60),
    ("a a b a", "a b a a", 1),
    ("the the the cat", "the cat", 2),
]


def check_edits(module):
    for h, r, expected in WORKED:
        assert module.edits(h.split(), r.split()) == expected, (h, r)


def check_beam(module):
    h, r = list("abcdefgh"), list("xbcyefgz")
    full = module.beam_rows(h, r)
    assert [row[-1] for row in full] == [edit_distance(h[:i], r) for i in range(9)]
    assert module.beam_rows(h, r, full[:4]) == full
    long = [str(i) for i in range(60)]
    rows = module.beam_rows(long, long[30:] + long[:30])
    assert rows[-1][-1] == 60  # by 30 deletions, and as many insertions, or by 60 replaced
    assert rows[30][4] == rows[30][55] == module.NEVER and module.NEVER not in rows[30][5:55]
    assert module.beam_rows(["a"], long)[-1][-1] == 60 and module.beam_rows(long, ["5"])[-1][-1] == 59
    assert module.beam_rows(["a", "b"], 4 * long)[-1][-1] == 240  # rows 120 apart
    table = module.Table(r)
    assert table.fill(h) == full[-1][-1] and not table.cells
    assert [[table.cell(i, j) for j in range(9)] for i in range(9)] == full
    at, edited_h, edited_r = module.align(h, r, table)
    assert at == list(range(8)) and edited_h == edited_r == [True, *[False] * 2, True, *[False] * 3, True]
    table = module.Table(list("bxa"))
    table.fill(list("ab"))
    # three edits either way: an insertion and two replaced, rather than a dropped, b kept and two insertions
    assert module.align(list("ab"), list("bxa"), table) == ([-1, 0, 1], [True, True], [True, True, True])
    table = module.Table(list("bxy"))
    table.fill(list("ab"))
    assert module.align(list("ab"), list("bxy"), table)[0] == [-1, 0, 1]
    table = module.Table(list("abxy"))
    table.fill(list("ab"))
    assert module.align(list("ab"), list("abxy"), table) == (
        [0, 1, 1, 1],
        [False] * 2,
        [False] * 2 + [True] * 2,
    )
    table = module.Table(list("ab"))
    table.fill(list("b"))
    assert module.align(["b"], list("ab"), table) == ([-1, 0], [False], [True, False])


def check_ter(module):
    result = module.ter([HYPOTHESIS], [REFERENCE])
    assert (result.score, result.num_edits, result.ref_length) == (100 * 4 / 13, 4, 13)
    assert float(result) == result.score and str(result) == "TER = 30.77"
    begin, version = result.signature.rsplit("|", 1)
    assert begin == "nrefs:1|case:lc|tok:tercom|norm:no|punct:yes|asian:no"
    assert version.startswith("version:minift-")
    several = module.ter(["a b c", "d"], [["a b x y", "a b"], "D"])
    assert (several.num_edits, several.ref_length, several.score) == (1, 4, 25)
    assert several.signature.startswith("nrefs:var|")
    strict = module.ter(["d"], ["D"], case_sensitive=True, no_punct=True)
    assert strict.score == 100 and "case:mixed" in strict.signature and "punct:no" in strict.signature
    assert module.ter(["a"], [""]).score == 100 and module.ter([""], [""]).score == 0
    assert module.ter(["2 's 。"], ["2's。"], normalized=True, asian_support=True).score == 0  # as sacrebleu


# text, (normalized, no_punct, asian_support, case_sensitive), words
TOKENS = [
    ("Hello,  World! ", (0, 0, 0, 0), "hello,|world!"),
    ("Hello, World!", (0, 0, 0, 1), "Hello,|World!"),
    ("Hello, (World)!", (1, 0, 0, 0), "hello|,|(|world|)|!"),
    ("the cat's 1,000.50 mats.", (1, 0, 0, 0), "the|cat|'s|1,000.50|mats|."),
    ("10-year-old .5 5.", (1, 0, 0, 0), "10|-|year-old|.|5|5|."),
    ("trans-\nlate\n-d", (1, 0, 0, 0), "trans-|lated"),
    ("&quot;a&amp;b&quot; &lt;c&gt;", (1, 0, 0, 0), '"|a|&|b|"|<|c|>'),
    ("中文ab、ひら。", (1, 0, 1, 0), "中|文|ab|、|ひら|。"),
    ("中文ab、ひら。", (1, 0, 0, 0), "中文ab、ひら。"),
    ("a.b, c? (d); e-f", (0, 1, 0, 0), "ab|c|d|e-f"),
    ("中、文。！a!", (0, 1, 1, 0), "中文a"),
    ("中、文。！a!", (0, 1, 0, 0), "中、文。！a"),
]


def check_tokens(module):
    for text, options, expected in TOKENS:
        assert module.words(text, *options) == expected.split("|"), text


@pytest.mark.parametrize("check, module", [(check_edits, shifts), (check_beam, shifts), (check_ter, MODULE)])
def test_worked_values(check, module):
    check(module)


def test_words_follow_tercoms_rules():
    check_tokens(MODULE)


MUTANTS = [
    (check_edits, shifts, "MOST_WORDS = 10", "MOST_WORDS = 11"),
    (check_edits, shifts, "FARTHEST = 50", "FARTHEST = 51"),
    (check_edits, shifts, "return shifts + distance", "return distance"),
    (check_edits, shifts, "if h[start + size - 1] != r[place + size - 1]:", "if False:"),
    (check_edits, shifts, "target - (end - start) if target > end else target", "target"),
    (check_edits, shifts, "rank > best", "rank < best"),
    (
        check_beam,
        shifts,
        "edited_h[i], edited_r[j] = i, differ, differ",
        "edited_h[i], edited_r[j] = i, True, differ",
    ),
    (check_beam, shifts, "BEAM = 25", "BEAM = 24"),
    (check_beam, shifts, "ceil(slope / 2 + BEAM)", "BEAM"),
    (check_beam, shifts, "(word != r[j - 1]), above[j] + 1", "(word != r[j - 1]), above[j] + 2"),
    (check_beam, shifts, "at[j] = i - 1", "at[j] = i"),
    (check_beam, shifts, "- (down & first).bit_count()", ""),
    (check_ter, MODULE, "min(edits(h, r) for r in own)", "max(edits(h, r) for r in own)"),
    (check_ter, MODULE, "/ len(own))", ")"),
    (check_ter, MODULE, "100.0 * bool(number)", "0.0"),
    (check_ter, MODULE, 'words(" ".join(r), *options)', "r"),
    (check_tokens, MODULE, 'text.replace("\\n-", "")', "text"),
    (check_tokens, MODULE, '(r"\'s ", " \'s "),', ""),
    (check_tokens, MODULE, 'text = f" {text} "', "pass"),
    (check_tokens, MODULE, 're.sub(ASIAN_DROPPED, "", text)', "text"),
    (check_tokens, MODULE, "text.translate(PUNCTUATION)", "text"),
]


@pytest.mark.parametrize("check, module, old, new", MUTANTS)
def test_mutants_die(check, module, old, new):
    assert not survives(check, module, old, new)


some = st.lists(st.sampled_from("abcd"), max_size=12)


@given(some, some)
def test_edits_are_at_most_the_edit_distance_and_0_for_equals_only(h, r):
    assert edits(h, r) <= edit_distance(h, r)
    assert (edits(h, r) == 0) == (h == r)


@given(some, some)
def test_runs_are_in_both_texts(h, r):
    for start, place, size in common_runs(h, r):
        assert h[start : start + size] == r[place : place + size] != []


@given(some.filter(bool), st.data())
def test_a_shift_keeps_the_words_and_the_order_of_the_others(h, data):
    start = data.draw(st.integers(0, len(h) - 1))
    end = data.draw(st.integers(start + 1, len(h)))
    marked = list(enumerate(h))
    moved = shift(marked, start, end, data.draw(st.integers(0, len(h))))
    run = marked[start:end]
    at = moved.index(run[0])
    assert (
        moved[at : at + len(run)] == run
        and moved[:at] + moved[at + len(run) :] == marked[:start] + marked[end:]
    )


@given(st.lists(st.tuples(some.map(" ".join), some.map(" ".join)), min_size=1, max_size=5))
def test_counts_of_batches_add(rows):
    hypotheses, references = map(list, zip(*rows, strict=True))
    parts = [ter_counts([h], [r]) for h, r in zip(hypotheses, references, strict=True)]
    assert ter(sum(parts[1:], parts[0]), None) == ter(hypotheses, references)


def test_words_of_whitespace_are_none():
    assert words(" \n\t ") == words("", normalized=True) == []


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: ter("a", "a"), "hypotheses is one string"),
        (lambda: ter(["a"], ["a", "b"]), "1 hypotheses and 2 references"),
        (lambda: ter(["a", "b", "c"], [["a", "b", "c"]]), "these look like sacrebleu's streams"),
        (lambda: ter([1], ["a"]), r"hypotheses\[0\] is 1; give a string"),
    ],
)
def test_what_makes_no_score_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_scores_are_those_of_sacrebleus_own_tests(shared_data):
    cases = json.loads((shared_data / "metric_refs" / "ter.json").read_text(encoding="utf-8"))
    assert len(cases) == 6
    for case in cases:
        found = ter(case["hypotheses"], case["references"]).score
        assert found == pytest.approx(case["expected"], rel=0, abs=case["tol"]), case["id"]
