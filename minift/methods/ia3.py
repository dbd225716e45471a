"""IA3: learned vectors rescale keys, values and the middle of the feed-forward.

    keys and values   y = l * base(x),   l (out, 1): rows of W, and the bias
    feed-forward      y = base(l * x),   l (1, in): columns of W

All l start at one: the model starts as the base to the bit. The products are made in fp32 and rounded once to
x's dtype, since an l near one rounded to bf16 would be one. As in PEFT, keys are scaled before the rotation.
Trainable: L (2 kv_dim + d_ff), with kv_dim = KV * hd.
Source: Liu et al. 2022, arXiv:2205.05638, section 3.3; shapes on disk are PEFT's.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import Method
from minift.methods.plan import Site
from minift.models.targets import as_rules, match
from minift.models.wrappers import Wrapper, get_module, replace_module

NONE = ("none",)


class IA3Linear(Wrapper):
    """A linear layer with its inputs (`feedforward`) or its outputs rescaled."""

    keys: ClassVar = {"ia3_l": "ia3_l"}

    def __init__(self, base: nn.Module, feedforward: bool, device=None):
        super().__init__(base)
        self.feedforward = feedforward
        shape = (1, self.in_features) if feedforward else (self.out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))

    def forward(self, x):
        if not self.active:
            return self.base(x)
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return self.base(self.where_meant((x * scale).to(x.dtype), x))
        y = self.base(x)
        return self.where_meant((y * scale).to(y.dtype), y)

    def fold(self, tensors):
        scale = self.ia3_l.to(tensors["weight"])
        folded = {**tensors, "weight": tensors["weight"] * scale}
        if "bias" in tensors and not self.feedforward:
            folded["bias"] = tensors["bias"] * scale.flatten()
        return folded


@dataclass(frozen=True)
class IA3(Method):
    name: ClassVar[str] = "ia3"
    law: ClassVar[str] = "sum of out, or of in for the feed-forward: L (2 kv_dim + d_ff)"

    target_modules: tuple[str, ...] = ()
    """Names, or globs over whole paths, of linear layers; empty means keys, values, feed-forward output."""
    feedforward_modules: tuple[str, ...] = ()
    """Those whose input is rescaled; empty means the feed-forward output among them, "none" none of them."""

    def __post_init__(self):
        for rules in ("target_modules", "feedforward_modules"):
            object.__setattr__(self, rules, as_rules(getattr(self, rules)))

    def sites(self, model):
        roles, sites = model.sites, []
        rules = match(model, self.target_modules or (*roles["k"], *roles["v"], *roles["ffn_out"]))
        feedforward = self._feedforward(model, rules)
        for path, rule in rules.items():
            layer = get_module(model, path)
            shape = (1, layer.in_features) if path in feedforward else (layer.out_features, 1)  # of l
            sites.append(Site(path, rule, shape, max(shape), str(max(shape))))
        return tuple(sites)

    def _feedforward(self, model, targets) -> set[str]:
        """The paths whose input is rescaled."""
        if self.feedforward_modules == NONE:
            return set()
        fields = ("feedforward_modules", "exclude_modules")
        meant = set(match(model, self.feedforward_modules or model.sites["ffn_out"], fields=fields))
        extra = [path for path in meant if path not in targets]
        if extra and self.feedforward_modules:
            raise ValueError(
                f"feedforward_modules mean {min(extra)}, which target_modules do not; name it in both"
            )
        return meant

    def inject(self, model, plan, name, seed):
        feedforward = self._feedforward(model, {site.path for site in plan.sites})
        for site in plan.sites:
            base = get_module(model, site.path)
            layer = IA3Linear(base, site.path in feedforward, next(base.parameters()).device)
            model.adapters[name].modules[site.path] = layer
            replace_module(model, site.path, layer)

    def count(self, plan):
        return sum(max(site.shape) for site in plan.sites)
