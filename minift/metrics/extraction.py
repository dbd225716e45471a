"""The final number of a model's solution in one form, so that equal numbers are equal strings.

Two rules, and a score that rests on one names it:

    "marked"  the first number after the last mark on its line: "####", "A:", "answer is" or "answer:"
    "last"    the last number of the text, wherever it stands

Thousands' commas, currencies, a plus and zeros that say nothing go: "$1,250.50" is "1250.5". A fraction of
integers stays one, in lowest terms. Numbers in words are not read, and of "1e5" or "1.000.000" no part is.
Source: Cobbe et al. 2021, "Training verifiers to solve math word problems", for "####" and "A:".
"""

import re
from math import gcd

from minift.metrics.checks import choice

MARK = re.compile(r"####|\bA:|\b(?i:answer(?: is|:))")
AFTER = re.compile(r"[.,/]?[0-9]|[eE][-+]?[0-9]|\^|_[0-9]")  # what makes a number a part of something else
NUMBER = re.compile(
    r"((?<![\w.,])[-\u2212])?[$€£]?((?<![\w.,])[-\u2212])?"  # a sign, unless it subtracts: 5-3
    r"(?<![0-9])(?<![0-9][eE^_.,/])(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(\.[0-9]+)?(?:/([0-9]{1,18}))?"
)


def final_number(text: str, rule: str = "marked") -> str | None:
    """The final number of a solution, or None where the rule finds none.

    >>> final_number("He pays 3 * $400 = <<3*400=1200>>1200 in all.\\n#### 1,200.00")
    '1200'
    >>> final_number("so it is -.50 of 7.", "last"), final_number("so it is -.50 of 7.")
    ('7', None)
    """
    choice(rule, ("marked", "last"), "rule")
    if not isinstance(text, str):
        raise ValueError(f"text is {text!r}; give a string")
    if rule == "marked":
        marks = list(MARK.finditer(text))
        if not marks:
            return None
        found = NUMBER.search(text[marks[-1].end() :].partition("\n")[0])
    else:
        found = None
        for found in NUMBER.finditer(text):  # noqa: B007
            pass
    if found is None or AFTER.match(found.string, found.end()):
        return None
    return _one_form(*found.groups())


def _one_form(sign, late_sign, whole, part, under) -> str:
    whole = (whole or "").replace(",", "").lstrip("0") or "0"
    part = (part or "").rstrip("0").rstrip(".")
    if under is not None and not part and len(whole) <= 18 and int(under):
        shared = gcd(int(whole), int(under))
        whole, under = str(int(whole) // shared), int(under) // shared
        part = f"/{under}" if under > 1 else ""
    number = whole + part
    return f"-{number}" if (sign or late_sign) and number != "0" else number
