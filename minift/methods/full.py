"""Full fine-tuning: every parameter trains, in fp32.

Trainable: all parameters, a tied weight once. Nothing is added, so the model starts as itself, up to the
change of dtype: a bf16 model becomes an fp32 model, computed in fp32.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from minift.methods.base import Method
from minift.methods.plan import Site
from minift.models.interface import is_quantized
from minift.models.wrappers import base_layers


@dataclass(frozen=True)
class Full(Method):
    name: ClassVar[str] = "full"
    law: ClassVar[str] = "all parameters, a tied one once"
    adapter_file: ClassVar[bool] = False

    def refuses(self, model):
        if model.adapters:
            return f"adapters {sorted(model.adapters)} are resident; merge them first"
        if model.kept:
            return (
                f"{sorted(model.kept)} are merged and kept, and could not come back afterwards; unmerge them"
            )
        frozen = [path for path, layer in base_layers(model).items() if is_quantized(layer)]
        if frozen:
            return (
                f"{frozen[0]} is quantized; full fine-tuning needs dense weights: load the model without "
                "quantize, or train an adapter (lora)"
            )
        return None

    def sites(self, model):
        sites = tuple(
            Site(path, "all", tuple(p.shape), p.numel(), " x ".join(map(str, p.shape)), replaces=True)
            for path, p in model.named_parameters()
        )
        return sites

    def inject(self, model, plan, name, seed):
        model.to(torch.float32)
        model.tie_weights()
        model.requires_grad_(True)

    def count(self, plan):
        return sum(prod(site.shape) for site in plan.sites)
