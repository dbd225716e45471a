"""Adapter arithmetic: a new LoRA adapter from resident ones, defined on deltas and never on factors.

    cat:   delta = sum_i w_i delta_i exactly: A = [A_1; A_2; ..], B = [w_1 s_1/s B_1, w_2 s_2/s B_2, ..]
    svd:   the nearest matrix of rank r to that sum, from the factors alone
    ties:  each delta_i cut to its largest entries, a sign elected for each entry, the mean of those w_i
           delta_i that have it; then the nearest of rank r
    dare:  sum_i w_i (delta_i with entries dropped at random, the rest divided by 1 - p); then the same

An adapter that does not cover a layer has delta zero there. s is the scaling of the first that covers it.
Sources: Yadav et al. 2023, arXiv:2306.01708, section 4.2 and algorithm 1 (TIES); Yu et al. 2023,
arXiv:2311.03099, section 3.2 (DARE).
"""

import math

import torch

from minift.methods.factors import Factors, check_finite, cut, factors_of, put, svd, with_ranks
from minift.methods.lora import LoRA
from minift.methods.low_rank import TiedLoRAHead
from minift.methods.peft_lora import shortest
from minift.methods.trained import Trained
from minift.models.interface import LanguageModel
from minift.models.randomness import generator
from minift.models.slots import Slot
from minift.models.wrappers import path_of

NEEDS = {"cat": (), "svd": ("r",), "ties": ("r", "density"), "dare": ("r", "p")}


def combine(
    model: LanguageModel,
    weights: dict[str, float],
    name: str,
    how: str = "cat",
    r: int | None = None,
    density: float | None = None,
    p: float | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Make the adapter `name` from the adapters that `weights` (name -> weight) names.

    `r` is the rank that svd, ties and dare cut to; `density` the share of entries that ties keeps of each
    delta; `p` the share that dare drops, by a stream of (seed, adapter, path). rslora and dropout are the
    first adapter's. The sources keep their tensors and rest; the new one works in their place and trains,
    as after `apply`. Returns, for each path, the exact error of the cut in the Frobenius norm; nothing is
    changed when something does not fit.
    """
    model.adapters.check_name(name, LoRA())
    _check(model, weights, how, {"r": r, "density": density, "p": p})
    sources = {source: read(model, source) for source in weights}
    tied = _tied(model, sources)
    made, errors = {}, {}
    for path in dict.fromkeys(path for found in sources.values() for path in found):
        terms = {n: (float(weights[n]), found[path]) for n, found in sources.items() if path in found}
        whole, errors[path] = layer(terms, path, how, r, density, p, seed)
        made[path] = whole.to(max((f.A.dtype for _, f in terms.values()), key=lambda dtype: dtype.itemsize))
        _check_rank(path, whole)
    check_finite(made)
    first = model.adapters[next(iter(weights))].method
    method = LoRA(
        rslora=getattr(first, "rslora", False),
        dropout=getattr(first, "dropout", 0.0),
        target_modules=shortest(model, list(made)),
        tied=tied,
    )
    plan = model.adapters.add(name, with_ranks(method, made), seed)
    scalings = {site.path: site.scaling for site in plan.sites}
    for path, factors in made.items():
        put(model.adapters[name].modules[path], factors.at(scalings[path]))
    for source in weights:
        for part in model.adapters[source].parts:
            part.active = False
    return errors


def layer(terms: dict, path: str, how: str, r, density, p, seed: int) -> tuple[Factors, float]:
    """One layer: (factors in fp64, error of the cut). `terms`: adapter -> (weight, factors)."""
    scaling = next(iter(terms.values()))[1].scaling
    if how in ("cat", "svd"):
        whole = cat(list(terms.values()))
        return (whole, 0.0) if how == "cat" else cut(*svd(whole), scaling, r)
    dense = ties(list(terms.values()), density) if how == "ties" else dare(terms, p, seed, path)
    return cut(*torch.linalg.svd(dense / scaling, full_matrices=False), scaling, r)


def cat(terms: list[tuple[float, Factors]]) -> Factors:
    """sum of w_i delta_i, exactly; in fp64, with the scaling of the first."""
    scaling = terms[0][1].scaling
    A = torch.cat([f.A.double() for _, f in terms])  # (sum of r, in)
    B = torch.cat([f.B.double() * (w * (f.scaling / scaling)) for w, f in terms], 1)  # (out, sum of r)
    return Factors(A, B, scaling)


def ties(terms: list[tuple[float, Factors]], density: float) -> torch.Tensor:
    """(out, in) in fp64. The weights come in before the vote; equal ones are the paper's lambda."""
    trimmed = torch.stack([w * trim(f.delta(), density) for w, f in terms])  # (n, out, in)
    elected = trimmed.sum(0).sign()
    agrees = trimmed.sign() == elected  # zeros agree only with zero, and add nothing
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Zero but for that share of its entries, the largest in magnitude."""
    kept = delta.abs().flatten().topk(max(1, round(density * delta.numel()))).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    mask[kept] = True
    return torch.where(mask.view_as(delta), delta, 0.0)


def dare(terms: dict[str, tuple[float, Factors]], p: float, seed: int, path: str) -> torch.Tensor:
    """(out, in) in fp64. Each adapter has a stream of its own, so that their order does not matter."""
    total = 0.0
    for source, (w, f) in terms.items():
        delta = f.delta()
        kept = torch.rand(delta.shape, generator=generator(seed, f"dare:{source}:{path}")) >= p
        total = total + w * torch.where(kept.to(delta.device), delta / (1 - p), 0.0)
    return total


def read(model: LanguageModel, name: str) -> dict[str, Factors]:
    """Path -> factors of a resident adapter that is low-rank everywhere."""
    adapter, found = model.adapters[name], {}
    for path, part in adapter.modules.items():
        if isinstance(part, TiedLoRAHead):  # the share of a branch that is read with the embedding
            continue
        found[path] = factors_of(part)
        if found[path] is None:
            raise ValueError(
                f"{name!r} is {adapter.method.name} and has no low-rank delta to combine: "
                f"{_reason(adapter.method, part)}"
            )
    if not found:
        raise ValueError(f"{name!r} is {adapter.method.name}, which changed the base weights themselves")
    check_finite(found)
    return found


def _reason(method, part) -> str:
    if isinstance(part, Slot):
        return "virtual tokens change no weight"
    if isinstance(part, Trained):
        return "it trains whole parameters"
    if method.unmergeable:
        return method.unmergeable
    return "what it adds to a weight is no product B A"


def _tied(model: LanguageModel, sources) -> str:
    """The field `tied`: where head and embedding are one weight, whether one branch on both is meant."""
    ends, found = {path_of(model, model.embed), path_of(model, model.head)}, {}
    for source in sources:
        modules = model.adapters[source].modules
        if ends & modules.keys():
            found[source] = any(isinstance(part, TiedLoRAHead) for part in modules.values())
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{' and '.join(map(repr, found))} do not combine: one adapts embedding and head as one weight, "
            "another one of them alone"
        )
    return "both" if any(found.values()) else "untie"


def _check(model: LanguageModel, weights, how: str, given: dict) -> None:
    if how not in NEEDS:
        raise ValueError(f"how is {how!r}; it is one of {', '.join(NEEDS)}")
    for option, value in given.items():
        if value is None and option in NEEDS[how]:
            raise ValueError(f"combining by {how} needs {' and '.join(NEEDS[how])}; {option} is missing")
        if value is not None and option not in NEEDS[how]:
            raise ValueError(f"combining by {how} uses no {option}; leave it out")
    r, density, p = given.values()
    if r is not None and (type(r) is not int or r < 1):
        raise ValueError(f"r is {r!r}; the rank is a whole number of at least 1")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; it is a share above 0 and at most 1")
    if p is not None and not 0 <= p < 1:
        raise ValueError(f"p is {p!r}; it must be at least 0 and below 1")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"weights is {weights!r}; it is a dict of adapter name -> weight")
    for source, w in weights.items():
        if source not in model.adapters:
            raise ValueError(f"no adapter named {source!r}; resident: {sorted(model.adapters) or 'none'}")
        if type(w) not in (int, float) or not math.isfinite(w):
            raise ValueError(f"the weight of {source!r} is {w!r}; it must be a finite number")


def _check_rank(path: str, factors: Factors) -> None:
    if factors.r > min(factors.shape):
        raise ValueError(
            f"the ranks at {path} add up to {factors.r}, above its smaller side ({factors.shape[0]} x "
            f"{factors.shape[1]}); say how='svd' with r, which is exact from r={min(factors.shape)} on"
        )
