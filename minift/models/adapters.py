"""model.adapters: the one place that knows adapters by name."""

import contextlib
import re
from dataclasses import dataclass, field

import torch

from minift.models.slots import Slot
from minift.models.wrappers import Wrapper, unwrap


@dataclass(frozen=True)
class Adapter:
    """A resident adapter: `model.adapters[name]`."""

    method: object  # a methods.Method
    plan: object  # its methods.Plan
    modules: dict = field(default_factory=dict, repr=False)  # path -> its wrapper, or "" -> its slot

    @property
    def parts(self) -> list[Wrapper | Slot]:
        return list(self.modules.values())


def own_parameters(part: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a wrapper, without those of what it wraps; of a slot, all."""
    return [p for name, p in part.named_parameters() if not name.startswith("base.")]


class Adapters(dict):
    """Name -> Adapter, in the order in which they were applied.

    Any number may be resident and active; where two meet in a layer, the later one is wrapped around the
    earlier one. Switching sets flags and copies nothing.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def add(self, name: str, method, seed: int = 0):
        """Freeze the model, plan, inject; returns the Plan. Nothing is touched when the plan fails."""
        self.check_name(name, method)
        reason = method.refuses(self.model)
        if reason:
            raise ValueError(f"{method.name} cannot run on this model: {reason}")
        plan = method.plan(self.model)
        trained = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        self.model.requires_grad_(False)
        self[name] = Adapter(method, plan)
        try:
            method.attach(self.model, plan, name, seed)
        except BaseException:
            self._take_out(name)
            for parameter, trains in trained.items():
                parameter.requires_grad_(trains)
            raise
        return plan

    def check_name(self, name: str, method) -> None:
        """Whether a new adapter of this method may be called so."""
        if name in self:
            raise ValueError(
                f"an adapter named {name!r} is resident already ({', '.join(self)}); give another name"
            )
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"adapter name {name!r} may hold letters, digits, '_' and '-', and no dot")
        if name in method.reserved():
            raise ValueError(f"adapter name {name!r} is the key of a method; give another name")
        if name in self.merged():
            raise ValueError(
                f"{name!r} is merged into the weights and kept; unmerge it, or give another name"
            )

    def active(self) -> list[str]:
        """The names of the adapters that work."""
        return [name for name, adapter in self.items() if all(part.active for part in adapter.parts)]

    def switch(self, *names: str) -> None:
        """Let these adapters work and no other; without names, none: the base model.

        Not between a forward and its backward: gradient checkpointing recomputes with what works then.
        """
        names = tuple(n for name in names for n in ([name] if isinstance(name, str) else name))
        for name in names:
            self._known(name)
        for name, adapter in self.items():
            self._can_rest(name, name in names)
            for part in adapter.parts:
                part.active, part.rows = name in names, None

    def train(self, name: str) -> None:
        """Let this adapter's parameters train and no other's, as it was when it was added."""
        adapter = self._known(name)
        self._can_rest(name, False)
        self.model.requires_grad_(False)
        for part in adapter.parts:
            for parameter in own_parameters(part):
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def disable(self):
        """The base model for a while: `with model.adapters.disable(): ...`"""
        with self._as_before():
            self.switch()
            yield self.model

    @contextlib.contextmanager
    def rows(self, names: list):
        """One adapter for each text of the batch: a name, several names, or None for the base model."""
        chosen = [(n,) if isinstance(n, str) else tuple(n or ()) for n in names]
        with self._as_before():
            self.switch(*dict.fromkeys(name for each in chosen for name in each))
            for name in self.active():
                mask = torch.tensor([name in each for each in chosen], device=self.model.device)
                for part in self[name].parts:
                    part.rows = mask
            yield self.model

    @contextlib.contextmanager
    def _as_before(self):
        """Give the parts back what they had; contexts may be nested, and adapters come and go inside."""
        before = [(part, part.active, part.rows) for adapter in self.values() for part in adapter.parts]
        try:
            yield
        finally:
            for part, active, rows in before:
                part.active, part.rows = active, rows

    def by_rows(self) -> bool:
        """Whether some adapter works for some texts of the batch only."""
        return any(part.rows is not None for adapter in self.values() for part in adapter.parts)

    def remove(self, name: str) -> None:
        """Take an adapter out; the base weights are as they were."""
        self._known(name)
        self._can_rest(name, False)
        self._take_out(name)

    def _take_out(self, name: str) -> None:
        for path, part in self[name].modules.items():
            if isinstance(part, Slot):
                self.model.slots = type(self.model.slots)(s for s in self.model.slots if s is not part)
            else:
                unwrap(self.model, path, part)
        del self[name]

    def merged(self) -> list[str]:
        """The names of adapters that `minift.merge(model, name, keep=True)` folded in."""
        return list(self.model.kept)

    def __repr__(self):
        """A line for each adapter."""
        rows = []
        for name, adapter in self.items():
            works = "active" if name in self.active() else "resting"
            trains = any(p.requires_grad for part in adapter.parts for p in own_parameters(part))
            rows.append(f"{name}: {adapter.method.name}, {works}{', trains' * trains}")
        return "\n".join(rows) or "no adapters"

    def _known(self, name: str) -> Adapter:
        if name not in self:
            raise ValueError(f"no adapter named {name!r}; resident: {sorted(self) or 'none'}")
        return self[name]

    def _can_rest(self, name: str, works: bool) -> None:
        if not works and not self[name].parts:
            raise ValueError(
                f"{self[name].method.name} changed the base weights themselves, so {name!r} cannot be "
                "switched off or removed; load the model again"
            )
