"""Rows from JSON lines: `prompt` and `completion`, or `text` and `label` (and `text_pair`, if there is one).

A label is a number or the name of a class; the rows of one file have one of the two.
"""

import difflib
import json
from pathlib import Path

FIELDS = ("prompt", "completion")
LABELLED = ("text", "label")
MOST_LABELS = 2**16
LARGEST = (2 - 2**-23) * 2.0**127  # of fp32, which is what a number to predict becomes


def read_rows(path: str | Path, fields: tuple[str, ...] = FIELDS) -> list[dict]:
    """The rows of a JSONL file; an error names the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such data file; give a JSONL file with the fields {' and '.join(fields)}"
        )
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        rows.append(check_row(row, f"{path}:{number}", fields))
    if not rows:
        raise ValueError(f"{path} is empty; training needs at least one row")
    return rows


def check_row(row, where: str, fields: tuple[str, ...] = FIELDS) -> dict:
    """The row, with `where` it came from, or an error that says what it lacks."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with {' and '.join(fields)}")
    for field in fields:
        if field not in row:
            raise ValueError(f"{where}: no field {field!r}; it has {sorted(row)}")
    for field in fields if fields == FIELDS else ("text", "text_pair"):
        if field in row:
            _check_text(row[field], field, where)
    if fields == FIELDS and not row["completion"].strip():
        raise ValueError(f"{where}: the completion is empty, so there is nothing to learn from it")
    if fields == LABELLED:
        _check_label(row["label"], where)
    return {**row, "where": where}


def _check_text(value, field: str, where: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} is a {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {field} holds half of a character ({error.reason})") from None


def _check_label(label, where: str) -> None:
    if isinstance(label, str):
        _check_text(label, "label", where)
        if not label.strip():
            raise ValueError(f"{where}: the label is an empty text")
    elif not isinstance(label, int | float) or isinstance(label, bool):
        raise ValueError(f"{where}: label is a {type(label).__name__}, not a number or a text")
    elif not -LARGEST <= label <= LARGEST:
        raise ValueError(f"{where}: label is {label}, not a finite number of fp32")


def label_arguments(rows: list[dict]) -> dict:
    """What a new classifier of these rows has: {"labels": sorted names}, or {"num_labels": largest + 1}."""
    _check_one_kind(rows)
    if isinstance(rows[0]["label"], str):
        found = {"labels": tuple(sorted({row["label"] for row in rows}))}
    else:
        found = {"num_labels": 1 + max(_whole(row, MOST_LABELS) for row in rows)}
    if found.get("num_labels", len(found.get("labels", ()))) < 2:
        raise ValueError(
            f"every row has the label {rows[0]['label']!r}; a classifier needs two labels or more, and "
            "head 'regression' takes numbers"
        )
    return found


def label_targets(rows: list[dict], labels: tuple[str, ...]) -> list[int | float]:
    """The class of each row among a model's `labels`, by name or by number; the number itself of one."""
    _check_one_kind(rows)
    if len(labels) == 1:
        return [_number(row) for row in rows]
    if not isinstance(rows[0]["label"], str):
        return [_whole(row, len(labels)) for row in rows]
    numbers = {name: i for i, name in enumerate(labels)}
    for row in rows:
        if row["label"] not in numbers:
            close = difflib.get_close_matches(row["label"], labels, n=3, cutoff=0)
            raise ValueError(
                f"{row['where']}: label {row['label']!r} is none of the model's {len(labels)} labels; "
                f"nearest: {', '.join(map(repr, close))}"
            )
    return [numbers[row["label"]] for row in rows]


def _check_one_kind(rows: list[dict]) -> None:
    kind = isinstance(rows[0]["label"], str)
    for row in rows:
        if isinstance(row["label"], str) != kind:
            raise ValueError(
                f"{row['where']}: label {row['label']!r} is a {'number' if kind else 'text'}, and that of "
                f"{rows[0]['where']} is a {'text' if kind else 'number'}; give all labels in one of the two"
            )


def _whole(row: dict, count: int) -> int:
    label = row["label"]
    if label != int(label) or not 0 <= label < count:
        raise ValueError(
            f"{row['where']}: label {label!r} is not a whole number from 0 to {count - 1}; head 'regression' "
            "takes any finite number"
        )
    return int(label)


def _number(row: dict) -> float:
    if isinstance(row["label"], str):
        raise ValueError(
            f"{row['where']}: label {row['label']!r} is a text, and the model has one output, a number"
        )
    return float(row["label"])


def write_rows(path: str | Path, rows: list[dict]) -> None:
    Path(path).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
