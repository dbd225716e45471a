"""LoRA: a low-rank branch beside frozen layers.

    y = base(x) + scaling * B A dropout(x),   A (r, in), B (out, r)
    scaling = alpha / r, or alpha / sqrt(r) with rslora

By default A starts Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), and B at zero: the wrapped layer starts
exactly as the base. Trainable: r * (in + out) for each layer, and all of `modules_to_save`.
Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1 and its code (microsoft/LoRA); rsLoRA: Kalajdzievski
2023, arXiv:2312.03732, definition 3.1; LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 5.
"""

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import Method, Plan, Site, generator
from minift.methods.low_rank import LoRAEmbedding, LoRALinear, TiedLoRAHead, embedding_shape
from minift.methods.olora import olora
from minift.methods.pissa import pissa
from minift.methods.selective import TIED, inject_trained, path_of, plan_trained
from minift.models.interface import LanguageModel, dense_weight, parameter_count
from minift.models.targets import fits, match
from minift.models.wrappers import bare_modules, get_module, innermost, is_base_layer, replace_module


def kaiming(layer: nn.Module, r: int, scaling: float, random: torch.Generator) -> tuple[torch.Tensor, None]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), Kaiming-uniform with a = sqrt(5): sqrt(6 / ((1 + 5) in)); B = 0."""
    bound = layer.in_features**-0.5
    return torch.empty(r, layer.in_features).uniform_(-bound, bound, generator=random), None


def gaussian(layer: nn.Module, r: int, scaling: float, random: torch.Generator) -> tuple[torch.Tensor, None]:
    """A ~ N(0, 1/r^2); B = 0."""
    return torch.empty(r, layer.in_features).normal_(0, 1 / r, generator=random), None


# (layer, r, scaling, random) -> where A and B start; B of None is zero, any other start is taken off again
INITS = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": lambda layer, r, scaling, random: pissa(dense_weight(innermost(layer)), r, scaling),
    "olora": lambda layer, r, scaling, random: olora(dense_weight(innermost(layer)), r),
}


@dataclass(frozen=True)
class LoRA(Method):
    name: ClassVar[str] = "lora"
    law: ClassVar[str] = "sum of r (in + out)"

    r: int = 8
    """Rank; at most the smaller side of each adapted layer."""
    alpha: float = 16.0
    """Numerator of the scaling."""
    dropout: float = 0.0
    """Probability of zeroing an input of the branch while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names, globs over whole paths, or "all-linear"; embeddings by name."""
    exclude_modules: tuple[str, ...] = ()
    """Rules of the same form for layers to leave alone."""
    layers_to_transform: tuple[str, ...] = ()
    """Block numbers and ranges, as 3 or "8-15"; empty means every block."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rule -> rank, for layers that differ; the first rule that fits counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Rule -> alpha, likewise."""
    init: str = "kaiming"
    """Where A and B start: one of INITS."""
    lr_ratio: float = 1.0
    """Learning rate of B as a multiple of A's (LoRA+)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train as a whole, by the same rules."""
    tied: str = "refuse"
    """Where head and embedding are one weight and one is meant: both (adapted as one), untie, refuse."""

    inits: ClassVar[tuple[str, ...]] = tuple(INITS)

    def __post_init__(self):
        for rules in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
            value = getattr(self, rules)
            value = (value,) if isinstance(value, str | int) else value
            object.__setattr__(self, rules, tuple(str(rule) for rule in value))
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; the rank is a whole number of at least 1")
        for name, kinds in (("dropout", (int, float)), ("lr_ratio", (int, float)), ("rslora", bool)):
            value = getattr(self, name)
            if not isinstance(value, kinds) or (kinds is not bool and isinstance(value, bool)):
                raise ValueError(f"{name} is {value!r}; it is a {'bool' if kinds is bool else 'number'}")
        for name, value in (
            ("alpha", self.alpha),
            *((f"alpha_pattern {k}", v) for k, v in self.alpha_pattern.items()),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value!r}; it must be a positive and finite number")
        for rule, value in self.rank_pattern.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"rank_pattern {rule} is {value!r}; a rank is a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if not 0 < self.lr_ratio < float("inf"):
            raise ValueError(f"lr_ratio is {self.lr_ratio}; it must be positive and finite")
        for name, known in (("init", self.inits), ("tied", TIED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}")

    @property
    def identity_at_init(self) -> str:
        return "bitwise" if self.init in ("kaiming", "gaussian") else "bound"

    def scale(self, r: int, alpha: float) -> float:
        return alpha / (r**0.5 if self.rslora else r)

    @property
    def scaling(self) -> float:
        """Of layers that no pattern fits."""
        return self.scale(self.r, self.alpha)

    def plan(self, model: LanguageModel) -> Plan:
        modules, sites = bare_modules(model), []
        among = [
            path for path, m in modules.items() if is_base_layer(m) or isinstance(innermost(m), nn.Embedding)
        ]
        rules = match(model, self.target_modules, self.exclude_modules, self.layers_to_transform, among=among)
        self._check_patterns(rules)
        for path, rule in rules.items():
            sites.append(self._site(path, rule, modules[path]))
        ends = {path_of(model, model.embed), path_of(model, model.head)} & rules.keys()
        if model.tied and ends:
            sites = self._with_tie(model, sites, ends)
        if self.modules_to_save:
            sites += plan_trained(model, self.modules_to_save, "modules_to_save", self.tied)
            twice = sorted(rules.keys() & {site.path.rpartition(".")[0] for site in sites if site.r is None})
            if twice:
                raise ValueError(
                    f"target_modules and modules_to_save both mean {twice[0]}; leave it to one of them"
                )
        return Plan(self, tuple(sites), parameter_count(model))

    def _site(self, path: str, rule: str, layer: nn.Module) -> Site:
        r = next((r for key, r in self.rank_pattern.items() if fits(path, key)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if fits(path, key)), self.alpha)
        shape = (layer.out_features, layer.in_features) if is_base_layer(layer) else embedding_shape(layer)
        if r > min(shape):
            raise ValueError(
                f"r is {r}, above the smaller side of {path} ({shape[0]} x {shape[1]}); a rank this high is "
                f"no longer low, use at most {min(shape)}"
            )
        parameters, formula = self.cost(r, *shape)
        return Site(path, rule, shape, parameters, formula, r=r, scaling=self.scale(r, alpha))

    def cost(self, r: int, fan_out: int, fan_in: int) -> tuple[int, str]:
        """Trainable parameters of one layer, and the formula with its numbers."""
        return r * (fan_in + fan_out), f"{r} ({fan_in} + {fan_out})"

    def _check_patterns(self, paths) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            for rule in getattr(self, name):
                if not any(fits(path, rule) for path in paths):
                    raise ValueError(f"{name} {[rule]} fits no layer that target_modules means")

    def _with_tie(self, model, sites, ends) -> list[Site]:
        """What a branch on the head or the embedding means where they are one weight."""
        embed, head = path_of(model, model.embed), path_of(model, model.head)
        if self.tied == "refuse":
            raise ValueError(
                f"{' and '.join(sorted(ends))}: {head} is tied to {embed}, and a branch on one alone would "
                "untie them; say tied='both' for one branch on both, tied='untie', or leave it out of "
                "target_modules"
            )
        if self.tied == "untie":
            return sites
        first = next(site for site in sites if site.path in ends)
        sites = [site for site in sites if site.path not in ends]
        shared = self._site(embed, first.rule, model.embed)
        tied = Site(head, f"tied to {embed}", shared.shape, 0, r=shared.r, scaling=shared.scaling)
        return [shared, *sites, tied]

    def inject(self, model, plan, name, seed):
        modules = model.adapters[name].modules
        for site in plan.sites:
            if site.r is None:
                continue
            base = get_module(model, site.path)
            if site.rule.startswith("tied to "):
                layer = TiedLoRAHead(base, modules[site.rule.removeprefix("tied to ")])
            else:
                layer = self.wrap(base, site, generator(seed, f"{name}:{site.path}"))
            modules[site.path] = layer
            replace_module(model, site.path, layer)
        inject_trained(model, [site for site in plan.sites if site.r is None], name)

    def wrap(self, base: nn.Module, site: Site, random: torch.Generator) -> nn.Module:
        """The wrapper of one site, at its start."""
        device = next(base.parameters()).device
        if not is_base_layer(base):
            layer = LoRAEmbedding(base, site.r, site.scaling, device)
            if device.type != "meta":
                start = torch.empty(layer.lora_embedding_B.shape).normal_(generator=random)
                layer.lora_embedding_B.data.copy_(start)
            return layer
        layer = self.linear(base, site, device)
        if device.type != "meta":
            A, B = INITS[self.init](base, site.r, site.scaling, random)
            if B is None:
                layer.lora_A.data.copy_(A)
            else:
                layer.start_at(A, B)
        return layer

    def linear(self, base: nn.Module, site: Site, device) -> LoRALinear:
        return LoRALinear(base, site.r, site.scaling, self.dropout, device)

    def count(self, plan):
        low = sum(s.r * sum(s.shape) for s in plan.sites if s.r and not s.rule.startswith("tied to "))
        whole = sum(prod(s.shape) for s in plan.sites if not s.r and not s.rule.startswith("tied to "))
        return low + whole

    def param_groups(self, parameters):
        if self.lr_ratio == 1:
            return super().param_groups(parameters)
        second = {name: p for name, p in parameters.items() if name.rpartition(".")[2] == "lora_B"}
        first = [p for name, p in parameters.items() if name not in second]
        return [
            {"params": first, "lr_ratio": 1.0},
            {"params": list(second.values()), "lr_ratio": self.lr_ratio},
        ]
