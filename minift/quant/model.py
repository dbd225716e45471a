"""quantize_model: which linear layers become quantized, and what that costs each of them."""

from dataclasses import dataclass

import torch
from torch import nn

from minift.models.interface import LanguageModel
from minift.models.targets import ALL_LINEAR, match
from minift.models.wrappers import base_layers, replace_module
from minift.quant.base import CHUNK, Layout
from minift.quant.linear import QuantizedLinear
from minift.quant.weight import QuantizedWeight, find_format, not_finite, quantize_weight


@dataclass(frozen=True)
class Quantization:
    """How to quantize a model: the arguments of `quantize_model`."""

    format: str = "nf4"
    """One of FORMATS."""
    block_size: int = 64
    """Elements that share a scale: a power of two, 32 to 4096."""
    double_quant: bool = True
    """Store the scales as 8-bit codes."""
    only: tuple[str, ...] = (ALL_LINEAR,)
    """Layers: names, globs over whole paths, or "all-linear", which leaves the head out."""
    skip: tuple[str, ...] = ()
    """Rules of the same form for layers to leave dense."""

    def __post_init__(self):
        for rules in ("only", "skip"):
            value = getattr(self, rules)
            listed = isinstance(value, list | tuple) and all(isinstance(rule, str) for rule in value)
            if not isinstance(value, str) and not listed:
                raise ValueError(f"{rules} is {value!r}; give a rule or a list of rules")
            object.__setattr__(self, rules, (value,) if isinstance(value, str) else tuple(value))
        Layout(find_format(self.format), (1, 1), self.block_size, self.double_quant)


@dataclass(frozen=True)
class LayerError:
    """What quantization did to one layer."""

    path: str
    format: str
    elements: int
    width: int  # in_features
    bytes_before: int
    bytes_after: int
    relative: float | None = None  # |W - Q| / |W|, Frobenius
    of_bound: float | None = None  # largest |w - q| of its proven bound

    @property
    def bits(self) -> float:
        return 8 * self.bytes_after / self.elements


class QuantizationTable(tuple):
    """A LayerError for each layer; printing it gives the table and the line of totals."""

    @property
    def relative(self) -> float | None:
        """Mean over the layers, weighted by their elements."""
        known = [(row.relative, row.elements) for row in self if row.relative is not None]
        total = sum(n for _, n in known)
        return sum(error * n for error, n in known) / total if total else None

    def totals(self) -> str:
        before, after = sum(r.bytes_before for r in self), sum(r.bytes_after for r in self)
        elements = sum(r.elements for r in self)
        error = "" if self.relative is None else f" || relative error: {self.relative:.4f}"
        return (
            f"quantized params: {elements:,} || bytes: {before:,} -> {after:,} || "
            f"bits per weight: {8 * after / elements:.4f}{error}"
        )

    def __str__(self):
        rows = [("layer", "format", "bytes before", "bytes after", "bits", "relative error", "of bound")]
        for r in self:
            known = ("-", "-") if r.relative is None else (f"{r.relative:.5f}", f"{r.of_bound:.4f}")
            rows.append(
                (r.path, r.format, f"{r.bytes_before:,}", f"{r.bytes_after:,}", f"{r.bits:.3f}", *known)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*lines, self.totals()])


def quantize_model(
    model: LanguageModel,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip=(),
    only=(ALL_LINEAR,),
) -> QuantizationTable:
    """Replace linear layers by QuantizedLinear; several calls can mix formats in one model.

    `only` and `skip` are rules as in `target_modules`. All layers are quantized before the first is replaced,
    so an error leaves the model as it was; `load_model(quantize=...)` never holds both.
    """
    recipe = Quantization(format, block_size, double_quant, only, skip)
    layers, rows = base_layers(model), []
    paths = layers_to_quantize(model, recipe)
    made = {path: quantize_layer(layers[path], recipe, path) for path in paths}
    for path, (layer, row) in made.items():
        replace_module(model, path, layer)
        rows.append(row)
    return record(model, recipe, rows)


def record(model: LanguageModel, recipe: Quantization, rows: list[LayerError]) -> QuantizationTable:
    """Note on the model what was done to it; the table of this recipe alone."""
    model.quantization = (*model.quantization, recipe)
    model.quantization_table = QuantizationTable([*model.quantization_table, *rows])
    return QuantizationTable(rows)


def layers_to_quantize(model: LanguageModel, recipe: Quantization) -> list[str]:
    """The paths that a recipe means, or why one of them cannot be quantized."""
    layers = base_layers(model)
    paths = list(match(model, recipe.only, recipe.skip, fields=("only", "skip")))
    for path in paths:
        layer = layers[path]
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"{path} is quantized already ({layer.layout.format.name}); name it in skip, or leave out "
                "quantize"
            )
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{path} carries an adapter ({type(layer).__name__}); quantize the model before minift.apply"
            )
        if layer.weight is model.embed_weight:
            raise ValueError(
                f"{path} shares its weight with the embedding, which stays dense; name it in skip"
            )
        if layer.weight.dtype == torch.float64:
            raise ValueError(
                f"{path}.weight is torch.float64; blocks are computed in fp32, so convert it first"
            )
        if not layer.weight.is_meta and not torch.isfinite(torch.stack(layer.weight.aminmax())).all():
            raise not_finite(layer.weight, f"{path}.weight")
    return paths


def quantize_layer(layer: nn.Linear, recipe: Quantization, path: str) -> tuple[QuantizedLinear, LayerError]:
    """A linear layer's replacement, and its error (not known on the meta device)."""
    w = layer.weight
    layout = Layout(find_format(recipe.format), tuple(w.shape), recipe.block_size, recipe.double_quant)
    dense_bytes, bytes_after = w.numel() * w.element_size(), sum(layout.sizes().values())
    sizes = (path, recipe.format, w.numel(), layer.in_features, dense_bytes, bytes_after)
    if w.is_meta:
        return QuantizedLinear(layout, w.dtype, layer.bias, "meta"), LayerError(*sizes)
    quantized = quantize_weight(w, recipe.format, recipe.block_size, recipe.double_quant, f"{path}.weight")
    replacement = QuantizedLinear.from_weight(quantized, w.dtype, layer.bias)
    return replacement.train(layer.training), LayerError(*sizes, *weight_error(w, quantized))


def weight_error(w: torch.Tensor, quantized: QuantizedWeight) -> tuple[float, float]:
    """(|W - Q| / |W| Frobenius, largest |w - q| as a part of its bound), in fp32 chunks.

    Bound in a block: format.bound * absmax + |absmax - its stored value|, and the rounding of three products.
    """
    layout, flat = quantized.layout, w.detach().reshape(-1)
    size, packed, scales = layout.block_size, quantized.as_packed(), quantized.scales()
    squared_error = squared = worst = 0.0
    step = CHUNK // size * size
    for a in range(0, layout.n, step):
        b = min(layout.n, a + step)
        used = scales[a // size : -(-b // size)]
        q = torch.empty(b - a, dtype=torch.float32, device=w.device)
        layout.format.dequantize(packed, q, first=a)
        error, original = (flat[a:b].float() - q).abs_(), flat[a:b].float().abs()
        squared_error += error.double().square().sum().item()
        squared += original.double().square().sum().item()
        largest, absmax = _block_max(error, size), _block_max(original, size)
        bound = layout.format.bound * absmax + (absmax - used).abs() + 2**-22 * absmax
        worst = max(worst, (largest / bound.clamp_min(torch.finfo(torch.float32).tiny)).max().item())
    return (squared_error / squared) ** 0.5 if squared else 0.0, worst


def _block_max(values: torch.Tensor, size: int) -> torch.Tensor:
    whole = values.numel() // size * size
    parts = [values[:whole].view(-1, size).amax(dim=1)]
    if whole < values.numel():
        parts.append(values[whole:].amax().view(1))
    return torch.cat(parts)
