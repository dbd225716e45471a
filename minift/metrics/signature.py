"""The line that says how a score was computed, with the fields and the order of sacrebleu's."""

import sys
from collections import Counter

VERSION = sys.modules["minift"].__version__


class Result:
    """What has a score beside other things: float() gives it, and f"{result:.2f}" writes it."""

    score: float

    def __float__(self) -> float:
        return self.score

    def __format__(self, spec: str) -> str:
        return format(self.score, spec) if spec else str(self)


def signature(references: Counter, **fields) -> str:
    """`references`: how many rows have 1, 2, ... references.

    >>> signature(Counter({1: 20}), case="mixed")  # doctest: +ELLIPSIS
    'nrefs:1|case:mixed|version:minift-...'
    """
    nrefs = next(iter(references)) if len(references) == 1 else "var"
    fields = {"nrefs": nrefs, **fields, "version": f"minift-{VERSION}"}
    return "|".join(f"{name}:{value}" for name, value in fields.items())


def case(lowercase: bool) -> str:
    return "lc" if lowercase else "mixed"


def yes(value: bool) -> str:
    return "yes" if value else "no"
