"""Rank editing: the delta of a LoRA adapter at another rank, and the rank that it needs.

    smaller: the nearest delta of that rank, |delta - delta'|_F = s sqrt(sum of S_i^2 over i > r)
    larger:  B' = [B, 0],  A' = [A; random],   delta' = delta, the old factors to the bit

S are the singular values of B A (factors.py). The scaling s stays: alpha' = s r', or s sqrt(r') with rslora.
New rows of A start as LoRA's do, U(-1/sqrt(in), 1/sqrt(in)). A start that is taken off counts: what began
with PiSSA has rank 2r here, and is a plain LoRA afterwards.
"""

import math
from dataclasses import dataclass, replace

import torch

from minift.methods.factors import Factors, alpha_for, check_finite, cut, factors_of, put, svd, with_ranks
from minift.methods.lora import LoRA, first_fit
from minift.methods.low_rank import LoRAEmbedding, LoRALinear, TiedLoRAHead
from minift.methods.plan import Plan, Site, aligned
from minift.methods.trained import Trained
from minift.models.adapters import Adapter
from minift.models.interface import LanguageModel
from minift.models.randomness import generator
from minift.models.targets import fits, nearest

AFRESH = "A and B are new tensors: their optimizer starts afresh, and older checkpoints do not fit."


@dataclass(frozen=True)
class Row:
    """One layer before and after; `norm` and `error` are Frobenius norms, of its delta and of the change."""

    path: str
    shape: tuple[int, int]
    before: int
    after: int
    norm: float
    error: float


@dataclass(frozen=True)
class Ranks:
    """What was done to the ranks, or what is advised. Printing it gives a table and the line of totals."""

    rows: tuple[Row, ...]
    note: str = ""

    @property
    def ranks(self) -> dict[str, int]:
        return {row.path: row.after for row in self.rows}

    @property
    def errors(self) -> dict[str, float]:
        return {row.path: row.error for row in self.rows}

    def totals(self) -> str:
        before, after = (sum(getattr(x, n) * sum(x.shape) for x in self.rows) for n in ("before", "after"))
        norm, error = (math.hypot(*(getattr(x, n) for x in self.rows)) for n in ("norm", "error"))
        share = 100 * error / norm if norm else 0.0
        return (
            f"parameters: {before:,} -> {after:,} || norm: {norm:.4e} || error: {error:.4e} || "
            f"error%: {share:.4f}"
        )

    def __str__(self):
        table = [("module", "r", "new r", "norm", "error", "error%")]
        for x in self.rows:
            share = f"{100 * x.error / x.norm if x.norm else 0:.4f}"
            table.append((x.path, str(x.before), str(x.after), f"{x.norm:.4e}", f"{x.error:.4e}", share))
        lines = [aligned(table, right=range(1, 6)), self.totals()]
        return "\n".join([*lines, self.note] if self.note else lines)


def set_rank(model: LanguageModel, name: str, r, seed: int = 0) -> Ranks:
    """Give a LoRA adapter another rank: the nearest delta below its rank, the same delta above.

    `r` is one rank for all layers, a dict of rule -> rank (layers that no rule fits keep theirs), or what
    `advise` returned. Method and plan are replaced, A and B are new parameters, trainable as the old ones
    were: make a new optimizer. Returns ranks and errors; nothing is changed when something does not fit.
    """
    adapter, parts, old = _editable(model, name)
    new, ranks = edited(old, r, name, seed)
    method = with_ranks(adapter.method, new)
    if any(getattr(part, "start_A", None) is not None for part in parts.values()):
        method = replace(method, init="kaiming")  # the start is part of the factors now
    sites = tuple(_site(site, method, new) for site in adapter.plan.sites)
    for site in sites:
        if site.path in parts:
            put(parts[site.path], new[site.path].at(site.scaling))
    plan = Plan(method, sites, adapter.plan.base_parameters, adapter.plan.head)
    model.adapters[name] = Adapter(method, plan, adapter.modules)
    return ranks


def advise(model: LanguageModel, name: str, energy: float = 0.99) -> Ranks:
    """For each layer the smallest rank that keeps `energy` of the squared singular values of its delta."""
    _, _, old = _editable(model, name)
    return advised(old, energy)


def edited(old: dict[str, Factors], r, name: str = "default", seed: int = 0) -> tuple[dict, Ranks]:
    """Path -> factors at rank r, in their dtype, and what that cost; r as in `set_rank`."""
    check_finite(old)
    new, rows = {}, []
    for path, rank in _wanted(old, r).items():
        now, error = old[path], 0.0
        U, S, Vh = svd(now)
        if rank < now.r:
            smaller, error = cut(U, S, Vh, now.scaling, rank)
            new[path] = smaller.to(now.A.dtype)
        else:  # the old rank is part of the stream's name, so that growing twice draws other rows
            new[path] = grown(now, rank, generator(seed, f"{name}:{path}:{now.r}"))
        rows.append(Row(path, now.shape, now.r, rank, now.scaling * S.norm().item(), error))
    return new, Ranks(tuple(rows), AFRESH)


def grown(factors: Factors, r: int, random: torch.Generator) -> Factors:
    """The same delta at a rank that is not lower."""
    A, B, more = factors.A, factors.B, r - factors.r
    bound = A.shape[1] ** -0.5
    rows = torch.empty(more, A.shape[1]).uniform_(-bound, bound, generator=random)
    return Factors(torch.cat((A, rows.to(A))), torch.cat((B, B.new_zeros(len(B), more)), 1), factors.scaling)


def advised(old: dict[str, Factors], energy: float = 0.99) -> Ranks:
    """`advise` on path -> factors."""
    if type(energy) not in (int, float) or not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; it is a share above 0 and at most 1")
    check_finite(old)
    rows = []
    for path, factors in old.items():
        S = svd(factors)[1]
        lost = S.square().flip(0).cumsum(0).flip(0)  # lost[i] = sum of the squares from i on
        # singular values below 8 k u S_0 are rounding, and count as zero when all energy is to be kept
        allowed = max(1 - energy, (8 * len(S) * 2.0**-53) ** 2) * lost[0]
        r = max(1, int((lost > allowed).sum()))
        norms = factors.scaling * S.norm().item(), factors.scaling * S[r:].norm().item()
        rows.append(Row(path, factors.shape, factors.r, r, *norms))
    return Ranks(tuple(rows))


def _wanted(old: dict[str, Factors], r) -> dict[str, int]:
    """Path -> the rank that is asked for."""
    rules = r.ranks if isinstance(r, Ranks) else r if isinstance(r, dict) else dict.fromkeys(old, r)
    if not rules:
        raise ValueError("r names no layer; give a rank, or rule -> rank")
    for rule, rank in rules.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"r of {rule} is {rank!r}; a rank is a whole number of at least 1")
        if not any(fits(path, rule) for path in old):
            raise ValueError(f"r {[rule]} fits no layer of the adapter; nearest: {nearest(rule, old)}")
    wanted = {}
    for path, factors in old.items():
        most = min(factors.shape)
        wanted[path] = rules.get(first_fit(rules, path), min(factors.r, most))
        if wanted[path] > most:
            raise ValueError(
                f"r is {wanted[path]}, above the smaller side of {path} ({factors.shape[0]} x "
                f"{factors.shape[1]}); use at most {most}"
            )
    return wanted


def _site(site: Site, method: LoRA, new: dict[str, Factors]) -> Site:
    """A row of the plan at its new rank."""
    path = site.tied_to or site.path
    if site.r is None or path not in new:
        return site
    factors = new[path]
    parameters, formula = (0, "") if site.tied_to else method.cost(factors.r, *factors.shape)
    scaling = method.scale(factors.r, alpha_for(method, factors))
    return replace(site, r=factors.r, scaling=scaling, parameters=parameters, formula=formula)


def _editable(model: LanguageModel, name: str) -> tuple[Adapter, dict, dict[str, Factors]]:
    """(adapter, path -> wrapper, path -> factors); modules_to_save and a tied head's share are left out."""
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    adapter = model.adapters[name]
    parts = {p: m for p, m in adapter.modules.items() if not isinstance(m, Trained | TiedLoRAHead)}
    odd = any(type(part) not in (LoRALinear, LoRAEmbedding) for part in parts.values())
    if odd or not isinstance(adapter.method, LoRA):
        raise ValueError(
            f"{name!r} is {adapter.method.name}, whose rank is not edited; of a method with a low-rank "
            f"delta, minift.combine(model, {{{name!r}: 1.0}}, 'other') makes a lora adapter"
        )
    return adapter, parts, {path: factors_of(part) for path, part in parts.items()}
