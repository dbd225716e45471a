"""The contract between methods and everything else: Method.

A method is a frozen dataclass whose fields are all its hyperparameters. It plans on any model, also on the
meta device, and the plan says every layer it will touch before anything is touched.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch

from minift.methods.plan import Plan, Site
from minift.methods.trained import inject_trained, plan_new_head
from minift.models.adapters import own_parameters
from minift.models.interface import LanguageModel, parameter_count


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. Subclasses add their hyperparameters as fields and define sites, inject, count."""

    name: ClassVar[str] = ""  # the key in METHODS
    law: ClassVar[str] = ""  # trainable parameters as a formula
    identity_at_init: ClassVar[str] = "bitwise"  # or "none": starts as another model than its base
    unmergeable: ClassVar[str] = ""  # why it is no change of weights, if it is not
    adapter_file: ClassVar[bool] = True  # or what trains is the whole model

    def refuses(self, model: LanguageModel) -> str | None:
        """Why the method cannot run on this model, or None."""
        return None

    def sites(self, model: LanguageModel) -> tuple[Site, ...]:
        """What the method itself trains on a model; pure, and works on the meta device."""
        raise NotImplementedError

    def plan(self, model: LanguageModel) -> Plan:
        """The sites, and what is new in the model's head, which trains beside them."""
        sites = self.sites(model)
        return Plan(self, sites, parameter_count(model), plan_new_head(model, sites))

    def attach(self, model: LanguageModel, plan: Plan, name: str, seed: int) -> None:
        """`inject`, and the new head."""
        self.inject(model, plan, name, seed)
        inject_trained(model, plan.head, name)

    def inject(self, model: LanguageModel, plan: Plan, name: str, seed: int) -> None:
        """Rewire a frozen model in place; put each wrapper or slot into `model.adapters[name].modules`."""
        raise NotImplementedError

    def count(self, plan: Plan) -> int:
        """Trainable parameters of the sites by the paper's formula, never read off tensors."""
        raise NotImplementedError

    def with_tokenizer(self, tokenizer) -> "Method":
        """The method with what it says in text turned into token ids."""
        return self

    def param_groups(self, parameters: dict[str, torch.nn.Parameter]) -> list[dict]:
        """What the optimizer is given; a group's learning rate is the schedule's times its `lr_ratio`."""
        return [{"params": list(parameters.values()), "lr_ratio": 1.0}]

    def extra_loss(self, model: LanguageModel, name: str) -> torch.Tensor | None:
        """A term added to the mean loss of an effective batch, once."""
        return None

    def take_step(self, model: LanguageModel, name: str, optimizer, step: int, total: int) -> None:
        """Step `step` (from 0) of `total`, with the clipped gradients in place."""
        optimizer.step()

    @classmethod
    def reserved(cls) -> set[str]:
        """The keys of all methods, which are no names for adapters."""
        found, left = set(), [Method]
        while left:
            kind = left.pop()
            left.extend(kind.__subclasses__())
            found.add(kind.name)
        return found


def check_whole(method: Method, name: str, least: int) -> None:
    """The field `name` of a method, or each value of one that is a table, is a whole number."""
    for what, value in _values(method, name):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what} is {value!r}; it is a whole number of at least {least}")


def check_number(
    method: Method, name: str, least: float = 0, above: float | None = None, below: float = inf
) -> None:
    """Likewise, a finite number of at least `least`, or above `above` where that is given."""
    start = f"of at least {least}" if above is None else f"above {above}"
    meant = f"a finite number {start}" if below == inf else f"a number {start} and below {below}"
    for what, value in _values(method, name):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (least <= value if above is None else above < value) or not value < below:
            raise ValueError(f"{what} is {value!r}; it is {meant}")


def check_one_of(method: Method, name: str, known) -> None:
    value = getattr(method, name)
    if value not in tuple(known):
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(known)}")


def check_flag(method: Method, name: str) -> None:
    value = getattr(method, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it is True or False")


def _values(method, name) -> list[tuple[str, object]]:
    """What errors call the values of a field, and the values."""
    value = getattr(method, name)
    return [(f"{name} {k}", v) for k, v in value.items()] if isinstance(value, dict) else [(name, value)]


def trainable(model) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter for everything that trains, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_adapter(model: LanguageModel) -> str:
    """The name of the adapter that trains: of a method that trains the base itself, or with a parameter of
    its own that asks for a gradient."""
    names = [
        name
        for name, adapter in model.adapters.items()
        if not adapter.parts or any(p.requires_grad for part in adapter.parts for p in own_parameters(part))
    ]
    if len(names) != 1:
        raise ValueError(
            f"one adapter trains at a time; here {', '.join(names) or 'none'} would (minift.apply and "
            "minift.load_adapter freeze the others)"
        )
    return names[0]


def buffers(model) -> dict[str, torch.Tensor]:
    """Name -> buffer: what methods keep beside their parameters, which a checkpoint of a run holds."""
    return dict(model.named_buffers())
