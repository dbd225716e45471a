"""Training rows: JSON lines with the fields `prompt` and `completion`."""

import json
from pathlib import Path

FIELDS = ("prompt", "completion")


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSONL file; an error names the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such data file; give a JSONL file with the fields {' and '.join(FIELDS)}"
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
        rows.append(check_row(row, f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path} is empty; training needs at least one row")
    return rows


def check_row(row, where: str) -> dict:
    """The row, with `where` it came from, or an error that says what it lacks."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with {' and '.join(FIELDS)}")
    for field in FIELDS:
        if field not in row:
            raise ValueError(f"{where}: no field {field!r}; it has {sorted(row)}")
        if not isinstance(row[field], str):
            raise ValueError(f"{where}: {field} is a {type(row[field]).__name__}, not text")
        try:
            row[field].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {field} holds half of a character ({error.reason})") from None
    if not row["completion"].strip():
        raise ValueError(f"{where}: the completion is empty, so there is nothing to learn from it")
    return {**row, "where": where}


def write_rows(path: str | Path, rows: list[dict]) -> None:
    Path(path).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
