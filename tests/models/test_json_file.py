"""JSON of others: what is read is what the standard library reads, and what is refused is refused by name."""

import json
import os
from contextlib import suppress

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minift.models.json_file import DEEPEST, MOST_BYTES, MOST_VALUES, parse_json, read_json

leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8)
leaves |= st.floats(allow_nan=False, allow_infinity=False)
documents = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
)


@settings(max_examples=100)
@given(documents, st.booleans(), st.sampled_from([None, 1]))
def test_what_is_within_the_caps_reads_as_the_standard_library_reads_it(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair is no UTF-8
        return
    assert parse_json(data) == json.loads(text)


@settings(max_examples=300)
@given(st.binary(max_size=40) | st.text('[]{}",:\\1-.eE+ aNIu0', max_size=40).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"1" * 5000)
@example(b"\xff\xfe")
@example(b'"\\ud800"')
@example(b"\xef\xbb\xbf{}")
def test_any_bytes_are_a_value_or_a_value_error(data):
    with suppress(ValueError):
        parse_json(data)


def nested(depth, text='""'):
    return ("[" * depth + text + "]" * depth).encode()


@settings(max_examples=200)
@given(st.text('\\"[]{}a', max_size=12))
def test_depth_counts_brackets_and_not_what_texts_hold(text):
    assert parse_json(nested(DEEPEST, json.dumps(text)))
    with pytest.raises(ValueError, match=f"nested more than {DEEPEST} deep"):
        parse_json(nested(DEEPEST + 1, json.dumps(text)))


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "the key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[Infinity]", "Infinity is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"[1e999]", "1e999 is beyond the largest float"),
        (b"[9223372036854775808]", "does not fit 64 bits"),
        (b"[-9223372036854775809]", "does not fit 64 bits"),
        (b"[" + b"9" * 100_000 + b"]", "does not fit 64 bits"),
        (b"[" + b"1," * MOST_VALUES + b"1]", f"more than {MOST_VALUES} values"),
        (b'{"a": [' + b"[]," * MOST_VALUES + b"[]]}", f"more than {MOST_VALUES} values"),
        (b'"' + b"a" * MOST_BYTES + b'"', f"longer than {MOST_BYTES} bytes"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"\xef\xbb\xbf{}", "Expecting value"),
        (b'{"a": 1} {', "Extra data"),
        (b"", "Expecting value"),
    ],
)
def test_what_readers_disagree_about_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_a_file_that_is_no_table_is_refused_by_its_name(tmp_path):
    path = tmp_path / "some.json"
    with pytest.raises(ValueError, match=r"some\.json is missing; fetch it"):
        read_json(path, "fetch it")
    for data, message in [
        (b"[1]", "some.json holds a list, not a JSON object"),
        (b"{", "some.json is not JSON: Expecting"),
        (b"\x80\x04K\x01.", "some.json is a pickle, whatever its name says"),
        (b"PK\x03\x04" + bytes(30), "some.json is a zip archive"),
        (bytes(257) + b"ustar", "some.json is a tar archive"),
        (b" " * MOST_BYTES + b"{}", f"longer than {MOST_BYTES} bytes"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    path.write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, 2.5, None, "é"]}


def test_links_pipes_and_folders_are_not_opened(tmp_path):
    (tmp_path / "there").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("link", "is a link, and links are not followed"),
        ("nowhere", "is a link"),
        ("pipe", "is no regular file"),
        (".", "is no regular file"),
        ("there/beneath", "cannot be read: Not a directory"),
        ("a" * 300, "cannot be read: File name too long"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name)
