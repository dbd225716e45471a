"""Modules computed with their own copy of some parameters.

    y = base(x; theta'),   theta' = theta at the start, in fp32

theta' is rounded to the base's dtype for computing, so that the base keeps its bits and the adapter can be
switched off. Selective fine-tuning, BitFit, LayerNorm tuning and LoRA's `modules_to_save` are made of this.
Trainable: the sizes of those parameters, a tied weight once.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.func import functional_call

from minift.methods.plan import Site
from minift.models.interface import LanguageModel
from minift.models.targets import match
from minift.models.wrappers import Wrapper, bare_modules, get_module, innermost, path_of, replace_module

TIED = ("refuse", "both", "untie")
NEW_HEAD = "new head"  # the rule of what a checkpoint did not have


class Trained(Wrapper):
    """A module computed with its own copy of some parameters, or with a parameter of another wrapper."""

    def __init__(
        self, base: nn.Module, names: list[str], prefix: str = "", shared: dict | None = None, stands_for=0
    ):
        super().__init__(base)
        self.names, self.stands_for, shared = names, stands_for, shared or {}
        self.keys = {name: f"{prefix}{name}" for name in names}
        self.copied = {self.keys[name] for name in shared}
        for name in names:
            start = getattr(base, name).detach()
            own = shared[name] if name in shared else nn.Parameter(start.to(torch.float32, copy=True))
            self.register_parameter(name, own)

    def forward(self, *arguments):
        if not self.active:
            return self.base(*arguments)
        adapted = functional_call(innermost(self), self.own(), arguments)
        return adapted if self.rows is None else self.where_meant(adapted, self.base(*arguments))

    def own(self) -> dict[str, torch.Tensor]:
        """The bare module's parameters that are not its own here, in its dtype; an outer wrapper's win."""
        inner = self.base.own() if isinstance(self.base, Trained) and self.base.active else {}
        bare = innermost(self)
        return inner | {name: getattr(self, name).to(getattr(bare, name).dtype) for name in self.names}

    def state(self):
        """Copies of what is shared: a file holds every key's own tensor."""
        return {k: t.clone() if k in self.copied else t for k, t in super().state().items()}

    def replaced(self):
        return self.stands_for

    def fold(self, tensors):
        return {name: getattr(self, name).to(t) if name in self.names else t for name, t in tensors.items()}


def plan_trained(
    model: LanguageModel, rules, field: str, tied: str = "refuse", only: tuple[str, ...] = ()
) -> tuple[Site, ...]:
    """A site for each parameter under the modules that rules mean; `only` keeps those of that last name."""
    modules = bare_modules(model)
    rules = match(model, rules, fields=(field, "exclude_modules"), among=modules, what="module")
    head, embed = path_of(model, model.head), path_of(model, model.embed)
    sites, alive = {}, set()
    for root, rule in rules.items():
        for path, module in modules.items():
            if path != root and not path.startswith(root + "."):
                continue
            for name, parameter in innermost(module)._parameters.items():
                if parameter is None or (only and (name not in only or model.is_new(path))):
                    continue  # what is new trains as a whole, by plan_new_head
                alive.add(rule)
                if f"{path}.{name}" in sites:
                    continue
                _check_trainable(path, module, parameter, field)
                shape, size = tuple(parameter.shape), parameter.numel()
                formula = " x ".join(map(str, shape))
                sites[f"{path}.{name}"] = Site(f"{path}.{name}", rule, shape, size, formula, replaces=True)
    dead = [rule for rule in dict.fromkeys(rules.values()) if rule not in alive]
    if dead:
        raise ValueError(f"{field} {dead} mean modules without {' or '.join(only) or 'parameters'}")
    if model.tied and sites.keys() & {f"{head}.weight", f"{embed}.weight"}:
        if tied == "both":
            for path in (embed, head):
                _check_trainable(path, modules[path], model.embed_weight, field)
        return _with_tie(list(sites.values()), f"{head}.weight", f"{embed}.weight", tied)
    return tuple(sites.values())


def _check_trainable(path, module, parameter, field):
    if isinstance(module, Wrapper):
        raise ValueError(
            f"{field} means {path}, which carries an adapter ({type(module).__name__}); merge or remove "
            "that first"
        )
    if not parameter.is_floating_point():
        raise ValueError(
            f"{field} means {path}, whose {module.layout.format.name} codes have no gradient; leave it "
            "out, or load the model without quantization"
        )


def _with_tie(sites, head: str, embed: str, tied: str) -> tuple[Site, ...]:
    """What training the head or the embedding means where they are one weight."""
    means = {site.path: site for site in sites if site.path in (head, embed)}
    rest = [site for site in sites if site.path not in means]
    if tied == "refuse":
        raise ValueError(
            f"{head} and {embed} are one weight (tied); say tied='both' to train both as one, or "
            "tied='untie' to give the one that is named its own"
        )
    if tied == "untie":  # one of two weights stands for the shared one, any other is added
        own = [means[name] for name in (embed, head) if name in means]
        return (*rest, *own[:-1], replace(own[-1], replaces=False))
    first = next(iter(means.values()))
    rule = f"tied to {embed.removesuffix('.weight')}"
    shares = Site(head, rule, first.shape, 0, replaces=True, tied_to=embed)
    return (replace(first, path=embed), shares, *rest)


def plan_new_head(model: LanguageModel, sites) -> tuple[Site, ...]:
    """A site for each parameter of the head that is new and that the method's own sites do not train."""
    taken, found = {site.path for site in sites}, []
    for path, module in bare_modules(model).items():
        if not model.is_new(path):
            continue
        if path in taken:
            raise ValueError(f"the rules mean {path}, which is new and trains as a whole; leave it out")
        for name, parameter in innermost(module)._parameters.items():
            if parameter is None or parameter is model.embed_weight or f"{path}.{name}" in taken:
                continue
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{path} is new and trains, and it is quantized: its codes have no gradient; leave it "
                    "out of what is quantized (skip)"
                )
            shape, size = tuple(parameter.shape), parameter.numel()
            formula = " x ".join(map(str, shape))
            found.append(Site(f"{path}.{name}", NEW_HEAD, shape, size, formula, replaces=True))
    return tuple(found)


def inject_trained(model: LanguageModel, sites, name: str, prefix: str = "") -> None:
    """Put a Trained wrapper around each module that sites name parameters of."""
    groups = {}
    for site in sites:
        groups.setdefault(site.path.rpartition(".")[0], []).append(site)
    modules = model.adapters[name].modules
    for path, own in groups.items():
        names = [site.path.rpartition(".")[2] for site in own]
        shared = {
            parameter: getattr(modules[site.tied_to.rpartition(".")[0]], parameter)
            for parameter, site in zip(names, own, strict=True)
            if site.tied_to
        }
        stands_for = sum(site.parameters for site in own if site.replaces)
        modules[path] = Trained(get_module(model, path), names, prefix, shared, stands_for)
        replace_module(model, path, modules[path])
