"""Packed: a quantized matrix as the ops take it, without its own rules of what is legal.

    W = codebook[code] * absmax[i // block_size],   i the index in the flattened matrix

Two codes to a byte for 4 bits, the first in the high nibble. 8-bit codes without a codebook are two's
complement: value = code / 127. Under double quantization absmax is itself stored in 8 bits:

    absmax[b] = nested_codebook[code of b] * nested_absmax[b // 256] + offset

All in fp32, each operation rounded; W is rounded once more to the dtype that is asked for.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; the layout is bitsandbytes'.
"""

from typing import NamedTuple

import torch

NESTED_BLOCK = 256  # scales that share a second-level scale


class Packed(NamedTuple):
    packed: torch.Tensor  # (ceil(n bits / 8),) uint8
    absmax: torch.Tensor  # (blocks,) fp32, or uint8 under double quantization
    codebook: torch.Tensor | None  # (16,) or (256,) fp32; None: 8 bits, code / 127
    shape: tuple[int, ...]
    block_size: int
    nested_absmax: torch.Tensor | None = None  # (ceil(blocks / 256),) fp32
    offset: torch.Tensor | None = None  # (1,) fp32
    nested_codebook: torch.Tensor | None = None  # (256,) fp32

    @property
    def bits(self) -> int:
        return 4 if self.codebook is not None and self.codebook.numel() == 16 else 8

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def scales(self) -> torch.Tensor:
        """absmax of each block, (blocks,) fp32."""
        if not self.nested:
            return self.absmax
        groups = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return self.nested_codebook[self.absmax.long()] * groups + self.offset
