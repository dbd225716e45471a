"""The contract between methods and everything else: Method, Plan, Site.

A method is a frozen dataclass whose fields are all its hyperparameters. It plans on any model, also on the
meta device, and the plan says every layer it will touch before anything is touched.
"""

import hashlib
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch

from minift.models.adapters import own_parameters
from minift.models.interface import LanguageModel


@dataclass(frozen=True)
class Site:
    """One row of a plan: what is adapted, by which rule, and what that adds."""

    path: str  # module path, without wrappers; of a weight that is trained itself, the parameter's name
    rule: str
    shape: tuple[int, ...]  # of the adapted weight, (out, in), or of what is trained
    parameters: int  # trainable, by the method's formula for this site
    formula: str = ""  # that formula with its numbers, as "8 (4096 + 4096)"
    dtype: str = "float32"  # of the trainable parameters
    r: int | None = None
    scaling: float | None = None
    replaces: bool = False  # stands in the place of base parameters instead of beside them
    tied_to: str = ""  # the path of the site that it shares its weight with, which counts the parameters


@dataclass(frozen=True)
class Plan:
    """What a method will train. Printing it gives the table and the line of totals."""

    method: "Method"
    sites: tuple[Site, ...]
    base_parameters: int  # of the model before the method, a tied weight counted once

    @property
    def trainable(self) -> int:
        return self.method.count(self)

    @property
    def added(self) -> int:
        """Parameters that come on top of the base's."""
        return sum(site.parameters for site in self.sites if not site.replaces)

    @property
    def total(self) -> int:
        return self.base_parameters + self.added

    def totals(self) -> str:
        share = 100 * self.trainable / self.total
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"
        )

    def table(self, every_layer: bool = True, bases: dict[str, str] | None = None) -> str:
        """A row for each site, or one for those that differ in the block alone.

        `bases`: path -> what the base layer there is stored as, for one more column.
        """
        rows = [("module", "rule", "r", "alpha", "scaling", "dtype", "base", "parameters")]
        scale = getattr(self.method, "scale", None)  # (r, alpha), proportional to alpha
        for path, sites in _each(self.sites) if every_layer else _grouped(self.sites):
            s = sites[0]
            known = scale and s.r and s.scaling is not None
            rows.append(
                (
                    path,
                    s.rule,
                    "-" if s.r is None else str(s.r),
                    f"{s.scaling / scale(s.r, 1.0):g}" if known else "-",
                    "-" if s.scaling is None else f"{s.scaling:g}",
                    s.dtype,
                    (bases or {}).get(s.path, "-"),
                    f"{sum(x.parameters for x in sites):,}",
                )
            )
        if bases is None:
            rows = [(*row[:6], row[7]) for row in rows]
        return aligned(rows, right=(2, 3, 4, len(rows[0]) - 1))

    def __str__(self):
        return f"{self.table(every_layer=False)}\n{self.totals()}"


def aligned(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Rows of texts as a table; the columns `right` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _each(sites):
    return [(s.path, [s]) for s in sites]


def _grouped(sites):
    """Sites that differ in one number of their path and nothing else, under that path with {first-last}."""
    groups = {}
    for s in sites:
        parts = s.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        number = None if at is None else int(parts[at])
        shape = (*parts[:at], "", *parts[at + 1 :]) if at is not None else tuple(parts)
        groups.setdefault((shape, at, s.rule, s.shape, s.r, s.scaling, s.dtype), []).append((number, s))
    named = []
    for (shape, at, *_), members in groups.items():
        numbers = [number for number, _ in members]
        if at is None:
            path = ".".join(shape)
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            span = str(numbers[0]) if len(numbers) == 1 else f"{{{numbers[0]}-{numbers[-1]}}}"
            path = ".".join((*shape[:at], span, *shape[at + 1 :]))
        else:
            path = ".".join((*shape[:at], "{" + ",".join(map(str, numbers)) + "}", *shape[at + 1 :]))
        named.append((path, [s for _, s in members]))
    return named


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. Subclasses add their hyperparameters as fields and define plan, inject, count."""

    name: ClassVar[str] = ""  # the key in METHODS
    law: ClassVar[str] = ""  # trainable parameters as a formula
    identity_at_init: ClassVar[str] = "bitwise"  # or "none": starts as another model than its base
    unmergeable: ClassVar[str] = ""  # why it is no change of weights, if it is not
    adapter_file: ClassVar[bool] = True  # or what trains is the whole model

    def refuses(self, model: LanguageModel) -> str | None:
        """Why the method cannot run on this model, or None."""
        return None

    def plan(self, model: LanguageModel) -> Plan:
        """Sites and shapes; pure, and works on the meta device."""
        raise NotImplementedError

    def inject(self, model: LanguageModel, plan: Plan, name: str, seed: int) -> None:
        """Rewire a frozen model in place; put each wrapper or slot into `model.adapters[name].modules`."""
        raise NotImplementedError

    def count(self, plan: Plan) -> int:
        """Trainable parameters by the paper's formula, never read off tensors."""
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


def generator(seed: int, path: str) -> torch.Generator:
    """A random stream that depends on (seed, path) alone, not on the order in which layers are made."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
