"""QuantizedWeight and quantize_weight."""

import torch

from minift.kernels.packed import Packed
from minift.quant.base import Format, Layout, NotFinite
from minift.quant.codebook import FP4, NF4
from minift.quant.double_quant import dequantize_absmax, quantize_absmax
from minift.quant.int8 import INT8_DYNAMIC, INT8_FORMAT

FORMATS = {
    "nf4": Format("nf4", 4, NF4),
    "fp4": Format("fp4", 4, FP4),
    "int8": INT8_FORMAT,
    "int8_dynamic": INT8_DYNAMIC,
}


def find_format(name: str) -> Format:
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format {name!r} is not known; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


class QuantizedWeight:
    """A quantized weight: `packed`, the scales, `dequantize(dtype)`, `nbytes`.

    `tensors` maps the names of `Layout.sizes` to 1-D uint8 tensors; `dequantize()` gives `dtype` by default.
    """

    def __init__(self, layout: Layout, tensors: dict[str, torch.Tensor], dtype: torch.dtype):
        sizes = layout.sizes()
        if tensors.keys() != sizes.keys():
            raise ValueError(f"a quantized weight is stored as {', '.join(sizes)}; got {', '.join(tensors)}")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() != sizes[name]:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; a {layout.format.name} weight of shape "
                    f"{layout.shape} in blocks of {layout.block_size} needs torch.uint8 ({sizes[name]},)"
                )
        self.layout, self.tensors, self.dtype = layout, tensors, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def packed(self) -> torch.Tensor:
        """Codes, (ceil(n bits / 8),) uint8."""
        return self.tensors["packed"]

    @property
    def absmax(self) -> torch.Tensor:
        """(blocks,) fp32 or, under double quantization, uint8 codes of it."""
        stored = self.tensors["absmax"]
        return stored if self.layout.double_quant else stored.view(torch.float32)

    @property
    def nested_absmax(self) -> torch.Tensor | None:
        """(groups of 256 blocks,) fp32, under double quantization."""
        return self.tensors["nested_absmax"].view(torch.float32) if self.layout.double_quant else None

    @property
    def offset(self) -> torch.Tensor | None:
        """(1,) fp32, the mean that was subtracted from absmax, under double quantization."""
        return self.tensors["offset"].view(torch.float32) if self.layout.double_quant else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def scales(self) -> torch.Tensor:
        """absmax of each block as dequantization uses it, (blocks,) fp32."""
        if not self.layout.double_quant:
            return self.absmax
        return dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """codebook[code] * absmax in fp32, rounded once to `dtype` (default: the original weight's)."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        return self.layout.format.dequantize(self.as_packed(), out)

    def as_packed(self) -> Packed:
        """The same tensors as the ops of minift.kernels take them."""
        return as_packed(self.layout, self.tensors)

    def __repr__(self):
        scales = "double quantization" if self.layout.double_quant else "fp32 absmax"
        return (
            f"QuantizedWeight({self.layout.format.name}, {tuple(self.shape)}, blocks of "
            f"{self.layout.block_size}, {scales}, {self.nbytes:,} bytes)"
        )


def as_packed(layout: Layout, tensors: dict[str, torch.Tensor]) -> Packed:
    """The tensors of `Layout.sizes` as the ops of minift.kernels take them, without a copy."""
    packed, absmax, format = tensors["packed"], tensors["absmax"], layout.format
    codebook = None if format is INT8_FORMAT else format.values(packed.device)
    if not layout.double_quant:
        return Packed(packed, absmax.view(torch.float32), codebook, layout.shape, layout.block_size)
    nested_absmax, offset = (tensors[name].view(torch.float32) for name in ("nested_absmax", "offset"))
    table = INT8_DYNAMIC.values(packed.device)
    return Packed(packed, absmax, codebook, layout.shape, layout.block_size, nested_absmax, offset, table)


def quantize_weight(
    w: torch.Tensor,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    name: str = "the weight",
) -> QuantizedWeight:
    """Quantize a floating-point tensor of any shape; `name` is what errors call it.

    Memory: nothing of the weight's own size but the result, and a copy of a weight in odd strides.
    """
    layout = Layout(find_format(format), tuple(w.shape), block_size, double_quant)
    if not w.is_floating_point():
        raise ValueError(f"{name} is {w.dtype}; only floating-point weights are quantized")
    if not w.numel():
        raise ValueError(f"{name} is empty, shape {tuple(w.shape)}; there is nothing to quantize")
    if w.dtype == torch.float64:
        raise ValueError(f"{name} is torch.float64; blocks are computed in fp32, so convert it first")
    try:
        packed, absmax = layout.format.quantize(w.detach().reshape(-1).contiguous(), block_size)
    except NotFinite:
        raise not_finite(w, name) from None
    tensors = {"packed": packed}
    if double_quant:
        try:
            codes, nested_absmax, offset = quantize_absmax(absmax)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        tensors |= {"absmax": codes, "nested_absmax": as_bytes(nested_absmax), "offset": as_bytes(offset)}
    else:
        tensors["absmax"] = as_bytes(absmax)
    return QuantizedWeight(layout, tensors, w.dtype)


def not_finite(w: torch.Tensor, name: str) -> NotFinite:
    """The error for a weight that holds a number which is not finite."""
    bad = (~torch.isfinite(w)).nonzero()[0].tolist()
    return NotFinite(f"{name} is not finite at {bad}: it is {w[tuple(bad)].item()}; such a weight is refused")


def as_bytes(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().view(torch.uint8)
