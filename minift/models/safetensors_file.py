"""The layout of a safetensors file: 8 bytes of size, a JSON header of that size, then the tensors' bytes.

    {"__metadata__": {key: text}, name: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}

The header is checked entry by entry before the file is mapped: a bomb is refused at its first odd entry. The
tensors must cover the rest of the file exactly, in any order. A mapped tensor is a view of the file until its
rows are used. Source: the safetensors README ("Format"); the caps are ours.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minift.models.disk import never_read, open_file, replacing
from minift.models.json_file import DECODER

HEADER_BYTES, ADAPTER_HEADER_BYTES = 2**24, 2**20  # at most, of a model's file and of an adapter's
TENSOR_BYTES = 2**8  # of the header that is allowed, for each tensor that is
MOST_DIMENSIONS, LONGEST_DIMENSION = 8, 2**31
NAME_BYTES, ENTRY_BYTES, METADATA_BYTES = 512, 2**10, 2**18
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
SPACE = re.compile(rb"[ \t\r\n]{0,4096}")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk: rows(start, stop) reads part of its first dimension."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]


def open_safetensors(
    path: Path, header_bytes: int = HEADER_BYTES
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors, mapped, and the metadata. The file is unmapped when the last view of it is gone."""
    path = Path(path)
    with open_file(path, _pickle_beside(path)) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            if size < 8 or length > min(size - 8, header_bytes):
                raise ValueError(
                    f"{size} bytes with a header of {length}, of which at most {header_bytes} are read"
                )
            most = header_bytes // TENSOR_BYTES
            entries, metadata = check_header(file.read(length), size - 8 - length, most)
        except ValueError as error:
            file.seek(0)
            what = never_read(path, file.read(512))
            raise ValueError(what or f"{path} is damaged or truncated: {error}; fetch it again") from None
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)  # writes to it never reach the file
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = {
        name: _stored(data, dtype, shape, 8 + length + begin)
        for name, (dtype, shape, begin, _) in entries.items()
    }
    return tensors, metadata


def read_tensors(
    path: Path, header_bytes: int = ADAPTER_HEADER_BYTES
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors, copied out of it, and its metadata."""
    stored, metadata = open_safetensors(path, header_bytes)
    whole = {name: t.rows(0, t.shape[0] if t.shape else 1) for name, t in stored.items()}
    return {name: tensor.clone().view(stored[name].shape) for name, tensor in whole.items()}, metadata


def _pickle_beside(path: Path) -> str:
    pickled = [] if os.path.lexists(path) else sorted(p.name for p in path.parent.glob("*.bin"))
    return f"{pickled[0]} is a pickle and is never read; convert it to safetensors" if pickled else ""


def _stored(data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> StoredTensor:
    count, width = shape[0] if shape else 1, math.prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> torch.Tensor:
        stop = min(stop, count)
        part = data[begin + start * width : begin + stop * width]
        if begin % dtype.itemsize:  # other writers may leave tensors between the multiples of their items
            part = part.clone()
        return part.view(dtype).view(stop - start, *shape[1:])

    return StoredTensor(shape, rows)


def check_header(header: bytes, size: int, most: int) -> tuple[dict[str, tuple], dict[str, str]]:
    """(name -> (dtype, shape, begin, end), metadata) of at most `most` tensors in `size` bytes."""
    if not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    if header.count(b'"data_offsets"') > most:  # before any of them is looked at
        raise ValueError(f"it holds more than {most} tensors")
    entries, metadata = {}, None
    for name, value in _pairs(header):
        if name in entries or (name == METADATA and metadata is not None):
            raise ValueError(f"{name} stands in it twice")
        if name == METADATA:
            metadata = _metadata(value)
        elif len(entries) == most:
            raise ValueError(f"it holds more than {most} tensors")
        else:
            entries[name] = _entry(name, value, size)
    end = 0
    for begin, stop, name in sorted((e[2], e[3], name) for name, e in entries.items()):
        if begin != end:
            raise ValueError(
                f"{name} begins at byte {begin}, where {end} is next: bytes in no tensor or in two"
            )
        end = stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of {size}")
    return entries, metadata or {}


def _pairs(header: bytes):
    """(key, value) of a JSON object, one at a time, each of bounded length."""
    at = _after(header, 1)
    while header[at : at + 1] != b"}":
        name, at = _value(header, at, 6 * NAME_BYTES + 2)  # \u0000 is six bytes
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= NAME_BYTES:
            raise ValueError(f"{str(name)[:80]!r} is no name of 1 to {NAME_BYTES} printable bytes")
        at = _after(header, at)
        if header[at : at + 1] != b":":
            raise ValueError("its header is no JSON object")
        value, at = _value(
            header, _after(header, at + 1), METADATA_BYTES if name == METADATA else ENTRY_BYTES
        )
        yield name, value
        at = _after(header, at)
        if header[at : at + 1] == b",":
            at = _after(header, at + 1)
            if header[at : at + 1] == b'"':
                continue
        elif header[at : at + 1] == b"}":
            break
        raise ValueError("its header is no JSON object")
    if _after(header, at + 1) != len(header):
        raise ValueError("its header goes on after the JSON object")


def _after(header: bytes, at: int) -> int:
    return SPACE.match(header, at).end()


def _value(header: bytes, at: int, limit: int):
    """(JSON value, where it ends); what is longer than `limit` is cut off and does not parse."""
    # a character may be cut in half at the end; one within the value becomes a surrogate and is refused
    text = header[at : at + limit].decode("utf-8", "surrogateescape")
    try:
        value, end = DECODER.raw_decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deep")
        raise ValueError(f"its header is no JSON from byte {at} on, in the next {limit}: {reason}") from None
    return value, at + len(text[:end].encode("utf-8", "surrogateescape"))


def _metadata(value) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{METADATA} is no table of texts")
    for text in (*value, *value.values()):
        text.encode()  # half a surrogate pair is no text: a UnicodeEncodeError, which is a ValueError
    return value


def _entry(name: str, value, size: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _counts(shape, LONGEST_DIMENSION) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(
            f"{name} has shape {shape!r}; at most {MOST_DIMENSIONS} sizes up to {LONGEST_DIMENSION}"
        )
    if not _counts(offsets, size) or len(offsets) != 2:
        raise ValueError(f"{name} lies at {offsets!r} of {size} bytes")
    count, item = math.prod(shape), DTYPES[dtype].itemsize
    if not count and math.prod(filter(None, shape)) * item >= 2**63:  # nothing, whose strides would overflow
        raise ValueError(f"{name} has shape {shape}, more than any memory")
    if offsets[1] - offsets[0] != count * item:
        raise ValueError(f"{name} is {dtype} {shape} in {offsets[1] - offsets[0]} bytes")
    return DTYPES[dtype], tuple(shape), *offsets


def _counts(values, largest: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= largest for v in values)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """The same tensors and metadata give the same bytes; an interrupted write leaves the old file."""
    with replacing(Path(path)) as [file]:
        write_tensors(file, tensors, metadata)


def write_tensors(file, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Widest dtypes first, then by name, so that each tensor begins at a multiple of its item's size."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {METADATA: dict(sorted(metadata.items()))}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
