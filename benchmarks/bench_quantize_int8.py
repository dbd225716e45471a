"""quantize_int8: blocks of 64, beside bitsandbytes' blockwise quantization to the same 255 numbers.

Gates: bytes and scales equal to those of `quantize_int8_ref`; bitsandbytes' relative error within 1 % of ours
(it looks the same numbers up in a table). Limit: w is read and 1.06 bytes a weight are written.
"""

from functools import partial

import torch

from benchmarks.harness import backend, gate_equal, gate_quality, peer, timed_row
from benchmarks.weights import BLOCK_SIZE, copies, dtypes, int8_of, labels, nbytes, random, shapes
from minift.kernels.dequantize_int8 import dequantize_int8_ref
from minift.kernels.packed import Packed
from minift.kernels.quantize_int8 import quantize_int8, quantize_int8_ref


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out = [], {}
    for dtype in dtypes(quick):
        for shape in shapes(quick):
            w = random(*shape, dtype=dtype, scale=0.02)
            op = partial(quantize_int8, block_size=BLOCK_SIZE)
            got = op(w.view(-1))
            for one, want in zip(got, quantize_int8_ref(w.view(-1), BLOCK_SIZE), strict=True):
                gate_equal("quantize_int8", one, want)
            weights = copies(w)
            sides = {"minift": [partial(op, each.view(-1)) for each in weights]}
            with peer("bitsandbytes", left_out):
                from bitsandbytes.functional import dequantize_blockwise

                decoded = dequantize_int8_ref(Packed(*got, None, shape, BLOCK_SIZE), torch.empty_like(w))
                gate_quality("bitsandbytes", w, dequantize_blockwise(*int8_of(w)), decoded)
                sides["bitsandbytes"] = [partial(int8_of, each) for each in weights]
            row = timed_row(labels("quantize_int8", w), sides, nbytes(w, *got), 0, quick)
            rows.append(row)
    return rows, {"backend": backend(partial(op, w.view(-1))), "left out": left_out}
