"""Bottleneck adapters: a small network after, or beside, the sublayers of each block.

    houlsby, pfeiffer   y = h + scaling * up(act(down(h))),   h = base(x)
    parallel            y = base(x) + scaling * up(act(down(x)))
    down: h -> A h + a, A (m, D);   up: z -> B z + b, B (D, m)

houlsby adapts the output of attention and of the feed-forward, before each is added to the residual stream,
pfeiffer that of the feed-forward alone, and parallel stands beside the feed-forward. Implementations of
pfeiffer differ in whether it stands before or after the residual is added; here it stands before, inside the
residual branch.
Start: biases are zero. With `init_std` of zero, B is zero and A ~ U(-1/sqrt(D), 1/sqrt(D)): the base to the
bit. Otherwise A and B are normal with that deviation, truncated at two of it: near the identity.
Trainable: 2 D m + m + D for each adapter.
Sources: Houlsby et al. 2019, arXiv:1902.00751, section 2.1, its start section 3.6; Pfeiffer et al. 2020,
arXiv:2005.00247; parallel: He et al. 2021, arXiv:2110.04366, section 3.3, the start from zero its code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.methods.base import Method, check_number, check_one_of, check_whole
from minift.methods.plan import Site
from minift.models.randomness import generator
from minift.models.targets import as_rules, match
from minift.models.wrappers import Wrapper, bare_modules, get_module, replace_module

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}
PLACEMENTS = {"houlsby": ("attn_out", "ffn_out"), "pfeiffer": ("ffn_out",), "parallel": ("ffn",)}


class BottleneckAdapter(Wrapper):
    """One adapter: `parallel` reads the input of what it is wrapped around, otherwise the output."""

    keys: ClassVar = {
        "down": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }

    def __init__(self, base: nn.Module, D: int, m: int, activation: str, scaling: float, parallel: bool):
        super().__init__(base)
        self.activation, self.scaling = ACTIVATIONS[activation], scaling
        self.parallel = self.additive = parallel
        device = next(base.parameters()).device
        self.down = nn.Parameter(torch.zeros(m, D, dtype=torch.float32, device=device))
        self.down_bias = nn.Parameter(torch.zeros(m, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.zeros(D, m, dtype=torch.float32, device=device))
        self.up_bias = nn.Parameter(torch.zeros(D, dtype=torch.float32, device=device))

    def forward(self, x):
        y = self.base(x)
        if not self.active:
            return y
        h = x if self.parallel else y  # (..., D)
        z = self.activation(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))  # (..., m)
        branch = F.linear(z, self.up.to(h.dtype), self.up_bias.to(h.dtype))
        return self.where_meant(torch.add(y, branch, alpha=self.scaling), y)

    def start(self, std: float, random: torch.Generator) -> None:
        """The random start; `std` of zero leaves up at zero."""
        if std == 0:
            bound = self.down.shape[1] ** -0.5  # Kaiming-uniform with a = sqrt(5), as LoRA's A
            self.down.data.copy_(torch.empty(self.down.shape).uniform_(-bound, bound, generator=random))
            return
        for weight in (self.down, self.up):
            drawn = nn.init.trunc_normal_(torch.empty(weight.shape), 0, std, -2 * std, 2 * std, random)
            weight.data.copy_(drawn)


@dataclass(frozen=True)
class Bottleneck(Method):
    name: ClassVar[str] = "bottleneck"
    law: ClassVar[str] = "2 D m + m + D for each adapter"
    unmergeable: ClassVar[str] = "its branch is not linear, so no weight matrix computes it"

    bottleneck_dim: int = 64
    """Width m of the bottleneck."""
    activation: str = "relu"
    """One of ACTIVATIONS, between the projections."""
    placement: str = "pfeiffer"
    """Where adapters stand, one of PLACEMENTS."""
    scaling: float = 1.0
    """Of the branch."""
    init_std: float = 0.0
    """Deviation of both projections at the start; zero starts as the base to the bit."""
    layers_to_transform: tuple[str, ...] = ()
    """Block numbers and ranges, as 3 or "8-15"; empty means every block."""

    def __post_init__(self):
        object.__setattr__(self, "layers_to_transform", as_rules(self.layers_to_transform))
        check_whole(self, "bottleneck_dim", 1)
        check_one_of(self, "activation", ACTIVATIONS)
        check_one_of(self, "placement", PLACEMENTS)
        check_number(self, "scaling", above=0)
        check_number(self, "init_std")

    @property
    def identity_at_init(self) -> str:
        return "none" if self.init_std else "bitwise"

    def sites(self, model):
        roles = PLACEMENTS[self.placement]
        rules = match(
            model,
            [rule for role in roles for rule in model.sites[role]],
            layers=self.layers_to_transform,
            fields=(f"placement {self.placement}", "exclude_modules"),
            among=bare_modules(model),
            what="module",
        )
        D, m = model.dims.hidden, self.bottleneck_dim
        sites = [
            Site(path, rule, (D, m), 2 * D * m + m + D, f"2 x {D} x {m} + {m} + {D}", scaling=self.scaling)
            for path, rule in rules.items()
        ]
        return tuple(sites)

    def inject(self, model, plan, name, seed):
        parallel = self.placement == "parallel"
        for site in plan.sites:
            base = get_module(model, site.path)
            adapter = BottleneckAdapter(base, *site.shape, self.activation, site.scaling, parallel)
            if not adapter.down.is_meta:
                adapter.start(self.init_std, generator(seed, f"{name}:{site.path}"))
            model.adapters[name].modules[site.path] = adapter
            replace_module(model, site.path, adapter)

    def count(self, plan):
        return sum(2 * D * m + m + D for D, m in (site.shape for site in plan.sites))
