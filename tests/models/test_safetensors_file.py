"""Our reader and writer of safetensors against the library's, and what ours refuses before it maps a file."""

import json
import math
import re

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import survives
from safetensors.torch import load_file, save_file

import minift
from minift.models import safetensors_file
from minift.models.safetensors_file import (
    ADAPTER_HEADER_BYTES,
    DTYPES,
    open_safetensors,
    read_tensors,
    write_safetensors,
)


def tensor(dtype, shape):
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    raw = raw % 2 if dtype is torch.bool else raw
    return raw.view(dtype).view(shape)


def same(a, b):
    """Dtype, shape and bytes: NaNs have no other equality."""
    flat = (x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def same_tables(a, b):
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


names = st.text("abc.é_", min_size=1, max_size=9)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tables = st.dictionaries(names, st.builds(tensor, st.sampled_from(list(DTYPES.values())), shapes), max_size=6)
facts = st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3).filter(
    lambda f: all(text.isascii() or text.isprintable() for pair in f.items() for text in pair)
)


@settings(max_examples=60)
@given(tables, facts)
def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path_factory, table, facts):
    ours, theirs = (tmp_path_factory.mktemp("st") / name for name in ("ours", "theirs"))
    write_safetensors(ours, table, facts)
    assert same_tables(load_file(ours), table)
    save_file(table, theirs, facts or None)  # with {} the library writes what it cannot read
    for path in (ours, theirs):
        tensors, metadata = read_tensors(path)
        assert same_tables(tensors, table) and metadata == facts


@settings(max_examples=50)
@given(st.builds(tensor, st.sampled_from([torch.float32, torch.bfloat16]), shapes.filter(len)), st.data())
def test_rows_are_slices_also_between_the_multiples_of_an_item(tmp_path_factory, stored, data):
    path, filler = tmp_path_factory.mktemp("st") / "m", data.draw(st.integers(0, 7))  # bytes before it
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, stored.shape[0])] * 2)))
    entries = {"a": ("U8", [filler]), "b": ({4: "F32", 2: "BF16"}[stored.dtype.itemsize], list(stored.shape))}
    path.write_bytes(file_of(header_of(entries), torch.zeros(filler, dtype=torch.uint8), stored))
    tensors, _ = open_safetensors(path)
    assert same(tensors["b"].rows(start, stop), stored[start:stop]) and tensors["b"].shape == stored.shape


def header_of(entries):
    """Name -> (dtype, shape), one behind the other."""
    table, end = {}, 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return table


def file_of(header, *tensors):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).tolist()) for t in tensors)
    return len(text).to_bytes(8, "little") + text + data


def test_rows_are_views_of_the_file_and_writing_to_them_leaves_it(tmp_path):
    write_safetensors(tmp_path / "m", {"a": torch.zeros(4, 3)}, {})
    stored = open_safetensors(tmp_path / "m")[0]["a"]
    first, again = stored.rows(0, 4), stored.rows(2, 4)
    assert first[2:].data_ptr() == again.data_ptr()
    first.fill_(1)
    assert again.sum() == 6 and not read_tensors(tmp_path / "m")[0]["a"].any()


def test_the_same_tensors_give_the_same_bytes_each_at_a_multiple_of_its_item(tmp_path):
    table = {name: tensor(dtype, (3,)) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "a", table, {"x": "1", "b": "2"})
    write_safetensors(tmp_path / "b", dict(reversed(table.items())), {"b": "2", "x": "1"})
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name in DTYPES:
            assert (8 + length + entry["data_offsets"][0]) % DTYPES[name].itemsize == 0


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes):
    return {"a": {**F32, **changes}}


def long_name(length):
    return {"n" * length: F32}


REFUSED = [
    (entry(dtype="F128"), "dtype 'F128'; known: BOOL"),
    (entry(dtype=["F32"]), "dtype"),
    (entry(shape=[1]), r"a is F32 \[1\] in 8 bytes"),
    (entry(dtype="F64"), r"a is F64 \[2\] in 8 bytes"),
    (entry(shape=[3]), r"a is F32 \[3\] in 8 bytes"),
    (entry(shape=[2.0]), "shape"),
    (entry(shape=[True, 2]), "shape"),
    (entry(shape=[-1, -2]), "shape"),
    (entry(shape="2"), "shape"),
    (entry(shape=[1] * 8 + [2]), "at most 8 sizes"),
    (entry(shape=[2**31 + 1, 0]), "shape"),
    (entry(shape=[0, *[2**31] * 7], data_offsets=[0, 0]), "more than any memory"),
    (entry(data_offsets=[0, 9]), "lies at"),
    (entry(data_offsets=[8, 0]), "in -8 bytes"),
    (entry(data_offsets=[0, 8, 8]), "lies at"),
    (entry(data_offsets=[-8, 0]), "lies at"),
    (entry(data_offsets=[0, True]), "lies at"),
    (entry(extra=1), "is not dtype, shape and data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "is not dtype, shape and data_offsets"),
    ({"a": 5}, "is not dtype, shape and data_offsets"),
    ({}, "end at byte 0 of 8"),
    (entry(shape=[1], data_offsets=[0, 4]), "end at byte 4 of 8"),
    (entry(shape=[1], data_offsets=[4, 8]), "a begins at byte 4, where 0 is next"),
    ({**entry(), "b": {**F32, "shape": [1], "data_offsets": [4, 8]}}, "b begins at byte 4, where 8 is next"),
    ({"__metadata__": {"a": 1}, **entry()}, "no table of texts"),
    ({"__metadata__": [], **entry()}, "no table of texts"),
    ({"__metadata__": {"a": "\ud800"}, **entry()}, "surrogates not allowed"),
    ({"__metadata__": {"a": "x" * 2**18}, **entry()}, "no JSON from byte"),
    ({"a\n": F32}, "printable"),
    ({"a\x00b": F32}, "printable"),
    ({"\ud800": F32}, "printable"),
    ({"": F32}, "printable"),
    (long_name(513), "printable"),
    (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), "a stands in it twice"),
    (b'{"__metadata__":{},"__metadata__":{},"a":%b}' % json.dumps(F32).encode(), "__metadata__ stands in it"),
    (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "the key 'dtype' stands twice"),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e999]}}', "beyond the largest float"),
    (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN"),
    (b"[1]", "no JSON object"),
    (b" " + json.dumps(entry()).encode(), "no JSON object"),
    (json.dumps(entry()).encode() + b"x", "goes on after"),
    (json.dumps(entry()).encode()[:-1], "no JSON object"),
    (json.dumps(entry()).encode()[:-1] + b",}", "no JSON object"),
    (b'{"a"' + json.dumps(F32).encode() + b"}", "no JSON object"),
    (b"{5:1}", "printable"),
    (b'{"\xff":%b}' % json.dumps(F32).encode(), "printable"),
    (b'{"a":' + b"[" * 100_000, "no JSON from byte"),
    (b'{"__metadata__":' + b"[" * 100_000, "nested too deep"),
]


@pytest.mark.parametrize("header, message", REFUSED, ids=range(len(REFUSED)))
def test_a_header_that_does_not_say_what_the_file_holds_is_refused(tmp_path, header, message):
    (tmp_path / "m").write_bytes(file_of(header, torch.zeros(2)))
    with pytest.raises(ValueError, match=f"m is damaged or truncated: .*{message}"):
        open_safetensors(tmp_path / "m")


def test_the_caps_are_inclusive(tmp_path):
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    (tmp_path / "m").write_bytes(
        file_of({**long_name(512), "b": {**empty, "shape": [0] * 8}}, torch.zeros(2))
    )
    assert len(open_safetensors(tmp_path / "m")[0]) == 2
    (tmp_path / "m").write_bytes(file_of({str(i): empty for i in range(2**16 + 1)}))
    with pytest.raises(ValueError, match="more than 65536 tensors"):
        open_safetensors(tmp_path / "m")
    hidden = json.dumps({str(i): empty for i in range(2**12 + 1)}).replace("data_", "data\\u005f").encode()
    (tmp_path / "m").write_bytes(file_of(hidden))
    with pytest.raises(ValueError, match="more than 4096 tensors"):
        read_tensors(tmp_path / "m")
    many = {f"{i:0512}": empty for i in range(ADAPTER_HEADER_BYTES // 512)}
    (tmp_path / "m").write_bytes(file_of(many))
    assert open_safetensors(tmp_path / "m")[0].keys() == many.keys()
    with pytest.raises(ValueError, match=f"at most {ADAPTER_HEADER_BYTES} are read"):
        read_tensors(tmp_path / "m")


@pytest.mark.parametrize("start, kind", [(b"\x80\x02}", "a pickle"), (b"PK\x03\x04", "a zip archive")])
def test_another_kind_of_file_is_named(tmp_path, start, kind):
    (tmp_path / "m.safetensors").write_bytes(start + bytes([1] * 600))
    with pytest.raises(ValueError, match=f"m.safetensors is {kind}, whatever its name says; .*never read"):
        open_safetensors(tmp_path / "m.safetensors")
    text = json.dumps(F32).encode()  # a header may be as long as the first bytes of a pickle say
    header = b'{"a":' + text + b" " * (0x280 - len(text) - 6) + b"}"
    (tmp_path / "m.safetensors").write_bytes(file_of(header, torch.ones(2)))
    assert (tmp_path / "m.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(read_tensors(tmp_path / "m.safetensors")[0]["a"], torch.ones(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("model"), tiny_llama(num_hidden_layers=1)
    minift.save_model(model, folder)
    return folder, model, (folder / "model.safetensors").read_bytes()


places = st.floats(0, 1, exclude_max=True)
bytes_of_json = st.text('[]{}",:0123456789abnFIU\\ \n\x00', min_size=1, max_size=3).map(str.encode)
edits = st.tuples(places, st.sampled_from([0, 1, 2, 8]), bytes_of_json | st.just(b""))


@settings(max_examples=200)
@given(st.lists(edits, max_size=3), st.booleans(), st.integers(-9, 9))
def test_a_changed_file_is_the_same_model_or_a_value_error(saved, edits, fits, tail):
    """Bytes of the header replaced, left out and put in, its size with them or not; bytes at the end."""
    folder, model, original = saved
    length = int.from_bytes(original[:8], "little")
    header, data = original[8 : 8 + length], original[8 + length :]
    for place, out, new in edits:
        at = int(place * len(header))
        header = header[:at] + new + header[at + out :]
    data = data + bytes(tail) if tail > 0 else data[: len(data) + tail]
    size = len(header) if fits else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)
    try:
        loaded = minift.load_model(folder)
    except ValueError:
        return
    assert same_tables(dict(loaded.named_parameters()), dict(model.named_parameters()))


def test_a_folder_may_be_a_link_and_its_files_may_not(saved, tmp_path):
    folder, model, original = saved
    (folder / "model.safetensors").write_bytes(original)
    (tmp_path / "folder").symlink_to(folder)
    loaded = minift.load_model(tmp_path / "folder")
    assert same_tables(dict(loaded.named_parameters()), dict(model.named_parameters()))
    (tmp_path / "snapshot").mkdir()  # as in the cache of Hugging Face
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(folder / name)
    with pytest.raises(
        ValueError, match=r"is a link, .*copy the folder with the files in their place \(cp -rL\)"
    ):
        minift.load_model(tmp_path / "snapshot")


def test_whole_numbers_may_stand_where_the_family_does_not_look(saved):
    folder, model, original = saved
    length = int.from_bytes(original[:8], "little")
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]
    offsets = [len(data), len(data) + 32]
    for name, message in [("model.layers.0.self_attn.rotary_emb.inv_freq", ""), ("x", "unexpected x")]:
        table = {**header, name: {"dtype": "I64", "shape": [4], "data_offsets": offsets}}
        text = json.dumps(table).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(32))
        if message:
            with pytest.raises(ValueError, match=message):
                minift.load_model(folder)
        else:
            loaded = minift.load_model(folder)
            assert same_tables(dict(loaded.named_parameters()), dict(model.named_parameters()))


def test_mutants_of_the_checks_are_noticed(tmp_path):
    def check(module):
        for header, message in REFUSED:
            (tmp_path / "m").write_bytes(file_of(header, torch.zeros(2)))
            try:
                module.open_safetensors(tmp_path / "m")
            except ValueError as error:
                assert re.search(message, str(error))
            else:
                raise AssertionError

    for old, new in [
        ("if begin != end:", "if begin > end:"),
        ("if end != size:", "if end > size:"),
        ("if name in entries or", "if"),
        ("offsets[1] - offsets[0] != count * item", "offsets[1] - offsets[0] < count * item"),
        ("type(v) is int and 0 <= v <= largest", "isinstance(v, int) and 0 <= v <= largest"),
        ("type(v) is int and 0 <= v <= largest", "type(v) is int and v <= largest"),
        (" or len(shape) > MOST_DIMENSIONS", ""),
        ('if not header.startswith(b"{")', 'if b"{" not in header'),
        ("if _after(header, at + 1) != len(header):", "if at > len(header):"),
        ("or not name.isprintable() ", ""),
        ("(json.JSONDecodeError, RecursionError)", "json.JSONDecodeError"),
    ]:
        assert not survives(check, safetensors_file, old, new), (old, new)
