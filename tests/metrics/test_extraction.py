"""Final numbers of solutions: by hand, against the verdicts on GSM8K's model solutions, and laws."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import extraction
from minift.metrics.extraction import final_number

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
# text, "marked", "last"
BY_HAND = [
    ("2 * 9 = <<2*9=18>>18\n#### 18", "18", "18"),
    ("A: 5\nno, A: 7 of 9", "7", "9"),
    ("The answer is $1,250.50.", "1250.5", "1250.5"),
    ("so the Answer: -$5", "-5", "-5"),
    ("A: $-5.00", "-5", "-5"),
    ("A: \u2212$5", "-5", "-5"),
    ("A: 2,000,000 (2 millions)", "2000000", "2"),
    ("A: 007", "7", "7"),
    ("A: -0.0", "0", "0"),
    ("A: .5", "0.5", "0.5"),
    ("A: 6/4 hours", "3/2", "3/2"),
    ("A: 4/2", "2", "2"),
    ("A: 9/0", "9", "9"),
    ("A: 3-1", "3", "1"),
    ("x=\u22122", None, "-2"),
    ("A:\n12", None, "12"),
    ("none", None, None),
    ("", None, None),
    ("A: \u0663", None, None),  # a digit, but of another script
    ("DNA: 4", None, "4"),
    ("A: 12.\nGroup a: 7", "12", "7"),
    *((f"A: {whole}", None, None) for whole in ("1e5", "10^6", "1,2345", "1.000.000", "1_000", "1/2.5")),
    ("A: 18kg", "18", "18"),
]


def check(module):
    for text, marked, last in BY_HAND:
        found = module.final_number(text), module.final_number(text, "last")
        assert found == (marked, last), text


def test_numbers_by_hand():
    check(extraction)


MUTANTS = [
    (check, "marks[-1].end()", "marks[0].end()"),
    (check, '.partition("\\n")[0]', ""),
    (check, '.replace(",", "")', ""),
    (check, '.lstrip("0") or "0"', ' or "0"'),
    (check, '.rstrip("0").rstrip(".")', ""),
    (check, 'and number != "0"', ""),
    (check, "(sign or late_sign)", "sign"),
    (check, "and int(under):", "and under != '':"),
    (check, "int(under) // shared", "int(under)"),
    (check, 'r"####|\\bA:', 'r"####|A:'),
    (check, "[-\\u2212])?[$", "[-])?[$"),
    (check, '(?<![\\w.,])[-\\u2212])?"  #', '[-\\u2212])?"  #'),
    (check, "(?i:answer(?: is|:))", "(?:answer(?: is|:))"),
    (check, "[eE][-+]?[0-9]|", ""),
    (check, "(?<![0-9])(?<![0-9][eE^_.,/])", ""),
]


@pytest.mark.parametrize("check, old, new", MUTANTS)
def test_mutants_die(check, old, new):
    assert not survives(check, extraction, old, new)


@pytest.mark.parametrize("rule", ["marked", "last"])
def test_every_verdict_on_the_model_solutions_follows(shared_data, rule):
    lines = (shared_data / "metric_refs" / "gsm8k_model_solutions.jsonl").read_text(encoding="utf-8")
    rows, right = [json.loads(line) for line in lines.splitlines()], 0
    for row in rows:
        truth = final_number(row["ground_truth"], rule)
        for model in MODELS:
            found = final_number(row[model]["solution"], rule)
            assert (found == truth) == row[model]["is_correct"], row[model]
            right += found == truth
    assert (len(rows), right) == (300, 472)


@given(st.integers(-(10**30), 10**30), st.integers(0, 3), st.booleans(), st.sampled_from(["", "$", "€"]))
def test_a_number_in_any_dress_is_found_again(number, zeros, commas, currency):
    sign, digits = "-" if number < 0 else "", f"{abs(number):,}" if commas else f"{abs(number)}"
    dressed = f"{sign}{currency}{digits}" + ("." + "0" * zeros if zeros else "")
    for text in (f"so the answer is {dressed}.", f"1 + 1\n#### {dressed}"):
        assert final_number(text) == final_number(text, "last") == str(number)


@given(st.text(max_size=15))
def test_what_is_found_is_a_number_in_its_form(text):
    for rule in ("marked", "last"):
        found = final_number(text + " #### " + text, rule)
        assert found is None or final_number(f"A: {found}") == found


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: final_number("1", "first"), "rule 'first' is not one of 'marked', 'last'"),
        (lambda: final_number(None), "text is None; give a string"),
    ],
)
def test_what_is_no_solution_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
