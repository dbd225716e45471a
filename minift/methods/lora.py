"""LoRA: a low-rank branch beside a frozen layer.

    y = base(x) + scaling * B A dropout(x),   A (r, in), B (out, r)
    scaling = alpha / r, or alpha / sqrt(r) with rslora

A starts Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), and B at zero: the wrapped layer starts exactly as the
base. Trainable: r * (in + out) for each layer. The branch computes in x's dtype from fp32 parameters.
Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1 and its code (microsoft/LoRA); rsLoRA: Kalajdzievski
2023, arXiv:2312.03732, definition 3.1.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from minift.kernels.lora_linear import lora_linear
from minift.methods.base import Method, Plan, Site, generator
from minift.models.interface import (
    LanguageModel,
    base_layers,
    dense_weight,
    is_quantized,
    parameter_count,
    replace_layer,
    stands_alone,
)
from minift.models.targets import match
from minift.quant.linear import QuantizedLinear


class LowRank(torch.autograd.Function):
    """y + scaling * x A^T B^T, keeping x, A, B and the thin product h = x A^T.

        dB = scaling * dy^T h,   dh = scaling * dy B,   dA = dh^T x,   dx = dh A

    x (..., in), y (..., out), A (r, in) and B (out, r) in their own dtype, rounded to x's for the products.
    Where neighbours share their input (q, k and v), autograd keeps that one x for all of them.
    """

    @staticmethod
    def forward(ctx, x, y, A, B, scaling):
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        h = rows @ A.to(x.dtype).t()  # (n, r)
        ctx.save_for_backward(x, A, B, h)
        ctx.scaling = scaling
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.to(x.dtype).t(), alpha=scaling).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, h = ctx.saved_tensors
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dh = (dy_rows @ B.to(dy.dtype)) * ctx.scaling  # (n, r)
        need_x, _, need_A, need_B, _ = ctx.needs_input_grad
        dx = (dh @ A.to(dy.dtype)).view(x.shape) if need_x else None
        dA = (dh.t() @ rows).to(A.dtype) if need_A else None  # (r, in)
        dB = (dy_rows.t() @ h * ctx.scaling).to(B.dtype) if need_B else None  # (out, r)
        return dx, dy, dA, dB, None


class LoRALinear(nn.Module):
    """One adapter on one layer. `base` is a linear layer of any kind, or another wrapper."""

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float, device=None):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.scaling, self.dropout = r, scaling, dropout
        self.active = True
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))

    def forward(self, x):
        if not self.active:
            return self.base(x)
        matrix = None if self.dropout and self.training else frozen_matrix(self.base, x.dtype)
        if matrix is not None:
            rows = x.reshape(-1, self.in_features).contiguous()
            y = lora_linear(rows, matrix, self.lora_A, self.lora_B, self.scaling)
            return y.view(*x.shape[:-1], self.out_features)
        y = self.base(x)
        return LowRank.apply(
            F.dropout(x, self.dropout, self.training), y, self.lora_A, self.lora_B, self.scaling
        )

    def delta(self) -> torch.Tensor:
        """scaling * B A in the adapter's dtype, (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)


def frozen_matrix(base: nn.Module, dtype: torch.dtype):
    """W of a plain frozen layer without bias that computes in `dtype`, as `lora_linear` takes it.

    None for any other layer: wrappers, those that do not stand alone, and W in odd strides.
    """
    if type(base) not in (nn.Linear, QuantizedLinear) or base.bias is not None:
        return None
    if not stands_alone(base):
        return None
    if type(base) is QuantizedLinear:
        return base.as_packed() if base.compute_dtype == dtype else None
    W = base.weight
    return W if W.dtype == dtype and not W.requires_grad and W.is_contiguous() else None


@dataclass(frozen=True)
class LoRA(Method):
    name: ClassVar[str] = "lora"
    identity_at_init: ClassVar[str] = "bitwise"

    r: int = 8
    """Rank; at most the smaller side of each adapted layer."""
    alpha: float = 16.0
    """Numerator of the scaling."""
    dropout: float = 0.0
    """Probability of zeroing an input of the branch while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names, globs over whole paths, or "all-linear"."""
    exclude_modules: tuple[str, ...] = ()
    """Rules of the same form for layers to leave alone."""
    layers_to_transform: tuple[str, ...] = ()
    """Block numbers and ranges, as 3 or "8-15"; empty means every block."""

    def __post_init__(self):
        for rules in ("target_modules", "exclude_modules", "layers_to_transform"):
            value = getattr(self, rules)
            value = (value,) if isinstance(value, str | int) else value
            object.__setattr__(self, rules, tuple(str(rule) for rule in value))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; the rank is a whole number of at least 1")
        for name, kinds in (("alpha", (int, float)), ("dropout", (int, float)), ("rslora", bool)):
            if not isinstance(getattr(self, name), kinds) or (
                kinds is not bool and getattr(self, name) is True
            ):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it is a {'bool' if kinds is bool else 'number'}"
                )
        if not self.alpha > 0 or self.alpha == float("inf"):
            raise ValueError(f"alpha is {self.alpha}; it must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def plan(self, model: LanguageModel) -> Plan:
        layers, sites = base_layers(model), []
        rules = match(model, self.target_modules, self.exclude_modules, self.layers_to_transform)
        for path, rule in rules.items():
            layer = layers[path]
            tied = layer is model.head and getattr(innermost(layer), "weight", None) is model.embed.weight
            if tied:
                raise ValueError(
                    f"{path} is tied to the embedding, which a low-rank branch on one of the two would "
                    "untie; leave it out of target_modules"
                )
            if self.r > min(layer.in_features, layer.out_features):
                raise ValueError(
                    f"r is {self.r}, above the smaller side of {path} ({layer.out_features} x "
                    f"{layer.in_features}); a rank this high is no longer low, use at most "
                    f"{min(layer.in_features, layer.out_features)}"
                )
            sites.append(
                Site(
                    path,
                    rule,
                    (layer.out_features, layer.in_features),
                    self.r * (layer.in_features + layer.out_features),
                    r=self.r,
                    scaling=self.scaling,
                )
            )
        return Plan(self, tuple(sites), parameter_count(model), added=True)

    def inject(self, model, plan, name, seed):
        layers = base_layers(model)
        for site in plan.sites:
            base = layers[site.path]
            device = next(base.parameters()).device
            layer = LoRALinear(base, self.r, self.scaling, self.dropout, device)
            layer.train(base.training)
            bound = layer.in_features**-0.5  # Kaiming-uniform with a = sqrt(5): sqrt(6 / ((1 + 5) in))
            if device.type != "meta":
                start = torch.empty(self.r, layer.in_features).uniform_(
                    -bound, bound, generator=generator(seed, f"{name}:{site.path}")
                )
                layer.lora_A.data.copy_(start)
            replace_layer(model, site.path, layer)
            model.adapters[name].modules[site.path] = layer

    def count(self, plan):
        return sum(self.r * (fan_in + fan_out) for fan_out, fan_in in (site.shape for site in plan.sites))

    def merge(self, model, name, mode, original):
        """W + scaling * B A in fp32 (fp64 for fp64), rounded once; all checked before any weight changes."""
        modules, merged, errors = model.adapters[name].modules, {}, {}
        for path, layer in modules.items():
            base = innermost(layer)
            trained_against = dense_weight(base)
            exact = trained_against.double() + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
            start = dense_weight(base_layers(original)[path]) if original is not None else trained_against
            wide = torch.promote_types(trained_against.dtype, torch.float32)
            weight = start.to(trained_against.device, wide) + layer.delta().to(wide)
            if not torch.isfinite(weight.to(trained_against.dtype)).all():
                raise ValueError(
                    f"merging {name!r} into {path} gives non-finite weights; nothing was changed"
                )
            merged[path] = _with_weight(base, weight, mode)
            got = dense_weight(merged[path])
            errors[path] = (got.double() - exact).abs().max().item()
        for path, layer in modules.items():
            _replace_innermost(layer, merged[path])
            _unwrap(model, path, layer)
        return errors


def _with_weight(base: nn.Module, weight: torch.Tensor, mode: str) -> nn.Module:
    """A layer as `base` with another matrix: quantized again in mode "requantized", otherwise dense."""
    if is_quantized(base):
        return base.requantized(weight) if mode == "requantized" else base.dense(weight)
    layer = copy.copy(base)  # shares the bias
    layer._parameters = {**base._parameters, "weight": nn.Parameter(weight.to(base.weight.dtype), False)}
    return layer


def innermost(layer: nn.Module) -> nn.Module:
    """The base layer inside any number of wrappers."""
    while isinstance(layer, LoRALinear):
        layer = layer.base
    return layer


def _replace_innermost(layer: LoRALinear, base: nn.Module) -> None:
    while isinstance(layer.base, LoRALinear):
        layer = layer.base
    layer.base = base


def _unwrap(model: LanguageModel, path: str, layer: LoRALinear) -> None:
    """Take one wrapper out of the chain of wrappers at a path."""
    outer = model.get_submodule(path)
    if outer is layer:
        replace_layer(model, path, layer.base)
        return
    while outer.base is not layer:
        outer = outer.base
    outer.base = layer.base
