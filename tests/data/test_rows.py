"""JSONL rows: what is read, and that every bad input names its file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.data.rows import check_row, read_rows, write_rows

GOOD = '{"prompt": "p", "completion": "c"}'


def write(folder, text: str | bytes):
    path = folder / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


texts = st.text(max_size=30)
learnable = texts.filter(str.strip)


@given(st.lists(st.fixed_dictionaries({"prompt": texts, "completion": learnable}), min_size=1, max_size=5))
def test_written_rows_read_back_and_say_where_they_came_from(folder, rows):
    path = folder / "written.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == [{**row, "where": f"{path}:{i}"} for i, row in enumerate(rows, start=1)]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_a_unicode_line_break_stays_inside_its_row(tmp_path, character):
    row = {"prompt": f"a{character}b", "completion": f"c{character}"}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False) + "\n")
    assert read_rows(path) == [{**row, "where": f"{path}:1"}]


def test_a_carriage_return_between_two_fields_does_not_end_the_row(tmp_path):
    path = write(tmp_path, '{"prompt": "p",\r"completion": "c"}\n' + GOOD)
    assert [row["where"] for row in read_rows(path)] == [f"{path}:1", f"{path}:2"]


def test_rows_may_end_with_carriage_return_and_line_feed(tmp_path):
    path = write(tmp_path, f"{GOOD}\r\n{GOOD}\r\n")
    assert [row["where"] for row in read_rows(path)] == [f"{path}:1", f"{path}:2"]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = write(tmp_path, f"\n  \n{GOOD}\n\n{GOOD}")
    assert [row["where"] for row in read_rows(path)] == [f"{path}:3", f"{path}:5"]


def test_other_fields_are_kept(tmp_path):
    path = write(tmp_path, '{"prompt": "p", "completion": "c", "module": "ast"}')
    assert read_rows(path) == [{"prompt": "p", "completion": "c", "module": "ast", "where": f"{path}:1"}]


BAD_LINES = {
    "cut off": ('{"prompt": "p"', "not JSON"),
    "nested too deeply": ("[" * 100_000, "not JSON"),
    "a list": ("[]", "a list, not an object"),
    "null": ("null", "a NoneType, not an object"),
    "no prompt": ('{"completion": "c"}', "no field 'prompt'.*'completion'"),
    "no completion": ('{"prompt": "p", "answer": "c"}', "no field 'completion'.*'answer', 'prompt'"),
    "prompt not text": ('{"prompt": 1, "completion": "c"}', "prompt is a int, not text"),
    "completion not text": ('{"prompt": "p", "completion": ["c"]}', "completion is a list, not text"),
    "empty completion": ('{"prompt": "p", "completion": ""}', "completion is empty"),
    "blank completion": ('{"prompt": "p", "completion": " \\n\\t"}', "completion is empty"),
    "half a character": ('{"prompt": "\\ud800", "completion": "c"}', "prompt"),
}


@pytest.mark.parametrize("line, reason", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_names_file_and_line(tmp_path, line, reason):
    path = write(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{reason}") as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_a_missing_file_is_named_with_the_form_it_should_have(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such data file; .* prompt and completion"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_a_folder_is_no_data_file(tmp_path):
    with pytest.raises(ValueError, match="no such data file"):
        read_rows(tmp_path)


@pytest.mark.parametrize("content", [GOOD.encode("utf-16"), b'{"prompt": "\xe9", "completion": "c"}'])
def test_a_file_that_is_not_utf8_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"rows\.jsonl is not UTF-8 text"):
        read_rows(write(tmp_path, content))


@pytest.mark.parametrize("content", ["", "\n\n", " \t \n"])
def test_a_file_without_rows_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty"):
        read_rows(write(tmp_path, content))


def test_checking_a_row_leaves_the_given_one_alone():
    row = {"prompt": "p", "completion": "c"}
    assert check_row(row, "row 0") == {**row, "where": "row 0"}
    assert "where" not in row
