"""The tokenizers of BLEU: cuts worked by hand from their rules, and laws."""

from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

tokenizers = import_module("minift.metrics.tokenizers")

# text -> tokens, which stand apart by "|"
WORKED = {
    "13a": {
        "Hello, world!": "Hello|,|world|!",
        "1,234.5 of 9,x": "1,234.5|of|9|,|x",  # a comma stays between digits only
        "It wasn't 10-15 well-known.": "It|wasn't|10|-|15|well-known|.",
        "5. .5 x.5": "5|.|.|5|x|.|5",  # whitespace is no digit, and the start of the text is whitespace
        "a..5 1..5 a.,;": "a|.|.5|1|.|.|5|a|.|,|;",  # pairs of (no digit, point) do not overlap
        "&quot;a&quot; &amp;lt; &lt;b": '"|a|"|<|<|b',  # &amp; before &lt;
        "b&amp;quot;": "b|&|quot|;",  # &quot; before &amp;
        "<skipped>co-\noperate\nnow": "cooperate|now",
        "-<skipped>\nx": "x",
        "--5-5-": "--5|-|5|-",
        "$5 (50%) [a_b] `c` {d}~": "$|5|(|50|%|)|[|a|_|b|]|`|c|`|{|d|}|~",
        "５.５ \N{ARABIC-INDIC DIGIT THREE}.5": "５|.|５|\N{ARABIC-INDIC DIGIT THREE}|.|5",  # not 0-9
        "“a” 猫。": "“a”|猫。",  # only ASCII is cut
        " \n\t": "",
    },
    "intl": {
        "Hello, world!": "Hello|,|world|!",
        "1,234.5 of 9,x": "1,234.5|of|9|,|x",
        "in 1999.": "in|1999.",  # the end of the text is no character before which a point is cut off
        "in 1999. And": "in|1999|.|And",
        ".5 .5": ".5|.|5",
        " .5": ".|5",
        "1999. ": "1999|.",
        "a.": "a|.",
        "“a” 猫。b": "“|a|”|猫|。|b",
        "５.５ ½,\N{ARABIC-INDIC DIGIT THREE}": "５.５|½,\N{ARABIC-INDIC DIGIT THREE}",
        "5€ a+b \U0001f600x": "5|€|a|+|b|\U0001f600|x",
        "well-known 10-15": "well|-|known|10-15",
        "a.,;5 a.,5": "a|.|,|;|5|a|.|,5",
        "&quot;": "&|quot|;",
        "a\u0378b": "a\u0378b",  # unassigned
        "a\u0301.\u0301": "a\u0301|.|\u0301",
        "": "",
    },
    "char": {"a b\n\u3000猫\U0001f600\x1f": "a|b|猫|\U0001f600"},
    "none": {"a, b\x85c\N{NO-BREAK SPACE}d": "a,|b|c|d"},
}


def check_worked(module):
    for name, examples in WORKED.items():
        for text, tokens in examples.items():
            assert module.TOKENIZERS[name](text) == [token for token in tokens.split("|") if token], text


def test_tokens_are_those_worked_by_hand():
    check_worked(tokenizers)


MUTANTS = [
    (
        'text.replace("<skipped>", "").replace("-\\n", "")',
        'text.replace("-\\n", "").replace("<skipped>", "")',
    ),
    ('("&quot;", \'"\'), ("&amp;", "&"),', '("&amp;", "&"), ("&quot;", \'"\'),'),
    ('("&lt;", "<"), ', ""),
    ('{".": "P", ",": "P", "\'": " "}', '{".": "P", ",": "P"}'),
    ('in "NPS"', 'in "NP"'),
    ('_word_intl(word, before if i == 0 else " "', '_word_intl(word, " "'),
    ('behind if i == last else " ")', "behind)"),
    ('if character == "-" and (i == 0 or kinds[i - 1] != "N")', 'if character == "-"'),
    ("i += 1 + pair", "i += 1"),
    ('kinds[i] != "N" and', ""),
    (' and kinds[i + 2] != "N"', ""),
    ("sorted(cuts | {0, len(word)})", "sorted(cuts | {0})"),
    ('_cut(word, [" ", *kinds, " "])', '_cut(word, ["N", *kinds, " "])'),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_worked, tokenizers, old, new)


texts = st.text("a9 .,-'$&;猫。€\n\u0301", max_size=15) | st.text(max_size=10)


@given(texts)
def test_cutting_loses_and_adds_no_character(text):
    solid = "".join(text.split())
    for name in ("intl", "char", "none"):
        assert "".join(tokenizers.TOKENIZERS[name](text)) == solid
    assert "".join(tokenizers.tokenize_13a("".join(c for c in text if c not in "&<\n"))) == "".join(
        c for c in solid if c not in "&<\n"
    )


@given(texts, texts)
def test_what_stands_on_the_other_side_of_whitespace_moves_no_cut(a, b):
    for name, cut in tokenizers.TOKENIZERS.items():
        edge = " " if name == "intl" else ""
        assert cut(f"{edge}{a} {b}{edge}".replace("-\n", "")) == [
            token for part in (a, b) for token in cut(f"{edge}{part}{edge}".replace("-\n", ""))
        ]
