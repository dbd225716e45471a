"""dequantize_int8: 8 bits to the weight's dtype, in blocks of 64, fp32 scales.

Beside bitsandbytes' blockwise dequantization of a table of the same numbers, and a copy of the result, into
given memory. On a CPU bitsandbytes cannot, and allocates its result: "minift fresh" does the same. Gates:
numbers equal to those of `dequantize_int8_ref`; bitsandbytes' relative error as a quantization of w within 1
% of ours. Limit: 1.06 bytes a weight are read, 2 or 4 are written.
"""

from functools import partial

import torch

from benchmarks.harness import backend, gate_equal, gate_quality, peer, timed_row
from benchmarks.limits import DEVICE
from benchmarks.weights import copies, dtypes, fresh, int8_of, into, labels, nbytes, pack, random, shapes
from minift.kernels.dequantize_int8 import dequantize_int8, dequantize_int8_ref


def bitsandbytes(weight, out):
    """weight: the bytes and their state."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_blockwise(*weight, out=out if DEVICE == "cuda" else None)


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for shape in shapes(quick):
            w = random(*shape, dtype=dtype, scale=0.02)
            weight, out = pack(w, "int8", False), torch.empty_like(w)
            expected = dequantize_int8_ref(weight, torch.empty_like(w))
            gate_equal("dequantize_int8", dequantize_int8(weight, out), expected)
            packed = copies(weight)
            sides = {
                "minift": into(dequantize_int8, packed, out),
                "copy": into(lambda source, out: out.copy_(source), copies(expected), out),
                **({} if DEVICE == "cuda" else {"minift fresh": fresh(dequantize_int8, packed[0], out)}),
            }
            with peer("bitsandbytes", left_out):
                theirs = [int8_of(w) for _ in packed]
                gate_quality("bitsandbytes", w, bitsandbytes(theirs[0], out), expected)
                sides["bitsandbytes"] = into(bitsandbytes, theirs, out)
            row = labels("dequantize_int8", w)
            rows.append(timed_row(row, sides, nbytes(weight, out), 0, quick))
    return rows, {"backend": backend(partial(dequantize_int8, weight, out)), "left out": left_out}
