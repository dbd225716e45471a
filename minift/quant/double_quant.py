"""Double quantization: absmax, one fp32 number a block, stored as one byte.

    offset = mean(absmax);   absmax - offset in blocks of 256 by the dynamic 8-bit map, with fp32 scales
    dequantized = map[code] * nested_absmax + offset, in fp32

Bit for bit what bitsandbytes computes. The mean is over the whole weight, so that one block's change can move
the codes of all others. Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; bitsandbytes 0.50.
"""

import torch

from minift.kernels.dequantize_int8 import dequantize_int8
from minift.kernels.packed import NESTED_BLOCK, Packed
from minift.quant.int8 import INT8_DYNAMIC


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """absmax (blocks,) fp32 -> codes (blocks,) uint8, nested_absmax (groups,) fp32, offset (1,) fp32."""
    offset = absmax.mean()
    if not torch.isfinite(offset):
        raise ValueError("the mean of absmax overflows fp32; use double_quant=False for weights this large")
    codes, nested_absmax = INT8_DYNAMIC.quantize(absmax - offset, NESTED_BLOCK)
    equal = (nested_absmax == 0).repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    codes[equal] = 0  # what bitsandbytes stores for a group of equal scales; any code is right there
    return codes, nested_absmax, offset.view(1)


def dequantize_absmax(codes, nested_absmax, offset) -> torch.Tensor:
    """The inverse, (blocks,) fp32."""
    absmax = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    table = INT8_DYNAMIC.values(codes.device)
    return dequantize_int8(Packed(codes, nested_absmax, table, codes.shape, NESTED_BLOCK), absmax).add_(
        offset
    )
