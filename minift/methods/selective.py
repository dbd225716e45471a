"""Selective fine-tuning: some modules of the model train, the rest stays.

    y = base(x; theta'),   theta' = theta at the start, in fp32

The head alone, the last k blocks and the head, or any modules that rules mean. What trains is a copy in fp32,
rounded to the base's dtype for computing, so that the base keeps its bits and the adapter can be switched
off.
Trainable: the sizes of those parameters, a tied weight once. Also used for `modules_to_save` of LoRA, BitFit
and LayerNorm tuning.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import nn
from torch.func import functional_call

from minift.methods.base import Method, Plan, Site
from minift.models.interface import LanguageModel, is_quantized, parameter_count
from minift.models.targets import match
from minift.models.wrappers import Wrapper, bare_modules, get_module, innermost, replace_module

TIED = ("refuse", "both", "untie")


class Trained(Wrapper):
    """A module computed with its own copy of some parameters; `like` shares another wrapper's copy."""

    def __init__(self, base: nn.Module, names: list[str], prefix: str = "", like: "Trained | None" = None):
        super().__init__(base)
        self.names = names
        self.keys = {} if like else {name: f"{prefix}{name}" for name in names}
        for name in names:
            start = getattr(base, name)
            own = like.get_parameter(name) if like else nn.Parameter(start.detach().float().clone())
            self.register_parameter(name, own)

    def forward(self, *arguments):
        if not self.active:
            return self.base(*arguments)
        own = {name: getattr(self, name).to(getattr(self.base, name).dtype) for name in self.names}
        adapted = functional_call(self.base, own, arguments)
        return adapted if self.rows is None else self.where_meant(adapted, self.base(*arguments))

    def replaced(self):
        return sum(getattr(self, name).numel() for name in self.keys)

    def fold(self, tensors):
        return {name: getattr(self, name).to(t) if name in self.names else t for name, t in tensors.items()}


def plan_trained(
    model: LanguageModel, rules, field: str, tied: str = "refuse", layers=(), only: tuple[str, ...] = ()
) -> tuple[Site, ...]:
    """A site for each parameter under the modules that rules mean; `only` keeps those of that last name."""
    modules = bare_modules(model)
    rules = match(model, rules, layers=layers, fields=(field, "exclude_modules"), among=modules)
    head, embed = path_of(model, model.head), path_of(model, model.embed)
    sites, seen = [], {}
    for root, rule in rules.items():
        for path, module in modules.items():
            if path != root and not path.startswith(root + "."):
                continue
            for name, parameter in innermost(module)._parameters.items():
                if parameter is None or (only and name not in only) or f"{path}.{name}" in seen:
                    continue
                _check_trainable(path, module, field)
                shape, size = tuple(parameter.shape), parameter.numel()
                seen[f"{path}.{name}"] = Site(
                    f"{path}.{name}", rule, shape, size, " x ".join(map(str, shape)), replaces=True
                )
    sites = list(seen.values())
    if model.tied and any(site.path in (f"{head}.weight", f"{embed}.weight") for site in sites):
        sites = _with_tie(sites, f"{head}.weight", f"{embed}.weight", tied)
    return tuple(sites)


def _check_trainable(path, module, field):
    if isinstance(module, Wrapper):
        raise ValueError(
            f"{field} means {path}, which carries an adapter ({type(module).__name__}); merge or remove "
            "that first"
        )
    if is_quantized(module):
        raise ValueError(
            f"{field} means {path}, whose {module.layout.format.name} codes have no gradient; leave it "
            "out, or load the model without quantization"
        )


def _with_tie(sites, head: str, embed: str, tied: str) -> list[Site]:
    """What training the head or the embedding means where they are one weight."""
    means = {site.path: site for site in sites}
    asked = embed if embed in means else head
    if tied == "refuse":
        raise ValueError(
            f"{head} and {embed} are one weight (tied); say tied='both' to train both as one, or "
            "tied='untie' to give the one that is named its own"
        )
    rest = [site for site in sites if site.path not in (head, embed)]
    if tied == "untie":
        return [*rest, *[means[name] for name in (embed, head) if name in means]]
    first = means[asked]
    shared = [
        Site(embed, first.rule, first.shape, first.parameters, first.formula, replaces=True),
        Site(head, "tied to " + embed.removesuffix(".weight"), first.shape, 0, replaces=True),
    ]
    return [*shared, *rest]


def inject_trained(model: LanguageModel, sites, name: str, prefix: str = "") -> None:
    """Put a Trained wrapper around each module that sites name parameters of."""
    groups = {}
    for site in sites:
        path, _, parameter = site.path.rpartition(".")
        groups.setdefault(path, []).append(parameter)
    shares = {
        site.path.rpartition(".")[0]: site.rule.removeprefix("tied to ")
        for site in sites
        if not site.parameters
    }
    modules = model.adapters[name].modules
    for path, parameters in groups.items():
        like = modules[shares[path]] if path in shares else None
        modules[path] = Trained(get_module(model, path), parameters, prefix, like)
        replace_module(model, path, modules[path])


def path_of(model: LanguageModel, wanted: nn.Module) -> str:
    return next(path for path, module in bare_modules(model).items() if module is wanted)


@dataclass(frozen=True)
class Selective(Method):
    name: ClassVar[str] = "selective"
    law: ClassVar[str] = "sizes of the chosen parameters"

    modules: tuple[str, ...] = ()
    """Names, or globs over whole paths, of modules; everything in them trains."""
    last_blocks: int = 0
    """This many blocks from the end train."""
    head: bool = True
    """The head trains."""
    tied: str = "refuse"
    """Where head and embedding are one weight: both (train as one), untie (the one that is meant), refuse."""

    def __post_init__(self):
        value = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        object.__setattr__(self, "modules", value)
        if (
            isinstance(self.last_blocks, bool)
            or not isinstance(self.last_blocks, int)
            or self.last_blocks < 0
        ):
            raise ValueError(f"last_blocks is {self.last_blocks!r}; it is a whole number of at least 0")
        if self.tied not in TIED:
            raise ValueError(f"tied is {self.tied!r}; it is one of {', '.join(TIED)}")
        if not (self.modules or self.last_blocks or self.head):
            raise ValueError("head is false and modules and last_blocks are empty: nothing would train")

    def plan(self, model):
        blocks = len(model.blocks)
        if self.last_blocks > blocks:
            raise ValueError(f"last_blocks is {self.last_blocks}; the model has {blocks} blocks")
        rules = [f"{model.blocks_path}.{i}" for i in range(blocks - self.last_blocks, blocks)]
        rules += [*self.modules, *([path_of(model, model.head)] if self.head else [])]
        sites = plan_trained(model, rules, "modules", self.tied)
        return Plan(self, sites, parameter_count(model))

    def inject(self, model, plan, name, seed):
        inject_trained(model, plan.sites, name)

    def count(self, plan):
        return sum(prod(site.shape) for site in plan.sites if not site.rule.startswith("tied to "))
