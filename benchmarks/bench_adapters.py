"""Resident LoRA adapters beside peft's: switching, a batch of mixed adapters; and a layer with DoRA.

Needs: minift fetch smollm2. LoRA of rank 8 on every linear layer of SmolLM2. Switching goes round three
resident adapters. Then four texts of 128 tokens, each with an adapter of its own, are read as one batch and
one after another. peft gets the same base and adapters through minift's files. DoRA of rank 16 stands on a
layer of 2048 x 2048 and reads 512 rows.

Gate: fp32 logits of a batch, of the texts alone and of peft are the same up to 2^-13 of the largest, and
another adapter's are not; DoRA's outputs and gradients have the bound of a product (benchmarks/harness.py)
against fp64. Before it is timed in bf16, the model is held to its fp32 logits, peft within the same bound.
"""

import statistics
import tempfile
from functools import partial
from itertools import cycle

import torch
from torch import nn

import minift
from benchmarks.harness import alternate, gate, gate_close, peer, quantiles
from benchmarks.limits import DEVICE
from minift.methods.dora import DoRALinear

NAMES = ("a", "b", "c", "d")  # the first three are resident while switching is timed
T = 128
WHOLE_MODEL = {torch.float32: 2**-13, torch.bfloat16: 2**-4}  # 8 and 4 times the bound of one product


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, details = [], {"left out": {}}
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        for dtype in (torch.float32, torch.bfloat16):
            rows += resident(folder, dtype, quick, details)
    for dtype in (torch.float32, torch.bfloat16):
        rows += dora(dtype, quick, details)
    return rows, details
