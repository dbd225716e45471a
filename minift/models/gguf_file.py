"""The layout of a GGUF file: metadata, a table of tensors, then the tensors' aligned bytes.

Blocks are decoded by the `gguf` package. Its reader is not used: it keeps one numpy view for each string of
the vocabulary, which took 5.4 s and 160 MB for a 98 MB file where the structs below take a tenth of a second.
Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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


@dataclass(frozen=True)
class GGUFTensor:
    shape: tuple[int, ...]  # outermost dimension first
    kind: int  # ggml type number
    data: np.ndarray  # (rows, bytes of a row) uint8, mapped from the file


class _Cursor:
    """Reads little-endian values from a mapped file, and never past its end."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise EOFError
        chunk = self.data[self.at : self.at + count].tobytes()
        self.at += count
        return chunk

    def scalar(self, kind: str):
        return struct.unpack(kind, self.bytes(struct.calcsize(kind)))[0]

    def string(self) -> str:
        return self.bytes(self.scalar("<Q")).decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("<I"), self.scalar("<Q")
            if kind == ARRAY:
                raise ValueError("metadata holds an array of arrays")
            if kind in SCALARS:
                dtype = np.dtype(SCALARS[kind])
                return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
            return [self.value(kind) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self.scalar(SCALARS[kind])


def read_gguf(path) -> tuple[dict, dict[str, GGUFTensor]]:
    """Metadata and tensors of a file; the tensors stay on disk until their rows are read."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ValueError("reading a .gguf file needs the gguf package: pip install 'minift[demo]'") from error
    path = Path(path)
    if path.stat().st_size < 24 or path.open("rb").read(4) != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
    data = np.memmap(path, mode="r")
    cursor = _Cursor(data)
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3, little-endian, are read")
    try:
        tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        metadata = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(metadata_count)}
        table = []
        for _ in range(tensor_count):
            name, rank = cursor.string(), cursor.scalar("<I")
            sizes = [cursor.scalar("<Q") for _ in range(rank)]  # innermost dimension first
            table.append((name, tuple(reversed(sizes)), cursor.scalar("<I"), cursor.scalar("<Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in table:
            if name in tensors:
                raise ValueError(f"two tensors are named {name}")
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            rows, width = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
            if width % block:
                raise ValueError(f"{name}: rows of {width} elements are not whole blocks of {block}")
            row_bytes = width // block * block_bytes
            cursor.at = start + offset
            if cursor.at + rows * row_bytes > len(data):
                raise EOFError
            packed = data[cursor.at : cursor.at + rows * row_bytes].reshape(rows, row_bytes)
            tensors[name] = GGUFTensor(shape, kind, packed)
    except EOFError:
        raise ValueError(
            f"{path} is truncated: it ends at byte {len(data)}, before its contents do; fetch it again"
        ) from None
    except (ValueError, UnicodeDecodeError, struct.error, MemoryError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return metadata, tensors


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
