"""Wrappers: what a method puts around a module, one adapter each, nested.

A wrapper keeps what it stands for in `base`, which may be a wrapper again, so that each keeps its short
formula y = f(x, base(x)). Paths never name `.base`: a path means the outermost module there, and a rule, a
plan and an adapter file say the paths of the bare model.
"""

from typing import ClassVar

import torch
from torch import nn


class Wrapper(nn.Module):
    """One adapter at one place.

    Not `active`: y = base(x), to the bit. `rows` (B,) bool says for which texts of a batch the adapter works;
    None means all of them.
    """

    keys: ClassVar[dict[str, str]] = {}  # parameter -> its key in an adapter file, after the module's path
    additive: ClassVar[bool] = False  # y = base(x) + g(x): commutes with what else is added

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.active, self.rows = True, None
        self.training = base.training
        if is_base_layer(base):
            self.in_features, self.out_features = base.in_features, base.out_features

    def where_meant(self, adapted: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """`adapted` (B, ...) for the texts that the adapter is for, `plain` for the others."""
        return adapted if self.rows is None else pick_rows(self.rows, adapted, plain)

    def state(self) -> dict[str, torch.Tensor]:
        """Key after the path -> tensor, as an adapter file holds them."""
        return {
            key: getattr(self, name) for name, key in self.keys.items() if getattr(self, name) is not None
        }

    def replaced(self) -> int:
        """How many of its parameters stand in the place of the base's."""
        return 0

    def fold(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base's parameters (by name, in one wide dtype) with the adapter merged in."""
        raise NotImplementedError


def check_rows(rows: torch.Tensor, B: int) -> None:
    if len(rows) != B:
        raise ValueError(f"adapters were chosen for {len(rows)} texts, and the batch holds {B}")


def pick_rows(rows: torch.Tensor, adapted: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    check_rows(rows, len(adapted))
    return torch.where(rows.view(-1, *[1] * (adapted.ndim - 1)), adapted, plain)


def is_base_layer(module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def innermost(module: nn.Module) -> nn.Module:
    """The module of the bare model inside any number of wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def chain(module: nn.Module) -> list[Wrapper]:
    """The wrappers around a module, outermost first."""
    found = []
    while isinstance(module, Wrapper):
        found.append(module)
        module = module.base
    return found


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> outermost module, for every module of the bare model, in its order."""
    found, stack = {}, [("", model)]
    while stack:
        path, module = stack.pop()
        if path:
            found[path] = module
        children = [(f"{path}.{name}" if path else name, m) for name, m in innermost(module).named_children()]
        stack.extend(reversed([(p, m) for p, m in children if p != "slots"]))
    return found


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> outermost layer for every linear layer, the head included."""
    return {path: module for path, module in bare_modules(model).items() if is_base_layer(module)}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the bare model, a tied one once, adapters left out."""
    found = {}
    for path, module in bare_modules(model).items():
        for name, parameter in innermost(module)._parameters.items():
            if parameter is not None and all(parameter is not p for p in found.values()):
                found[f"{path}.{name}"] = parameter
    return found


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The outermost module at a path of the bare model."""
    for part in path.split("."):
        model = getattr(innermost(model), part)
    return model


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The path of an outermost module of the bare model."""
    return next(path for path, module in bare_modules(model).items() if module is wanted)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the outermost one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(innermost(get_module(model, parent)) if parent else model, name, module)


def replace_base(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the innermost one, inside its wrappers."""
    wrappers = chain(get_module(model, path))
    if wrappers:
        wrappers[-1].base = module
    else:
        replace_module(model, path, module)


def unwrap(model: nn.Module, path: str, wrapper: Wrapper) -> None:
    """Take one wrapper out of those at a path."""
    wrappers = chain(get_module(model, path))
    at = wrappers.index(wrapper)
    if at == 0:
        replace_module(model, path, wrapper.base)
    else:
        wrappers[at - 1].base = wrapper.base
