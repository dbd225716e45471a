"""The two 8-bit formats.

int8: code = round(127 w / absmax), ties to even, -127 to 127 as two's complement bytes; value code / 127.

int8_dynamic: the signed dynamic map (codebook.py), whose values stand close together around zero. w / absmax
is first rounded to one of 65,536 even steps over [-1, 1], and the step has its nearest code, as bitsandbytes
0.50 does on CPUs: the codes nearest to zero are therefore never chosen, except in blocks of zeros, which hold
the code of zero (bitsandbytes: code 0, which double quantization turns into numbers other than zero).
"""

from functools import cache

import torch
import torch.nn.functional as F

from minift.kernels.quantize_4bit import TINY
from minift.kernels.quantize_int8 import quantize_int8
from minift.quant.base import CHUNK, Format
from minift.quant.codebook import INT8, dynamic_map

STEPS = 65535


class Int8(Format):
    def encode(self, flat, block_size):
        return quantize_int8(flat, block_size)

    @property
    def bound(self) -> float:
        return 0.5 / 127


class DynamicInt8(Format):
    def encode(self, flat, block_size):
        packed = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
        absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=flat.device)
        nearest = self.nearest_of_steps(flat.device)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            blocks = F.pad(part.float(), (0, -part.numel() % block_size)).view(-1, block_size)
            largest = blocks.abs().amax(dim=1)
            largest.masked_fill_(largest < TINY, 0)
            scaled = blocks * (1 / largest.masked_fill(largest == 0, float("inf")))[:, None]
            step = ((scaled.clamp_(-1, 1) + 1) * 0.5 * STEPS + 0.5).int().clamp_(0, STEPS)  # of NaN as well
            codes = nearest.index_select(0, step.view(-1)).view(blocks.shape)
            codes.masked_fill_((largest == 0)[:, None], self.codebook.index(0.0))
            packed[start : start + CHUNK] = codes.view(-1)[: part.numel()]
            absmax[start // block_size : start // block_size + len(largest)] = largest
        return packed, absmax

    @cache  # noqa: B019
    def nearest_of_steps(self, device) -> torch.Tensor:
        """Step -> code, (65536,) uint8; on a midpoint, the lower one."""
        values = self.values(device)
        steps = -1 + 2 * torch.arange(STEPS + 1, dtype=torch.float32, device=device) / STEPS
        return torch.bucketize(steps, (values[:-1] + values[1:]) / 2).to(torch.uint8)

    @property
    def bound(self) -> float:
        return super().bound + 1 / STEPS


INT8_FORMAT = Int8("int8", 8, INT8)
INT8_DYNAMIC = DynamicInt8("int8_dynamic", 8, dynamic_map())
