"""JSON from files that others wrote: small, shallow, and without what readers disagree about.

A key twice in one table, NaN, Infinity, a float that overflows and whole numbers beyond 64 bits are refused.
Size, depth and the number of values are checked before anything is parsed.
"""

import json
import math

import numpy as np

from minift.models.disk import never_read, open_file

MOST_BYTES = 2**20
MOST_VALUES = 2**16
DEEPEST = 32

# What a byte outside of strings does to the depth, and whether a value stands after it.
DEPTH, VALUE = np.zeros(256, np.int8), np.zeros(256, bool)
DEPTH[list(b"[{")], DEPTH[list(b"]}")], VALUE[list(b"[{,")] = 1, -1, True


def read_json(path, hint: str = "") -> dict:
    """The object that a file holds; `hint` says what to do where the file is missing."""
    with open_file(path, hint) as file:
        data = file.read(MOST_BYTES + 1)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(never_read(path, data) or f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def parse_json(data: bytes):
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES} bytes")
    text = data.decode("utf-8")
    # the pairs of backslashes first, then quotes that belong to a string; what is left are its ends
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    codes = np.frombuffer(outside.encode(), np.uint8)
    if DEPTH[codes].cumsum(dtype=np.int32).max(initial=0) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if VALUE[codes].sum() > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values")
    return DECODER.decode(text)


def _table(pairs: list[tuple]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one table")
    return table


def _constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{digits[:20]}... does not fit 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is beyond the largest float")
    return value


DECODER = json.JSONDecoder(
    object_pairs_hook=_table, parse_constant=_constant, parse_int=_whole, parse_float=_finite
)
