"""Porter's stemmer: English words without their endings, so that "motoring" meets "motored" in "motor".

A letter is a vowel (v) if it is one of a, e, i, o, u, or a y after a consonant; all else is a consonant (c).
The measure m of a stem counts the vowels that a consonant follows: tree 0, trouble 1, private 2. Each step
takes the longest ending that it knows, and replaces it if the stem before it is long enough (by m).

Source: Porter 1980, "An algorithm for suffix stripping", Program 14(3), with what NLTK's PorterStemmer()
departs from it in its default mode, which is the stemmer of rouge-score and of NLTK's METEOR:
    words of one or two letters stay; twelve words have a stem of their own (OWN)
    1a, 1b: four letters ending in ies or ied keep ie (dies, died: die); longer ones in ied end in i (spied)
    1b:     hop + e also where the stem is a vowel and a consonant (using: use)
    1c:     y becomes i after a consonant that is not the word's first letter (fly: fli, enjoy: enjoy)
    2:      bli for abli; alli first, its result once more through the step; fulli; logi, whose l counts as
            the stem's (geology: geolog)
"""

import re
from functools import lru_cache

OWN = {
    **dict.fromkeys(("sky", "skies"), "sky"),
    **{"dying": "die", "lying": "lie", "tying": "tie", "news": "news", "howe": "howe"},
    **dict.fromkeys(("inning", "innings"), "inning"),
    **dict.fromkeys(("outing", "outings"), "outing"),
    **dict.fromkeys(("canning", "cannings"), "canning"),
    **{word: word for word in ("proceed", "exceed", "succeed")},
}
STEP2 = {
    **{"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble"},
    **{"alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate"},
    **{"ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al"},
    **{"iviti": "ive", "biliti": "ble", "fulli": "ful"},
}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP4 = {
    **dict.fromkeys(("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment"), ""),
    **dict.fromkeys(("ent", "ion", "ou", "ism", "ate", "iti", "ous", "ive", "ize"), ""),
}


def _ending(rules) -> re.Pattern:
    """Finds the longest ending, as a search finds the match that starts first."""
    return re.compile(f"(?:{'|'.join(rules)})\\Z")


ENDING2, ENDING3, ENDING4 = map(_ending, (STEP2, STEP3, STEP4))


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The stem of a word, in lower case."""
    short, word = len(word) <= 2, word.lower()
    if short or word in OWN:
        return OWN.get(word, word)
    word = _step2(_y(_past(_plural(word))))
    word = _replace(word, ENDING3, STEP3, above=0)
    word = _replace(word, ENDING4, STEP4, above=1)
    return _tidy(word)


def _shape(letters: str) -> str:
    """A "v" for each vowel, a "c" for each consonant."""
    shape = ""
    for letter in letters:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape[-1:] == "c") else "c"
    return shape


def _measure(letters: str) -> int:
    return _shape(letters).count("vc")


def _short(letters: str) -> bool:
    """Whether it ends as "hop" does, in c-v-c but not in w, x or y; or is a vowel and a consonant."""
    shape = _shape(letters)
    return shape == "vc" or (shape.endswith("cvc") and letters[-1] not in "wxy")


def _plural(word: str) -> str:
    """Step 1a."""
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    """Step 1b."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) else word
    stem = word.removesuffix("ed") if word.endswith("ed") else word.removesuffix("ing")
    shape = _shape(stem)
    if stem == word or "v" not in shape:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if shape[-1] == "c" and stem[-2:-1] == stem[-1]:
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if shape.count("vc") == 1 and _short(stem) else stem


def _y(word: str) -> str:
    """Step 1c."""
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and _shape(word)[-2] == "c" else word


def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]):
        return _step2(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) else word
    return _replace(word, ENDING2, STEP2, above=0)


def _replace(word: str, ending: re.Pattern, rules: dict, above: int) -> str:
    """Replaces the ending if the measure of what stands before is above `above`."""
    found = ending.search(word)
    if not found or _measure(stem := word[: found.start()]) <= above:
        return word
    if found[0] == "ion" and stem[-1] not in "st":
        return word
    return stem + rules[found[0]]


def _tidy(word: str) -> str:
    """Step 5: without a last e, and without the second of a last ll."""
    if word.endswith("e"):
        m = _measure(word[:-1])
        word = word[:-1] if m > 1 or (m == 1 and not _short(word[:-1])) else word
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
