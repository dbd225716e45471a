"""dequantize_4bit: NF4 to the weight's dtype, scales in fp32 or doubly quantized.

Beside bitsandbytes, torchao (scales always doubly quantized), and a copy of the result: no dequantization
that writes its result can be much faster than that. Both write into given memory. On a CPU bitsandbytes
cannot, and allocates its result: "minift fresh" does the same. Gates: numbers equal to those of
`dequantize_4bit_ref`; the peers' relative error as a quantization of w within 1 % of ours. Limit: 0.5 bytes a
weight and the scales are read, 2 or 4 are written.
"""

from functools import partial

import torch

from benchmarks.harness import backend, gate_equal, gate_quality, peer, timed_row
from benchmarks.limits import DEVICE
from benchmarks.weights import BLOCK_SIZE, copies, dtypes, fresh, into, labels, nbytes, pack, random, shapes
from minift.kernels.dequantize_4bit import dequantize_4bit, dequantize_4bit_ref


def bitsandbytes(weight, out):
    """weight: the bytes and their state."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(*weight, out=out if DEVICE == "cuda" else None)


def sides_of(w, weight, out, left_out: dict) -> dict:
    expected = dequantize_4bit_ref(weight, torch.empty_like(w))
    gate_equal("dequantize_4bit", dequantize_4bit(weight, out), expected)
    packed = copies(weight)
    sides = {
        "minift": into(dequantize_4bit, packed, out),
        "copy": into(lambda source, out: out.copy_(source), copies(expected), out),
        **({} if DEVICE == "cuda" else {"minift fresh": fresh(dequantize_4bit, packed[0], out)}),
    }
    with peer("bitsandbytes", left_out):
        from bitsandbytes.functional import quantize_4bit

        options = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "compress_statistics": weight.nested}
        theirs = [quantize_4bit(w, **options) for _ in packed]
        gate_quality("bitsandbytes", w, bitsandbytes(theirs[0], out), expected)
        sides["bitsandbytes"] = into(bitsandbytes, theirs, out)
    if weight.nested:
        with peer("torchao", left_out):
            from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

            calls = [to_nf4(w).get_original_weight for _ in packed]
            gate_quality("torchao", w, calls[0](), expected)
            sides["torchao"] = calls
    return sides


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for shape in shapes(quick):
            w = random(*shape, dtype=dtype, scale=0.02)
            out = torch.empty_like(w)
            for scales in ("fp32", "nested"):
                weight = pack(w, "nf4", scales == "nested")
                sides = sides_of(w, weight, out, left_out)
                row = labels("dequantize_4bit", w, scales=scales)
                rows.append(timed_row(row, sides, nbytes(weight, out), 0, quick))
    return rows, {"backend": backend(partial(dequantize_4bit, weight, out)), "left out": left_out}
