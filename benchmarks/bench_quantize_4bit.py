"""quantize_4bit: NF4 in blocks of 64 beside bitsandbytes and torchao (which quantizes the scales as well).

Gates: bytes and scales equal to those of `quantize_4bit_ref`; the peers' relative error within 1 % of ours.
Limit: w is read and 0.56 bytes a weight are written.
"""

from functools import partial

import torch

from benchmarks.harness import backend, gate_equal, gate_quality, peer, timed_row
from benchmarks.weights import BLOCK_SIZE, copies, dtypes, labels, nbytes, random, shapes
from minift.kernels.dequantize_4bit import dequantize_4bit_ref
from minift.kernels.packed import Packed
from minift.kernels.quantize_4bit import quantize_4bit, quantize_4bit_ref
from minift.quant import FORMATS


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, left_out, format = [], {}, FORMATS["nf4"]
    for dtype in dtypes(quick):
        for shape in shapes(quick):
            w = random(*shape, dtype=dtype, scale=0.02)
            codebook = format.values(w.device)
            op = partial(quantize_4bit, codebook=codebook, block_size=BLOCK_SIZE)
            packed, absmax = op(w.view(-1))
            expected = quantize_4bit_ref(w.view(-1), codebook, BLOCK_SIZE)
            for got, want in zip((packed, absmax), expected, strict=True):
                gate_equal("quantize_4bit", got, want)
            decoded = dequantize_4bit_ref(
                Packed(packed, absmax, codebook, shape, BLOCK_SIZE), torch.empty_like(w)
            )
            weights = copies(w)
            sides = {"minift": [partial(op, each.view(-1)) for each in weights]}
            with peer("bitsandbytes", left_out):
                import bitsandbytes.functional as bnb

                theirs = partial(bnb.quantize_4bit, quant_type="nf4", blocksize=BLOCK_SIZE)
                gate_quality("bitsandbytes", w, bnb.dequantize_4bit(*theirs(w)), decoded)
                sides["bitsandbytes"] = [partial(theirs, each) for each in weights]
            with peer("torchao", left_out):
                from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

                gate_quality("torchao", w, to_nf4(w).get_original_weight(), decoded)
                sides["torchao"] = [partial(to_nf4, each) for each in weights]
            moved = nbytes(w, packed, absmax)
            rows.append(timed_row(labels("quantize_4bit", w), sides, moved, 0, quick))
    return rows, {"backend": backend(partial(op, w.view(-1))), "left out": left_out}
