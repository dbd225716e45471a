"""QLoRA: quantize the linear layers, then LoRA on all of them. A recipe, not a layer.

    y = x dequantize(W4)^T + scaling * B A x

W4 is frozen; A and B stay fp32. Trainable: r * (in + out) for each layer, as for LoRA. The start is the
quantized model; PiSSA and OLoRA start from the dequantized weights. A base that is quantized already, in the
same format, stays as it is. `minift train` quantizes while loading,
`load_model(source, quantize=method.quantization)`, and never holds the dense model; on a folder that holds a
4-bit checkpoint, train with method lora.

With init "loftq" (loftq.py) the model is loaded dense, and each adapted layer is quantized together with its
start. Layers that are quantized without a branch are so as ever, adapted layers that stay dense (the head)
start as kaiming. After one iteration the base is the one that every other init has; after more it belongs to
its adapter, and is kept with `minift.save_model` once the adapter is removed.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3, equation 5.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from minift.methods.base import check_whole
from minift.methods.loftq import start_loftq
from minift.methods.lora import INITS, LoRA, kaiming
from minift.models.interface import is_quantized
from minift.models.targets import ALL_LINEAR
from minift.models.wrappers import base_layers, innermost
from minift.quant import Quantization, quantize_model
from minift.quant.model import QuantizationTable, layers_to_quantize


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
    loftq_iterations: int = 1
    """How often init "loftq" alternates between quantizing and the branch."""

    inits: ClassVar[dict] = INITS | {"loftq": kaiming}  # until LoftQ takes over in inject

    def __post_init__(self):
        super().__post_init__()
        Quantization(self.format, self.block_size, self.double_quant)  # checks them
        check_whole(self, "loftq_iterations", 1)
        if self.loftq_iterations > 1 and self.init != "loftq":
            raise ValueError(
                f"loftq_iterations is {self.loftq_iterations} and init {self.init!r}; say init='loftq', or "
                "leave loftq_iterations out"
            )

    @property
    def recipe(self) -> Quantization:
        """How the layers are quantized."""
        return Quantization(self.format, self.block_size, self.double_quant)

    @property
    def quantization(self) -> Quantization | None:
        """What to load the model with: LoftQ wants it dense."""
        return None if self.init == "loftq" else self.recipe

    def refuses(self, model):
        mine = (self.format, self.block_size, self.double_quant)
        for path, layer in base_layers(model).items():
            layout = getattr(innermost(layer), "layout", None)
            found = layout and (layout.format.name, layout.block_size, layout.double_quant)
            if found and self.init == "loftq":
                return (
                    f"{path} is quantized already, and init 'loftq' starts from the dense weight; load the "
                    "model without quantize (the method quantizes it), or take another init"
                )
            if found and found != mine:
                return (
                    f"{path} is quantized with (format, block_size, double_quant) {found}, the method says "
                    f"{mine}; let them agree, or apply lora, which takes any base"
                )
        if any(is_quantized(module) for module in model.modules()):
            return None
        try:
            layers_to_quantize(model, self.recipe)
        except ValueError as error:
            return str(error)
        return None

    def inject(self, model, plan, name, seed):
        dense = {}
        if not any(is_quantized(module) for module in model.modules()):
            if self.init == "loftq":
                layers, adapted = base_layers(model), {site.path for site in plan.sites}
                meant = [path for path in layers_to_quantize(model, self.recipe) if path in adapted]
                dense = {path: layers[path].weight for path in meant if not layers[path].weight.is_meta}
            quantize_model(model, self.format, self.block_size, self.double_quant)
        super().inject(model, plan, name, seed)
        for path, weight in dense.items():
            start_loftq(model.adapters[name].modules[path], weight, self.recipe, self.loftq_iterations)
        if self.loftq_iterations > 1:  # the errors in the table are those of q(W)
            model.quantization_table = QuantizationTable(
                replace(row, relative=None, of_bound=None) if row.path in dense else row
                for row in model.quantization_table
            )
