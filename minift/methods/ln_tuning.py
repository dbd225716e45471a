"""LayerNorm tuning: the gains (and shifts) of the norms train, the rest stays.

    y = x / sqrt(mean(x^2) + eps) * weight',   weight' = weight at the start, in fp32;   LayerNorm: + bias'

What trains are copies in fp32, rounded to the base's dtype for computing (trained.py), so the model starts
as the base to the bit, and merging is exact.
Trainable: D for each RMSNorm, 2 D for each LayerNorm.
Source: Zhao et al. 2023, arXiv:2312.11420.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from minift.methods.base import Method
from minift.methods.trained import inject_trained, plan_trained
from minift.models.targets import as_rules, match
from minift.models.wrappers import bare_modules


@dataclass(frozen=True)
class LNTuning(Method):
    name: ClassVar[str] = "ln_tuning"
    law: ClassVar[str] = "D for each RMSNorm, 2 D for each LayerNorm"

    target_modules: tuple[str, ...] = ()
    """Names, or globs over whole paths, of norms; empty means all of them."""

    def __post_init__(self):
        object.__setattr__(self, "target_modules", as_rules(self.target_modules))

    def sites(self, model):
        norms = match(model, model.sites["norms"], among=bare_modules(model), what="module")
        sites = plan_trained(model, self.target_modules or model.sites["norms"], "target_modules")
        other = [site.path for site in sites if site.path.rpartition(".")[0] not in norms]
        if other:
            raise ValueError(
                f"target_modules mean {other[0]}, which is no norm's; norms are "
                f"{', '.join(model.sites['norms'])}, and method selective trains any module"
            )
        return sites

    def inject(self, model, plan, name, seed):
        inject_trained(model, plan.sites, name, prefix="ln_tuning_layers.")

    def count(self, plan):
        return sum(prod(site.shape) for site in plan.sites)
