"""QLoRA: quantize the linear layers, then LoRA on all of them. A recipe, not a layer.

    y = x dequantize(W4)^T + scaling * B A x

W4 is frozen; A and B stay fp32. Trainable: r * (in + out) for each layer, as for LoRA. The start is the
quantized model. A base that is quantized already, in the same format, stays as it is. `minift train`
quantizes while loading, `load_model(source, quantize=method.quantization)`, and never holds the dense model;
on a folder that holds a 4-bit checkpoint, train with method lora.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 5.
"""

from dataclasses import dataclass
from typing import ClassVar

from minift.methods.lora import LoRA
from minift.models.interface import is_quantized
from minift.models.targets import ALL_LINEAR
from minift.models.wrappers import base_layers, innermost
from minift.quant import Quantization, quantize_model
from minift.quant.model import layers_to_quantize


@dataclass(frozen=True)
class QLoRA(LoRA):
    name: ClassVar[str] = "qlora"
    identity_at_init: ClassVar[str] = "none"  # bitwise the quantized model, not the dense one

    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Names, globs over whole paths, or "all-linear"."""
    format: str = "nf4"
    """Of the frozen weights, one of FORMATS."""
    block_size: int = 64
    """Elements that share a scale: a power of two, 32 to 4096."""
    double_quant: bool = True
    """Store the scales as 8-bit codes."""

    def __post_init__(self):
        super().__post_init__()
        Quantization(self.format, self.block_size, self.double_quant)  # checks them

    @property
    def quantization(self) -> Quantization:
        return Quantization(self.format, self.block_size, self.double_quant)

    def refuses(self, model):
        mine = (self.format, self.block_size, self.double_quant)
        for path, layer in base_layers(model).items():
            layout = getattr(innermost(layer), "layout", None)
            found = layout and (layout.format.name, layout.block_size, layout.double_quant)
            if found and found != mine:
                return (
                    f"{path} is quantized with (format, block_size, double_quant) {found}, the method says "
                    f"{mine}; let them agree, or apply lora, which takes any base"
                )
        if any(is_quantized(module) for module in model.modules()):
            return None
        try:
            layers_to_quantize(model, self.quantization)
        except ValueError as error:
            return str(error)
        return None

    def inject(self, model, plan, name, seed):
        if not any(is_quantized(module) for module in model.modules()):
            quantize_model(model, self.format, self.block_size, self.double_quant)
        super().inject(model, plan, name, seed)
