"""From a text to its tokens, for BLEU: the tokenizers 13a, intl, char and none of sacrebleu.

    none  words between whitespace, as str.split finds them
    char  every character that is no whitespace
    13a   words, cut at the punctuation of ASCII; digits are 0-9
    intl  words, cut at punctuation (category P) and symbols (S) of Unicode; digits are all of category N

13a and intl keep the points and commas within numbers. Each character is of a kind: N a digit, P punctuation
that may belong to a number, S a symbol that never does, " " anything else, and so is what stands around a
word. First, from left to right, a P behind what is no digit is cut off on both sides, and such pairs do not
overlap; then a P before what is no digit, and every S, is cut off on both sides. As no cut reaches across
whitespace, each different word is cut once and remembered.

Categories are those of Python's unicodedata: a character newer than its tables counts as unassigned.
Source: NIST's mteval-v13a.pl and mteval-v14.pl (tokenization), as sacrebleu 2.6.0 applies them.
"""

from functools import lru_cache
from itertools import chain, pairwise
from string import digits, punctuation
from unicodedata import category

KINDS_13A = dict.fromkeys(digits, "N") | dict.fromkeys(punctuation, "S") | {".": "P", ",": "P", "'": " "}
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))  # in this order


def tokenize_13a(text: str) -> list[str]:
    """Tokens of mteval-v13a: "<skipped>" goes, a hyphen at a line's end joins, entities are resolved."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        for entity, character in ENTITIES:
            text = text.replace(entity, character)
    return list(chain.from_iterable(map(_word_13a, text.split())))


def tokenize_intl(text: str) -> list[str]:
    """Tokens of mteval-v14 with international tokenization.

    What stands before the first character and behind the last counts as a digit, so "1999." stays whole at
    the end of a text, and only there.
    """
    words = text.split()
    last = len(words) - 1
    before, behind = ("N" if not edge.isspace() else " " for edge in (text[:1], text[-1:]))
    return [
        token
        for i, word in enumerate(words)
        for token in _word_intl(word, before if i == 0 else " ", behind if i == last else " ")
    ]


def tokenize_char(text: str) -> list[str]:
    return list("".join(text.split()))


TOKENIZERS = {"13a": tokenize_13a, "intl": tokenize_intl, "char": tokenize_char, "none": str.split}


@lru_cache(maxsize=1 << 16)
def _word_13a(word: str) -> tuple[str, ...]:
    """A hyphen is cut off behind a digit only."""
    kinds = [KINDS_13A.get(character, " ") for character in word]
    for i, character in enumerate(word):
        if character == "-" and (i == 0 or kinds[i - 1] != "N"):
            kinds[i] = " "
    return _cut(word, [" ", *kinds, " "])


@lru_cache(maxsize=1 << 16)
def _word_intl(word: str, before: str, behind: str) -> tuple[str, ...]:
    kinds = [kind if (kind := category(character)[0]) in "NPS" else " " for character in word]
    return _cut(word, [before, *kinds, behind])


def _cut(word: str, kinds: list[str]) -> tuple[str, ...]:
    """The tokens of a word; kinds[i + 1] is that of word[i], and those around the word stand at the ends."""
    if word.isalnum():
        return (word,)
    cuts, i = set(), 0
    while i < len(word):
        if pair := kinds[i] != "N" and kinds[i + 1] == "P":
            cuts |= {i, i + 1}
        i += 1 + pair
    for i in range(len(word)):
        if kinds[i + 1] == "S" or (kinds[i + 1] == "P" and kinds[i + 2] != "N"):
            cuts |= {i, i + 1}
    places = sorted(cuts | {0, len(word)})
    return tuple(word[a:b] for a, b in pairwise(places))
