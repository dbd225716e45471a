"""What every metric asks of its input; a failure is a ValueError that names value, row and the fix."""

import warnings

import numpy as np


class MetricWarning(UserWarning):
    """The score holds by convention only, as a precision where nothing was predicted."""


def warn(sentence: str) -> None:
    warnings.warn(sentence, MetricWarning, stacklevel=4)


def vector(values, name: str) -> np.ndarray:
    """One entry for each row, at least one row."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; give one value for each row")
    if not len(array):
        raise ValueError(f"{name} is empty; give at least one row")
    return array


def numbers(values, name: str) -> np.ndarray:
    """A vector of finite float64."""
    return finite(vector(values, name), name)


def finite(array: np.ndarray, name: str) -> np.ndarray:
    """float64 of any shape without NaN or infinity."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {array.dtype}; give numbers")
    array = array.astype(np.float64, copy=False)
    with np.errstate(all="ignore"):  # the sum of finite numbers may overflow
        whole = array.sum()
    if not np.isfinite(whole) and not (good := np.isfinite(array)).all():
        at = np.unravel_index(np.argmin(good), array.shape)
        raise ValueError(f"{name}{list(map(int, at))} is {array[at]}; give finite numbers")
    return array


def scores(values, name: str) -> np.ndarray:
    """Finite numbers of their own dtype, one for each row or (rows, columns)."""
    array = np.asarray(values)
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
        if not (whole := array == np.floor(array)).all() or np.isinf(array).any():
            row = int(np.argmin(whole & np.isfinite(array)))
            raise ValueError(
                f"{name}[{row}] is {array[row]}, which is no label; give whole numbers or strings"
            )
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
            f"y_true holds {y_true.dtype}, as {y_true[0]!r}, and y_pred {y_pred.dtype}, as {y_pred[0]!r}; "
            "give labels of one kind"
        )
    return y_true, y_pred


def choice(value, allowed, name: str) -> None:
    if value not in allowed:
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
    return hypotheses, rows
