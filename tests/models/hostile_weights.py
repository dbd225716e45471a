"""Hostile safetensors files: headers that lie about what follows them, bombs, and weights that are none."""

import json

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def parts(file: bytes):
    """(header, bytes of the tensors) of a valid file."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, file[8 + length :]


def built(header, data: bytes, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def weight_files(file: bytes, most: int):
    """Name -> bytes of a file that is none, or of another model; `most`: the largest header that is read."""
    header, data = parts(file)
    name, text, size = next(iter(header)), json.dumps(header).encode(), len(data)
    for cut in (0, 1, 7, 8, 9, 50, len(file) - size - 1, len(file) - size, len(file) - 1):
        yield f"cut at {cut}", file[:cut]
    yield "a byte more", file + b"x"
    for length in (0, 1, len(text) - 1, len(text) + 1, len(text) + size, 10**8, 2**31, 2**63, 2**64 - 1):
        yield f"header of {length}", built(text, data, length)
    for what, change in entry_changes(header[name]["data_offsets"], size).items():
        yield what, built({**header, name: {**header[name], **change}}, data)
    for what, change in table_changes(name).items():
        yield what, built({**header, **change}, data)
    yield "nothing", built({}, b"")
    yield "a tensor less", built({n: e for n, e in header.items() if n != name}, data)
    for what, raw in {**texts(text, name, header[name]), **bombs(most)}.items():
        yield f"header: {what}", built(raw, data)
    for what, value in {"NaN": b"\0\0\xc0\x7f", "Inf": b"\0\0\x80\x7f", "-Inf": b"\0\0\x80\xff"}.items():
        yield f"weights: {what}", built(header, data[:-4] + value)


def entry_changes(offsets: list[int], size: int) -> dict[str, dict]:
    """Fields of a tensor's entry that are not those of the tensor."""
    return {
        "dtype unknown": {"dtype": "F128"},
        "dtype a list": {"dtype": ["F32"]},
        "dtype in words": {"dtype": "os.system"},
        "whole numbers": {"dtype": "I32"},
        "complex": {"dtype": "C64"},
        "no shape": {"shape": None},
        "a shape in words": {"shape": "16"},
        "a shape of floats": {"shape": [16.0]},
        "negative": {"shape": [-1, -1]},
        "flags": {"shape": [True]},
        "shape 2^62": {"shape": [2**62, 4]},
        "nothing of 2^62": {"shape": [0, 2**62]},
        "an overflow": {"shape": [2**31, 2**31, 4]},
        "a shape of shapes": {"shape": [[16]]},
        "nothing that overflows": {"shape": [0, *[2**31] * 7], "data_offsets": [0, 0]},
        "rank 9": {"shape": [1] * 9},
        "rank 100,000": {"shape": [1] * 100_000},
        "another shape": {"shape": [1, 2, 3]},
        "reversed": {"data_offsets": offsets[::-1]},
        "offsets of floats": {"data_offsets": [0.0, 64.0]},
        "before the file": {"data_offsets": [-64, 0]},
        "behind the file": {"data_offsets": [size, size + 64]},
        "offsets of 2^63": {"data_offsets": [2**63, 2**63 + 64]},
        "three offsets": {"data_offsets": [0, 1, 2]},
        "no offsets": {"data_offsets": None},
        "on another": {"data_offsets": [8, 8 + size // 2]},
        "more": {"x": 1},
    }


def table_changes(name: str) -> dict[str, dict]:
    """Entries that no header has, or that belong to no model."""
    return {
        "a list for an entry": {name: []},
        "a number for an entry": {name: 5},
        "an entry without fields": {name: {}},
        "metadata a list": {"__metadata__": []},
        "metadata of numbers": {"__metadata__": {"a": 1}},
        "metadata of 300 KB": {"__metadata__": {"a": "x" * 300_000}},
        "metadata in metadata": {"__metadata__": {"a": {}}},
        "an unknown tensor": {"x.weight": EMPTY},
        "a path for a name": {"../../x": EMPTY},
        "no name": {"": EMPTY},
        "NUL in a name": {"a\0b": EMPTY},
        "a line in a name": {"a\nb": EMPTY},
        "half a character": {"\ud800": EMPTY},
        "a name of 600": {"n" * 600: EMPTY},
        "65,537 tensors": {str(i): EMPTY for i in range(65_537)},
        "a quant_state of nothing": {"x.weight.quant_state.bitsandbytes__nf4": EMPTY},
        "another quant_state": {"x.weight.quant_state.bitsandbytes__os": {**EMPTY, "dtype": "U8"}},
    }


def texts(text: bytes, name: str, entry: dict) -> dict[str, bytes]:
    """Headers that are no JSON, or not the only one that they could be."""
    return {
        "a name twice": b"%b,%b}" % (text[:-1], json.dumps({name: entry}).encode()[1:-1]),
        "metadata twice": b'{"__metadata__":{},"__metadata__":{}}',
        "a field twice": text.replace(b'"shape"', b'"dtype"', 1),
        "NaN": text.replace(b"[0,", b"[NaN,", 1),
        "a list": b"[%b]" % text,
        "a space first": b" " + text,
        "a mark first": b"\xef\xbb\xbf" + text,
        "NULs": bytes(99),
        "more behind it": text + b"{}",
        "no UTF-8": text.replace(name.encode(), b"\xff\xfe", 1),
        "UTF-16": text.decode().encode("utf-16"),
        "a comma at the end": text[:-1] + b",}",
        "half": text[: len(text) // 2],
        "no colon": text.replace(b":", b" ", 1),
        "100,000 digits": text.replace(b"[0,", b"[" + b"9" * 100_000 + b",", 1),
    }


def bombs(most: int) -> dict[str, bytes]:
    """Headers of up to `most` bytes that would cost much to read."""
    entry = json.dumps(EMPTY).encode()
    return {
        "nested 100,000 deep": b'{"a":' * 100_000,
        "a list 100,000 deep": b'{"a":' + b"[" * 100_000,
        "metadata 100,000 deep": b'{"__metadata__":' + b'{"a":' * 50_000,
        "as deep as long": b"{" + b"[" * (most - 1),
        "full of lists": b'{"a":' + b"[]," * (most // 3 - 2),
        "full of a name": b'{"' + b"a" * (most - 2),
        "full of spaces": b"{" + b" " * (most - 1),
        "full of numbers": b'{"a":[' + b"1," * (most // 2 - 3),
        "100,000 metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(100_000)),
        "full of tensors": b"{" + b",".join(b'"%d":%b' % (i, entry) for i in range(most // 80)) + b"}",
    }
