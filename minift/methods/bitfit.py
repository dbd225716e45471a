"""BitFit: the bias terms train, the weights stay.

    y = W x + b',   b' = b at the start, in fp32; likewise the shift of a LayerNorm

What trains are copies in fp32, rounded to the base's dtype for computing (trained.py), so the model starts
as the base to the bit, also where W is quantized.
Trainable: the length of every bias. Without `target_modules` that is every bias of the model, the paper's
BitFit; rules give its variants, as the query bias and that of the middle of the feed-forward (section 4).
Source: Ben Zaken, Ravfogel and Goldberg 2021, arXiv:2106.10199, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from minift.methods.base import Method
from minift.methods.trained import inject_trained, plan_trained
from minift.models.targets import as_rules
from minift.models.wrappers import bare_modules, innermost


@dataclass(frozen=True)
class BitFit(Method):
    name: ClassVar[str] = "bitfit"
    law: ClassVar[str] = "sum of the lengths of the biases"

    target_modules: tuple[str, ...] = ()
    """Names, or globs over whole paths, of modules whose biases train; empty means all that have one."""

    def __post_init__(self):
        object.__setattr__(self, "target_modules", as_rules(self.target_modules))

    def refuses(self, model):
        modules = [innermost(m) for path, m in bare_modules(model).items() if not model.is_new(path)]
        if any(module._parameters.get("bias") is not None for module in modules):
            return None
        return (
            "it has no bias terms, neither in linear layers nor in norms; ln_tuning and ia3 train about as "
            "few parameters"
        )

    def sites(self, model):
        if reason := self.refuses(model):
            raise ValueError(f"{self.name} cannot run on this model: {reason}")
        sites = plan_trained(model, self.target_modules or ("*",), "target_modules", only=("bias",))
        return sites

    def inject(self, model, plan, name, seed):
        inject_trained(model, plan.sites, name)

    def count(self, plan):
        return sum(site.shape[0] for site in plan.sites)
