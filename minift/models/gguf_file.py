"""The layout of a GGUF file: metadata, a table of tensors, then the tensors' aligned bytes.

Blocks are decoded by the `gguf` package. Its reader is not used: it keeps one numpy view for each string of
the vocabulary, which took 5.4 s and 160 MB for a 98 MB file where the loop below takes a tenth of a second.
Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md); the caps are ours. A count is compared
with the bytes that are left before anything is made of it.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from minift.models.disk import never_read, open_file

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
MOST_ENTRIES, MOST_ITEMS, LONGEST_TEXT = 2**16, 2**20, 2**20  # of both tables, in an array, bytes of a string
MOST_DIMENSIONS, LONGEST_DIMENSION = 8, 2**31


@dataclass(frozen=True)
class GGUFTensor:
    shape: tuple[int, ...]  # outermost dimension first
    kind: int  # ggml type number
    data: np.ndarray  # (rows, bytes of a row) uint8, mapped from the file


class _Cursor:
    """Reads little-endian values from a mapped file, and never past its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EOFError
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, kind: str):
        return struct.unpack(kind, self.bytes(struct.calcsize(kind)))[0]

    def count(self, most: int, what: str, item_bytes: int = 1) -> int:
        """How many items follow, each of `item_bytes` or more."""
        found = self.scalar("<Q")
        if found > most:
            raise ValueError(f"{found} {what}; at most {most} are read")
        if found * item_bytes > len(self.data) - self.at:
            raise EOFError
        return found

    def string(self) -> str:
        return self.bytes(self.count(LONGEST_TEXT, "bytes in a string")).decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.scalar("<I"))
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        found = self.scalar(SCALARS[kind])
        if isinstance(found, float) and not math.isfinite(found):
            raise ValueError(f"a number in the metadata is {found}")
        return found

    def array(self, kind: int) -> list:
        if kind == STRING:
            return [self.string() for _ in range(self.count(MOST_ITEMS, "strings in an array", 8))]
        if kind not in SCALARS:
            raise ValueError(f"an array of metadata type {kind}; arrays of numbers and of strings are read")
        dtype = np.dtype(SCALARS[kind])
        count = self.count(MOST_ITEMS, "numbers in an array", dtype.itemsize)
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()


def read_gguf(path) -> tuple[dict, dict[str, GGUFTensor]]:
    """Metadata and tensors of a file; the tensors stay on disk until their rows are read.

    The file itself may be a link: it is the one that the user named.
    """
    if find_spec("gguf") is None:
        raise ValueError("reading a .gguf file needs the gguf package: pip install 'minift[demo]'")
    path = Path(path)
    with open_file(path.resolve()) as file:
        start = file.read(512)
        if start[:4] != b"GGUF":
            raise ValueError(
                never_read(path, start) or f"{path} is not a GGUF file: its first four bytes are not 'GGUF'"
            )
        size = os.fstat(file.fileno()).st_size
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    cursor.at = 4
    try:
        return _contents(cursor)
    except EOFError:
        raise ValueError(
            f"{path} is truncated: it ends at byte {len(data)}, before its contents do; fetch it again"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another kind: {error}") from None


def _contents(cursor: _Cursor) -> tuple[dict, dict[str, GGUFTensor]]:
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"it is GGUF version {version}; versions 2 and 3, little-endian, are read")
    tensor_count = cursor.count(
        MOST_ENTRIES, "tensors", 32
    )  # the shortest: name, rank, one size, type, offset
    metadata = {}
    for _ in range(cursor.count(MOST_ENTRIES, "metadata entries", 13)):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"two metadata entries are named {key}")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    table = {}
    for _ in range(tensor_count):
        name, rank = cursor.string(), cursor.scalar("<I")
        if name in table:
            raise ValueError(f"two tensors are named {name}")
        if not 1 <= rank <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {rank} dimensions; 1 to {MOST_DIMENSIONS} are read")
        sizes = [cursor.scalar("<Q") for _ in range(rank)]  # innermost dimension first
        table[name] = tuple(reversed(sizes)), cursor.scalar("<I"), cursor.scalar("<Q")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment % 8:
        raise ValueError(f"general.alignment is {alignment!r}, expected a multiple of 8 up to {2**16}")
    return metadata, _tensors(cursor, table, _aligned(cursor.at, alignment), alignment)


def _tensors(cursor: _Cursor, table: dict, start: int, alignment: int) -> dict[str, GGUFTensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    data, tensors, places = np.frombuffer(cursor.data, np.uint8), {}, []
    for name, (shape, kind, offset) in table.items():
        block, block_bytes = GGML_QUANT_SIZES.get(GGMLQuantizationType(kind), (0, 0))
        if not block or not all(1 <= size <= LONGEST_DIMENSION for size in shape):
            raise ValueError(f"{name} has shape {shape} and type {kind}, which no tensor has")
        *outer, width = shape
        if width % block:
            raise ValueError(f"{name}: rows of {width} elements are not whole blocks of {block}")
        rows, row_bytes = math.prod(outer), width // block * block_bytes
        begin, end = start + offset, start + offset + rows * row_bytes
        if end > len(data):
            raise EOFError
        places.append((begin, end, name))
        tensors[name] = GGUFTensor(shape, kind, data[begin:end].reshape(rows, row_bytes))
    end = start
    for begin, stop, name in sorted(places):
        if begin != (wanted := _aligned(end, alignment)):
            raise ValueError(f"{name} begins at byte {begin}, not at {wanted}: bytes in no tensor or in two")
        end = stop
    if len(data) > _aligned(end, alignment):
        raise ValueError(f"its tensors end at byte {end} of {len(data)}")
    return tensors


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def dequantize(tensor: GGUFTensor, rows) -> np.ndarray:
    """Some rows (a slice or indices) of a tensor as fp32, (rows, width)."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(tensor.kind)
    packed = np.array(tensor.data[rows])  # a copy: the file is mapped read-only
    if kind == GGMLQuantizationType.BF16:  # the upper half of an fp32
        return (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    try:
        return quants.dequantize(packed, kind)
    except NotImplementedError as error:
        raise ValueError(f"GGUF tensors of type {kind.name} are not supported: {error}") from None
