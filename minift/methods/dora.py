"""DoRA: a magnitude for each output row, and LoRA for the direction.

    V = W + scaling * B A,   y = m * (V x) / ||V|| + bias,   norms and m (out,) over the rows

Starts as LoRA with m = ||W||: exactly the base. The norm counts as a constant in the gradient (section 4.3).
Trainable: r * (in + out) + out for each layer. Source: Liu et al. 2024, arXiv:2402.09353, equation 5.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.kernels.lora_linear import base_product
from minift.methods.lora import LoRA
from minift.methods.low_rank import LoRALinear, LowRank
from minift.models.interface import dense_weight, is_quantized
from minift.models.wrappers import Wrapper, get_module, is_base_layer


class DoRALinear(LoRALinear):
    """y = u + (g - 1) (u - bias),   u = base(x) + scaling * B A x,   g = m / ||V||

    The bias is not rescaled. g - 1 is fp32, and y is rounded once. Under dropout u and V x belong to
    different inputs: y = base(x) + scaling * B A d(x) + (g - 1) V d(x).
    """

    keys: ClassVar = {**LoRALinear.keys, "magnitude": "lora_magnitude_vector"}
    additive: ClassVar = False

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0, device=None):
        super().__init__(base, r, scaling, dropout, device)
        squares = torch.empty(self.out_features, device=device)
        if not squares.is_meta:
            W = dense_weight(base)
            wide = torch.promote_types(W.dtype, torch.float32)
            squares = torch.linalg.vector_norm(W.detach(), dim=1, dtype=wide).square()
            squares = squares.clamp(
                min=torch.finfo(torch.float32).tiny
            )  # a row of zeros has a direction once B moves
        self.register_buffer("squares", squares)  # ||W||^2 (out,): W is frozen
        self.magnitude = nn.Parameter(squares.sqrt().float())  # (out,)

    def forward(self, x):
        if not self.active:
            return self.base(x)
        g = self.magnitude / self.norm()  # (out,)
        if self.dropout and self.training:
            plain, dropped, (A, B) = self.base(x), F.dropout(x, self.dropout), self.factors()
            u = LowRank.apply(dropped, plain, A, B, self.scaling)
            v = LowRank.apply(dropped, self.product(dropped), A, B, self.scaling)
        else:
            u = plain = super().forward(x)  # the base's for texts that are not meant
            v = u if self.base.bias is None else u - self.base.bias.to(g.dtype)
        return self.where_meant(torch.addcmul(u, g - 1, v).to(u.dtype), plain)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """||V|| of each row (out,) without V, from two thin products.

            ||V||^2 = ||W||^2 + scaling * rowsum(B * (2 W A^T + scaling * B (A A^T)))

        In a dtype of precision eps the error of ||V||^2 is below (in + 2 r + 4) eps / 2 times the same sum
        over absolute values; a sum below eps ||W||^2 is nothing but that error, and is not taken at its word.
        A base that computes in bf16 rounds A and W A^T to it, which adds 2^-6 |B| (|W| |A|^T) in the middle.
        """
        A, B = self.factors()
        inner = 2 * self.product(A).t() + self.scaling * (B @ (A @ A.t()))  # (out, r)
        squares = self.squares + self.scaling * (B * inner).sum(dim=1)
        least = torch.finfo(squares.dtype).eps * self.squares
        return torch.maximum(squares, least).sqrt().to(self.magnitude.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T without the bias, as the base computes it; its hooks hear nothing."""
        base, quantized = self.base, is_quantized(self.base)
        matrix = base.as_packed() if quantized else base.weight
        dtype = base.compute_dtype if quantized else base.weight.dtype
        rows = x.to(dtype).reshape(-1, self.in_features).contiguous()
        return base_product(rows, matrix).to(x.dtype).view(*x.shape[:-1], self.out_features)

    def fold(self, tensors):
        V = super().fold(tensors)["weight"]
        norm = torch.linalg.vector_norm(V, dim=1).clamp(min=torch.finfo(V.dtype).tiny ** 0.5)
        return {**tensors, "weight": (self.magnitude.to(V.dtype) / norm)[:, None] * V}


@dataclass(frozen=True)
class DoRA(LoRA):
    name: ClassVar[str] = "dora"
    law: ClassVar[str] = "sum of r (in + out) + out"

    def sites(self, model):
        sites = super().sites(model)
        for path in [site.path for site in sites if site.r]:
            layer = get_module(model, path)
            if not is_base_layer(layer):
                raise ValueError(
                    f"dora is for linear layers, and {path} is none; leave it out, or apply lora"
                )
            if isinstance(layer, Wrapper):
                raise ValueError(
                    f"{path} carries an adapter ({type(layer).__name__}), and dora takes the norms of a bare "
                    "weight; merge or remove that first, or apply it after dora"
                )
        return sites

    def cost(self, r, fan_out, fan_in):
        return r * (fan_in + fan_out) + fan_out, f"{r} ({fan_in} + {fan_out}) + {fan_out}"

    def linear(self, base, site, device):
        return DoRALinear(base, site.r, site.scaling, self.dropout, device)

    def count(self, plan):
        return super().count(plan) + sum(site.shape[0] for site in plan.sites if site.r)
