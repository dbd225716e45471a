"""What every metric asks of its input; a failure is a ValueError that names value, row and the fix."""

import os
import sys
import warnings
from collections.abc import Mapping, Set
from pathlib import Path

import numpy as np

HERE = str(Path(__file__).parents[1]) + os.sep
WHOLE = 1 << 53  # doubles count without gaps up to here


class MetricWarning(UserWarning):
    """The score holds by convention only, as a precision where nothing was predicted."""


def warn(sentence: str) -> None:
    """A MetricWarning at the line that called into minift, so that each such line is heard."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(sentence, MetricWarning, stacklevel=level)


def vector(values, name: str) -> np.ndarray:
    """One entry for each row, at least one row."""
    array = array_of(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; give one value for each row")
    if not len(array):
        raise ValueError(f"{name} is empty; give at least one row")
    return array


def array_of(values, name: str) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array; give the rows that are not masked")
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name} has rows of different lengths; give one value, or one list of equal length, a row"
        ) from None


def listed(values, name: str) -> list:
    """A list of what has an entry for each row: no string, no mapping, no set."""
    if isinstance(values, (str, bytes, Mapping, Set)) or not np.iterable(values):
        raise ValueError(f"{name} is {values!r:.60}; give a list with an entry for each row")
    return list(values)


def numbers(values, name: str) -> np.ndarray:
    """A vector of finite float64."""
    return finite(vector(values, name), name)


def finite(array: np.ndarray, name: str) -> np.ndarray:
    """float64 of any shape without NaN or infinity."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype}; give numbers")
    if array.dtype.kind in "iu" and array.size and max(int(array.max()), -int(array.min())) > WHOLE:
        raise ValueError(
            f"{name} has integers beyond 2^53, which doubles cannot tell apart; give smaller ones"
        )
    array = array.astype(np.float64, copy=False)
    with np.errstate(all="ignore"):  # the sum of finite numbers may overflow
        whole = array.sum()
    if not np.isfinite(whole) and not (good := np.isfinite(array)).all():
        at = np.unravel_index(np.argmin(good), array.shape)
        raise ValueError(f"{name}{list(map(int, at))} is {array[at]}; give finite numbers")
    return array


def scores(values, name: str) -> np.ndarray:
    """Finite numbers of their own dtype, one for each row or (rows, columns)."""
    array = array_of(values, name)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; give (rows,) or (rows, columns), at least one row")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        finite(array, name)
    return array


def probabilities(array: np.ndarray, name: str) -> np.ndarray:
    """Floats from 0 to 1, (rows,) or (rows, classes) with rows that sum to 1."""
    if (wrong := (array < 0) | (array > 1)).any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"{name}{list(at)} is {array[at]}; give probabilities, from 0 to 1")
    if array.dtype.kind != "f":
        array = array.astype(np.float64)
    sums = array.sum(axis=1, dtype=np.float64) if array.ndim == 2 else np.ones(1)
    if (wrong := np.abs(sums - 1) > 1e-8 + np.sqrt(np.finfo(array.dtype).eps)).any():  # scikit-learn's bound
        row = int(np.argmax(wrong))
        raise ValueError(f"{name}[{row}] sums to {float(sums[row])}; give rows that sum to 1")
    return array


def labels(values, name: str) -> np.ndarray:
    """A vector of labels, one kind in all rows: integers, booleans, strings, or floats without a fraction."""
    array = vector(values, name)
    if array.dtype.kind == "U" and not isinstance(values, np.ndarray):
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(f"{name}[{row}] is {value!r} among strings; give labels of one kind")
    if array.dtype.kind == "f":
        if not (good := (array == np.floor(array)) & (np.abs(array) < WHOLE)).all():
            row = int(np.argmin(good))
            raise ValueError(
                f"{name}[{row}] is {array[row]}, which is no label; give integers, strings, or whole "
                "floats below 2^53"
            )
    elif array.dtype.kind == "u":
        if int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"{name} has a label of {array.max()}; give labels below 2^63")
        array = array.astype(np.int64)
    elif array.dtype.kind == "O" and all(isinstance(value, str) for value in array):
        array = array.astype(str)
    elif array.dtype.kind not in "biuU":
        raise ValueError(f"{name} holds {array.dtype}; give integers, booleans or strings")
    return array


def same_rows(one, other, names: tuple[str, str]) -> None:
    if len(one) != len(other):
        raise ValueError(
            f"{names[0]} has {len(one)} rows and {names[1]} {len(other)}; give one of each for each row"
        )


def label_rows(y_true, y_pred) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of labels of one kind."""
    y_true, y_pred = labels(y_true, "y_true"), labels(y_pred, "y_pred")
    same_rows(y_true, y_pred, ("y_true", "y_pred"))
    if (y_true.dtype.kind == "U") != (y_pred.dtype.kind == "U"):
        raise ValueError(
            f"y_true holds {y_true.dtype}, as {y_true[0].item()!r}, and y_pred {y_pred.dtype}, as "
            f"{y_pred[0].item()!r}; give labels of one kind"
        )
    kinds = {y_true.dtype.kind, y_pred.dtype.kind}
    if kinds == {"i", "f"}:  # numpy makes them all floats
        for name, side in (("y_true", y_true), ("y_pred", y_pred)):
            finite(side, name)
    return y_true, y_pred


def whole(value, name: str, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")


def flag(value, name: str) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}; give True or False")


def choice(value, allowed, name: str) -> None:
    if not isinstance(value, (str, bool, type(None))) or value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, allowed))}")


def texts(values, name: str) -> list[str]:
    """A text for each row, at least one row."""
    if isinstance(values, str):
        raise ValueError(f"{name} is one string, {values[:40]!r}; give a list with one text for each row")
    if not np.iterable(values):
        raise ValueError(f"{name} is {values!r}; give a list with one text for each row")
    values = list(values)
    if not values:
        raise ValueError(f"{name} is empty; give at least one text")
    for row, text in enumerate(values):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{row}] is {text!r}; give a string")
    return values


def text_rows(hypotheses, references, name: str = "hypotheses") -> tuple[list[str], list[list[str]]]:
    """A text for each row, and for each row a list of one or more references.

    `references` holds a string or a list of strings for each row, and not, as sacrebleu's do, for each
    set of references a list with a string for each row.
    """
    hypotheses = texts(hypotheses, name)
    if isinstance(references, str):
        raise ValueError(f"references is one string, {references[:40]!r}; give a list with one for each row")
    if not np.iterable(references):
        raise ValueError(f"references is {references!r}; give a list with one for each row")
    references = list(references)
    if len(references) != len(hypotheses):
        streams = all(isinstance(r, (list, tuple)) and len(r) == len(hypotheses) for r in references)
        hint = "; these look like sacrebleu's streams: give list(zip(*references))" if streams else ""
        raise ValueError(
            f"{len(hypotheses)} {name} and {len(references)} references; give for each row one reference or "
            f"a list of its references{hint if references else ''}"
        )
    rows = []
    for row, own in enumerate(references):
        own = [own] if isinstance(own, str) else list(own) if np.iterable(own) else []
        if not own or not all(isinstance(text, str) for text in own):
            raise ValueError(f"references[{row}] is {references[row]!r}; give a string, or a list of strings")
        rows.append(own)
    if len(rows) > 1 and all(not isinstance(r, str) and len(r) == len(rows) for r in references):
        warn(
            f"each of {len(rows)} rows has {len(rows)} references; if these are sacrebleu's streams, give "
            "list(zip(*references))"
        )
    return hypotheses, rows
