"""GGUF files written field by field, so that any of them can lie."""

import struct

import numpy as np

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
F32_TENSOR = 0


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def text(value, length=None):
    data = value if isinstance(value, bytes) else value.encode()
    return u64(len(data) if length is None else length) + data


def array(kind, items, count=None):
    return u32(kind) + u64(len(items) if count is None else count) + b"".join(items)


D, M, V = 16, 24, 11
METADATA = {
    "general.architecture": (STRING, text("llama")),
    "llama.embedding_length": (U32, u32(D)),
    "llama.feed_forward_length": (U32, u32(M)),
    "llama.block_count": (U32, u32(1)),
    "llama.attention.head_count": (U32, u32(2)),
    "llama.attention.head_count_kv": (U32, u32(1)),
    "llama.context_length": (U32, u32(32)),
    "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 2.0**-20)),
    "llama.rope.freq_base": (F32, struct.pack("<f", 10000.0)),
    "tokenizer.ggml.model": (STRING, text("gpt2")),
    "tokenizer.ggml.pre": (STRING, text("gpt-2")),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, [text(t) for t in ("<s>", *"abcdefgh", "ab", "abc")])),
    "tokenizer.ggml.token_type": (ARRAY, array(U32, [u32(3), *[u32(1)] * 10])),
    "tokenizer.ggml.merges": (ARRAY, array(STRING, [text("a b"), text("ab c")])),
    "tokenizer.ggml.eos_token_id": (U32, u32(0)),
}
TENSORS = {
    "token_embd.weight": (V, D),
    "blk.0.attn_norm.weight": (D,),
    "blk.0.attn_q.weight": (D, D),
    "blk.0.attn_k.weight": (D // 2, D),
    "blk.0.attn_v.weight": (D // 2, D),
    "blk.0.attn_output.weight": (D, D),
    "blk.0.ffn_norm.weight": (D,),
    "blk.0.ffn_gate.weight": (M, D),
    "blk.0.ffn_up.weight": (M, D),
    "blk.0.ffn_down.weight": (D, M),
    "output_norm.weight": (D,),
}
FIRST = "token_embd.weight"


def gguf(
    metadata=None, magic=b"GGUF", version=3, counts=None, again=(), value=0.5, first=None, rank=None, cut=None
):
    """A file of METADATA with changes, and TENSORS full of `value`.

    `counts`: (tensors, metadata) as the file says; `again`: metadata a second time; `first`: (name, shape,
    type, offset) of the first tensor as the table says, None for what is true; `rank`: its dimensions.
    """
    pairs = {**METADATA, **(metadata or {})}
    pairs = [(k, v) for k, v in pairs.items() if v is not None] + [(k, pairs[k]) for k in again]
    table, data = b"", b""
    for name, shape in TENSORS.items():
        said = (name, shape, F32_TENSOR, len(data))
        if name == FIRST and first:
            said = tuple(a if b is None else b for a, b in zip(said, first, strict=True))
        table += text(said[0]) + u32(len(said[1]) if name != FIRST or rank is None else rank)
        table += b"".join(u64(n) for n in reversed(said[1])) + u32(said[2]) + u64(said[3])
        part = np.full(shape, value, np.float32).tobytes()
        data += part + bytes(-len(part) % 32)
    counts = counts or (len(TENSORS), len(pairs))
    head = magic + u32(version) + u64(counts[0]) + u64(counts[1])
    head += b"".join(text(k) + u32(kind) + packed for k, (kind, packed) in pairs) + table
    return (head + bytes(-len(head) % 32) + data)[:cut]


HUGE, NUMBER = 2**63 - 1, "llama.embedding_length"
VALUES = {  # of a number in the metadata
    "string of 2^63": (STRING, text("x", HUGE)),
    "string past the end": (STRING, text("x", 10**6)),
    "string of 2^21": (STRING, text("x" * 2**21)),
    "no UTF-8": (STRING, text(b"\xff\xfe")),
    "array of 2^63 strings": (ARRAY, array(STRING, [], HUGE)),
    "array of 2^20 strings": (ARRAY, array(STRING, [], 2**20)),
    "array of 2^63 numbers": (ARRAY, array(U64, [], HUGE)),
    "array of arrays": (ARRAY, array(ARRAY, [array(U32, [])] * 1000)),
    "array of nothing known": (ARRAY, array(77, [])),
    "type 77": (77, b""),
    "a text": (STRING, text("16")),
    "a list": (ARRAY, array(U32, [u32(16)])),
    "a bool": (7, b"\x01"),
    "nan": (F32, struct.pack("<f", float("nan"))),
    "inf": (F32, struct.pack("<f", float("inf"))),
    "zero": (U32, u32(0)),
    "negative": (5, struct.pack("<i", -16)),
    "2^62": (U64, u64(2**62)),
    "a half": (F32, struct.pack("<f", 16.5)),
    "nothing": None,
}
FIRSTS = {  # what the table says of the first tensor: name, shape, type, offset
    "dimension 0": (None, (0, D), None, None),
    "dimension 2^63": (None, (HUGE, D), None, None),
    "a product that overflows": (None, (2**31, 2**31, 2**31, 4), None, None),
    "a product of 2^64": (None, (2**31, 2**31, 4), None, None),
    "other rows": (None, (V - 1, D), None, None),
    "type 99": (None, None, 99, None),
    "half blocks": (None, None, 2, None),
    "bytes of another type": (None, None, 1, None),
    "past the end": (None, None, None, 2**40),
    "at 2^64": (None, None, None, 2**64 - 32),
    "between": (None, None, None, 8),
    "on the second": (None, None, None, 32),
    "a name twice": ("output_norm.weight", None, None, None),
    "a name that ours is": ("model.norm.weight", (D,), None, None),
    "an unknown name": ("../../etc/passwd", None, None, None),
    "a long name": ("n" * 100_000, None, None, None),
}


def model_files():
    """Name -> bytes of a file that is no model."""
    yield from {f"cut {n}": gguf(cut=n) for n in (0, 3, 4, 7, 8, 20, 24, 30, 100, 500, 900, 2000, -1)}.items()
    yield from {f"magic {m}": gguf(magic=m) for m in (b"GGML", b"FUGG", b"\x80\x04GG", b"PK\x03\x04")}.items()
    yield from {f"version {v}": gguf(version=v) for v in (0, 1, 4, 2**32 - 1, 0x03000000)}.items()
    for counts in (
        (HUGE, 1),
        (1, HUGE),
        (2**64 - 1, 2**64 - 1),
        (2**16, 15),
        (12, 15),
        (11, 16),
        (10, 15),
        (0, 15),
    ):
        yield f"counts {counts}", gguf(counts=counts)
    for what, pair in VALUES.items():
        yield f"{NUMBER} is {what}", gguf({NUMBER: pair})
    for key in ("block_count", "attention.head_count", "attention.key_length", "rope.dimension_count"):
        for what, pair in {
            "text": (STRING, text("1")),
            "2^30": (U32, u32(2**30)),
            "2^62": (U64, u64(2**62)),
        }.items():
            yield f"{key} is {what}", gguf({f"llama.{key}": pair})
    yield "rope scaling is a list", gguf({"llama.rope.scaling.type": (ARRAY, array(U32, []))})
    yield "architecture is a list", gguf({"general.architecture": (ARRAY, array(U32, []))})
    yield "another architecture", gguf({"general.architecture": (STRING, text("os.system"))})
    yield "metadata twice", gguf(again=(NUMBER,))
    for n in (0, 1, 7, 12, 2**17, 2**31):
        yield f"alignment {n}", gguf({"general.alignment": (U32, u32(n))})
    yield "alignment is a text", gguf({"general.alignment": (STRING, text("32"))})
    for rank in (0, 1, 3, 9, 2**32 - 1):
        yield f"rank {rank}", gguf(rank=rank)
    for what, first in FIRSTS.items():
        yield f"first tensor: {what}", gguf(first=first)
    for value in (float("nan"), float("inf"), -float("inf")):
        yield f"weights {value}", gguf(value=value)


def tokenizer_files():
    """Name -> bytes of a file whose vocabulary is none."""
    tokens = "tokenizer.ggml."
    for what, pairs in {
        "no tokens": {"tokens": None},
        "no types": {"token_type": None},
        "no merges": {"merges": None},
        "fewer types": {"token_type": (ARRAY, array(U32, [u32(3)]))},
        "tokens are numbers": {"tokens": (ARRAY, array(U32, [u32(1)] * 11))},
        "merges without a space": {"merges": (ARRAY, array(STRING, [text("ab")]))},
        "merges of unknown tokens": {"merges": (ARRAY, array(STRING, [text("x y")]))},
        "another model": {"model": (STRING, text("llama"))},
        "the model is a list": {"model": (ARRAY, array(U32, []))},
        "the split is a list": {"pre": (ARRAY, array(U32, []))},
        "eos is a text": {"eos_token_id": (STRING, text("0"))},
        "eos is negative": {"eos_token_id": (5, struct.pack("<i", -7))},
        "eos is a list": {"eos_token_id": (ARRAY, array(U32, [u32(0)]))},
        "the first token is no token": {"add_bos_token": (7, b"\x01"), "bos_token_id": (U32, u32(10**6))},
    }.items():
        yield what, gguf({tokens + key: pair for key, pair in pairs.items()})
    yield "the template is a number", gguf({"tokenizer.chat_template": (U32, u32(5))})
