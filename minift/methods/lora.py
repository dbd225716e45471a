"""LoRA: a low-rank branch beside frozen layers.

    y = base(x) + scaling * B A dropout(x),   A (r, in), B (out, r)
    scaling = alpha / r, or alpha / sqrt(r) with rslora

By default A starts Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), and B at zero; an embedding's A starts at
zero and its B normal. The wrapped layer starts exactly as the base, whatever `init` says.
Trainable: r * (in + out) for each layer, and all of `modules_to_save`.
Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1 and its code (microsoft/LoRA); rsLoRA: Kalajdzievski
2023, arXiv:2312.03732, theorem 3.2; LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 5.
"""

from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import Method, check_flag, check_number, check_one_of, check_whole
from minift.methods.low_rank import LoRAEmbedding, LoRALinear, TiedLoRAHead, embedding_shape
from minift.methods.olora import olora
from minift.methods.pissa import pissa
from minift.methods.plan import Site
from minift.methods.trained import TIED, inject_trained, plan_trained
from minift.models.randomness import generator
from minift.models.targets import as_rules, fits, match
from minift.models.wrappers import bare_modules, get_module, innermost, is_base_layer, path_of, replace_module


def kaiming(layer: nn.Module, r: int, scaling: float, random: torch.Generator) -> tuple[torch.Tensor, None]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), Kaiming-uniform with a = sqrt(5): sqrt(6 / ((1 + 5) in)); B = 0."""
    bound = layer.in_features**-0.5
    return torch.empty(r, layer.in_features).uniform_(-bound, bound, generator=random), None


def gaussian(layer: nn.Module, r: int, scaling: float, random: torch.Generator) -> tuple[torch.Tensor, None]:
    """A ~ N(0, 1/r^2), as in PEFT; B = 0."""
    return torch.empty(r, layer.in_features).normal_(0, 1 / r, generator=random), None


def first_fit(pattern: dict, path: str) -> str | None:
    """The rule of a pattern that counts for a path."""
    return next((rule for rule in pattern if fits(path, rule)), None)


# (layer, r, scaling, random) -> where A and B start; a B of None is zero, any other is taken off again
INITS = {"kaiming": kaiming, "gaussian": gaussian, "pissa": pissa, "olora": olora}
TAKEN_OFF = ("pissa", "olora")  # starts with B different from zero, which a file holds beside A and B


@dataclass(frozen=True)
class LoRA(Method):
    name: ClassVar[str] = "lora"
    law: ClassVar[str] = "sum of r (in + out)"

    r: int = 8
    """Rank; at most the smaller side of each adapted layer."""
    alpha: float = 16.0
    """Numerator of the scaling."""
    dropout: float = 0.0
    """Probability of zeroing an input of the branch while training; an embedding has none to zero."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    target_modules: tuple[str, ...] = ()
    """Names, globs over whole paths, or "all-linear"; embeddings by name. Empty: the family's usual ones."""
    exclude_modules: tuple[str, ...] = ()
    """Rules of the same form for layers to leave alone."""
    layers_to_transform: tuple[str, ...] = ()
    """Block numbers and ranges, as 3 or "8-15"; empty means every block."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rule -> rank, for layers that differ; the first that fits counts, each must count somewhere."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Rule -> alpha, likewise."""
    init: str = "kaiming"
    """Where A and B of linear layers start: one of INITS."""
    lr_ratio: float = 1.0
    """Learning rate of the linear layers' B as a multiple of what all else has (LoRA+)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that train as a whole, by the same rules."""
    tied: str = "refuse"
    """Where head and embedding are one weight and one is meant: both (adapted as one), untie, refuse."""

    inits: ClassVar[dict] = INITS

    def __post_init__(self):
        for rules in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
            object.__setattr__(self, rules, as_rules(getattr(self, rules)))
        for name in ("r", "rank_pattern"):
            check_whole(self, name, 1)
        for name in ("alpha", "alpha_pattern", "lr_ratio"):
            check_number(self, name, above=0)
        check_number(self, "dropout", below=1)
        check_flag(self, "rslora")
        if self.init == "loftq" and "loftq" not in self.inits:
            raise ValueError("init is 'loftq', which quantizes as it starts; apply method qlora")
        check_one_of(self, "init", self.inits)
        check_one_of(self, "tied", TIED)

    def scale(self, r: int, alpha: float) -> float:
        return alpha / (r**0.5 if self.rslora else r)

    @property
    def scaling(self) -> float:
        """Of layers that no pattern fits."""
        return self.scale(self.r, self.alpha)

    def sites(self, model):
        modules, embed, head = bare_modules(model), path_of(model, model.embed), path_of(model, model.head)
        rules = self._rules(model, modules)
        one = model.tied and self.tied == "both" and bool(rules.keys() & {embed, head})
        if one:  # the branch is the embedding's
            rules = {embed: rules.get(embed) or rules[head]} | rules
            rules.pop(head, None)
        self._check_patterns(rules)
        sites = [self._site(path, rule, modules[path]) for path, rule in rules.items()]
        if one:
            shares = {"rule": f"tied to {embed}", "tied_to": embed}
            sites.append(replace(sites[0], path=head, parameters=0, formula="", **shares))
        saved = ()
        if self.modules_to_save:
            saved = plan_trained(model, self.modules_to_save, "modules_to_save", self.tied)
        twice = {site.path for site in sites} & {site.path.rpartition(".")[0] for site in saved}
        if twice:
            raise ValueError(
                f"target_modules and modules_to_save both mean {min(twice)}; leave it to one of them"
            )
        return (*sites, *saved)

    def _rules(self, model, modules) -> dict[str, str]:
        """Path -> the rule that means it."""
        among = [p for p, m in modules.items() if is_base_layer(m) or isinstance(innermost(m), nn.Embedding)]
        what, layers = "linear layer or embedding", self.layers_to_transform
        targets = self.target_modules or model.usual_targets
        rules = match(model, targets, self.exclude_modules, layers, among=among, what=what)
        ends = [path for path in rules if modules[path] in (model.embed, model.head)]
        if model.tied and ends and self.tied == "refuse":
            raise ValueError(
                f"target_modules means {' and '.join(ends)}, and head and embedding are one weight (tied); "
                "say tied='both' for one branch on both, tied='untie' for that alone, or leave it out"
            )
        return rules

    def _check_patterns(self, paths) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            dead = sorted(pattern.keys() - {first_fit(pattern, path) for path in paths})
            if dead:
                raise ValueError(
                    f"{name} {dead[:1]} counts for no layer: it fits none that target_modules means, or a "
                    "rule before it fits them too; remove it, or put it first"
                )

    def _site(self, path: str, rule: str, layer: nn.Module) -> Site:
        r = self.rank_pattern.get(first_fit(self.rank_pattern, path), self.r)
        alpha = self.alpha_pattern.get(first_fit(self.alpha_pattern, path), self.alpha)
        linear = is_base_layer(layer)
        if not linear and self.init in TAKEN_OFF:
            raise ValueError(
                f"init {self.init!r} is for linear layers, and target_modules means the embedding {path}; "
                "leave one of them out"
            )
        shape = (layer.out_features, layer.in_features) if linear else embedding_shape(layer)
        if self.init in TAKEN_OFF and 2 * r > min(shape):
            raise ValueError(
                f"r is {r} with init {self.init!r}, whose file is a LoRA of rank {2 * r}, above the smaller "
                f"side of {path} ({shape[0]} x {shape[1]}); use at most {min(shape) // 2}"
            )
        if r > min(shape):
            raise ValueError(
                f"r is {r}, above the smaller side of {path} ({shape[0]} x {shape[1]}); use at most "
                f"{min(shape)}, for this layer alone with rank_pattern"
            )
        parameters, formula = self.cost(r, *shape)
        return Site(path, rule, shape, parameters, formula, r=r, scaling=self.scale(r, alpha))

    def cost(self, r: int, fan_out: int, fan_in: int) -> tuple[int, str]:
        """Trainable parameters of one layer, and the formula with its numbers."""
        return r * (fan_in + fan_out), f"{r} ({fan_in} + {fan_out})"

    def inject(self, model, plan, name, seed):
        modules = model.adapters[name].modules
        for site in plan.sites:
            if site.r is None:
                continue
            base = get_module(model, site.path)
            if site.tied_to:
                layer = TiedLoRAHead(base, modules[site.tied_to], self.dropout)
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
            layer.start_at(*self.inits[self.init](base, site.r, site.scaling, random))
        elif self.init in TAKEN_OFF:
            layer.start_at(layer.lora_A, layer.lora_B)  # its shapes
        return layer

    def linear(self, base: nn.Module, site: Site, device) -> LoRALinear:
        return LoRALinear(base, site.r, site.scaling, self.dropout, device)

    def count(self, plan):
        own = [s for s in plan.sites if not s.tied_to]
        return sum(s.r * sum(s.shape) if s.r else prod(s.shape) for s in own)

    def param_groups(self, parameters):
        if self.lr_ratio == 1:
            return super().param_groups(parameters)
        fast = {name: p for name, p in parameters.items() if name.endswith(".lora_B")}
        rest = [p for name, p in parameters.items() if name not in fast]
        return [{"params": rest, "lr_ratio": 1.0}, {"params": list(fast.values()), "lr_ratio": self.lr_ratio}]
