"""Full fine-tuning: every parameter trains, in fp32.

Trainable: all parameters, a tied weight once. Nothing is added, so the model starts as itself, up to the
change of dtype: a bf16 model becomes an fp32 model, computed in fp32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from minift.methods.base import Method, Plan, Site
from minift.models.interface import LanguageModel, base_layers, is_quantized, parameter_count


@dataclass(frozen=True)
class Full(Method):
    name: ClassVar[str] = "full"
    identity_at_init: ClassVar[str] = "bitwise"

    def refuses(self, model):
        if model.adapters:
            return f"adapters {sorted(model.adapters)} are resident; merge them first"
        frozen = [path for path, layer in base_layers(model).items() if is_quantized(layer)]
        if frozen:
            return (
                f"{frozen[0]} is quantized; full fine-tuning needs dense weights: load the model without "
                "quantize, or train an adapter (lora)"
            )
        return None

    def plan(self, model: LanguageModel) -> Plan:
        sites = tuple(Site(path, "all", tuple(p.shape), p.numel()) for path, p in model.named_parameters())
        return Plan(self, sites, parameter_count(model), added=False)

    def inject(self, model, plan, name, seed):
        model.to(torch.float32)
        model.tie_weights()
        model.requires_grad_(True)

    def count(self, plan):
        total = 0
        for site in plan.sites:
            size = 1
            for n in site.shape:
                size *= n
            total += size
        return total

    def merge(self, model, name, mode, original):
        """The trained weights are the model's weights already: nothing to round."""
        model.requires_grad_(False)
        return {site.path: 0.0 for site in model.adapters[name].plan.sites}
