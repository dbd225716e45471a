"""AdaLoRA: LoRA as a singular value decomposition, with a budget of ranks that training shares out.

    y = base(x) + scaling * P diag(lambda) Q dropout(x),   scaling = alpha / (r + 1e-5)
    P = lora_B (out, r),   lambda = lora_E (r, 1),   Q = lora_A (r, in)

lambda starts at zero and P, Q at N(0, 0.02^2): exactly the base. The triplets of all layers compete: those of
the lowest scores lose their lambda until target_r of them a layer are left. Trainable: r * (in + out + 1).
Source: Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3 and algorithm 1. The scaling is that of the
authors' code and of PEFT. Those two regularize by the mean of the norms of P^T P - I and Q Q^T - I; here it
is equation 4, the sum of the squared norms, so that the same orth_reg_weight does more.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import check_number, check_whole
from minift.methods.lora import LoRA
from minift.methods.low_rank import LoRALinear
from minift.models.wrappers import get_module, is_base_layer

NAMES = ("lora", "sensitivity", "uncertainty")  # of a factor's numbers, with _A, _B or _E


class SVDLinear(LoRALinear):
    """The branch in three factors, and what scores its triplets.

    `kept` (r,) says which triplets the last allocation left; `sensitivity_A` and so on are the averages of
    equation 9, `uncertainty_A` and so on those of equation 10. A checkpoint of a run holds these buffers.
    """

    keys: ClassVar = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"}

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0, device=None):
        super().__init__(base, r, scaling, dropout, device)
        self.lora_E = nn.Parameter(torch.zeros(r, 1, dtype=torch.float32, device=device))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=device))
        for factor in "ABE":
            for average in NAMES[1:]:
                self.register_buffer(f"{average}_{factor}", torch.zeros_like(getattr(self, f"lora_{factor}")))

    def factors(self):
        """(diag(lambda) Q, P)."""
        return self.lora_E * self.lora_A, self.lora_B

    def start_at(self, A, B):
        self.lora_A.data.copy_(A)
        self.lora_B.data.copy_(B)  # and nothing is taken off, since lambda is zero

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Take the gradients into the averages; before the step that uses them."""
        for factor in "ABE":
            w, sensitivity, uncertainty = (getattr(self, f"{name}_{factor}") for name in NAMES)
            now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()  # equation 8
            sensitivity.lerp_(now, 1 - beta1)  # equation 9
            uncertainty.lerp_((now - sensitivity).abs(), 1 - beta2)  # equation 10

    def scores(self) -> torch.Tensor:
        """S (r,) of equation 7: lambda's own score, and the means over the numbers of its vectors."""
        A, B, E = (getattr(self, f"sensitivity_{f}") * getattr(self, f"uncertainty_{f}") for f in "ABE")
        return E[:, 0] + B.mean(dim=0) + A.mean(dim=1)  # products of the two averages: equation 11

    @torch.no_grad()
    def prune(self) -> None:
        """lambda = 0 for the triplets that are not kept (equation 6)."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0)

    def irregularity(self) -> torch.Tensor:
        """||P^T P - I||^2 + ||Q Q^T - I||^2, Frobenius (equation 4)."""
        P, Q = self.lora_B, self.lora_A
        eye = torch.eye(self.r, dtype=P.dtype, device=P.device)
        return (P.t() @ P - eye).square().sum() + (Q @ Q.t() - eye).square().sum()


def normal(layer: nn.Module, r: int, scaling: float, random: torch.Generator):
    """Q and P ~ N(0, 0.02^2), as in the authors' code."""
    shapes = (r, layer.in_features), (layer.out_features, r)
    return tuple(torch.empty(shape).normal_(0, 0.02, generator=random) for shape in shapes)


@dataclass(frozen=True)
class AdaLoRA(LoRA):
    name: ClassVar[str] = "adalora"
    law: ClassVar[str] = "sum of r (in + out + 1)"
    inits: ClassVar[dict] = {"normal": normal}

    r: int = 12
    """Rank of every layer at the start; at most the smaller side of each."""
    init: str = "normal"
    """Where P and Q start."""
    target_r: int = 8
    """Triplets that are left in the end, per layer on average."""
    tinit: int = 0
    """Steps before the first pruning."""
    tfinal: int = 0
    """Steps after the last allocation."""
    deltaT: int = 1
    """Steps between allocations; meanwhile a pruned triplet may move, and come back."""
    beta1: float = 0.85
    """Of the average of sensitivities."""
    beta2: float = 0.85
    """Of the average of uncertainties."""
    orth_reg_weight: float = 0.1
    """Factor of the term that keeps P and Q orthogonal."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("rslora", "rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                raise ValueError(f"{name} is not for adalora: all layers start at r, with one scaling")
        for name, least in (("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            check_whole(self, name, least)
        if self.target_r > self.r:
            raise ValueError(f"target_r is {self.target_r}, above r, {self.r}; the budget only shrinks")
        for name in ("beta1", "beta2"):
            check_number(self, name, above=0, below=1)
        check_number(self, "orth_reg_weight")

    def scale(self, r, alpha):
        return alpha / (r + 1e-5)

    def sites(self, model):
        sites = super().sites(model)
        for site in sites:
            if site.r and not is_base_layer(get_module(model, site.path)):
                raise ValueError(f"adalora is for linear layers, and {site.path} is none; leave it out")
        return sites

    def cost(self, r, fan_out, fan_in):
        return r * (fan_in + fan_out + 1), f"{r} ({fan_in} + {fan_out} + 1)"

    def linear(self, base, site, device):
        return SVDLinear(base, site.r, site.scaling, self.dropout, device)

    def count(self, plan):
        return super().count(plan) + sum(site.r for site in plan.sites if site.r)

    def extra_loss(self, model, name):
        if not self.orth_reg_weight:
            return None
        return self.orth_reg_weight * sum(layer.irregularity() for layer in triplets(model, name))

    def budget(self, done: int, total: int, layers: int) -> int:
        """Triplets that stay in all layers together after `done` of `total` steps (section 3.3).

            b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_i - t_f))^3,   rounded down

        As in the authors' code; the paper prints t - t_i - t_f, which does not end at b(T).
        """
        first, final = self.r * layers, self.target_r * layers
        left = total - self.tfinal - max(done, self.tinit)  # steps to the last allocation
        span = total - self.tfinal - self.tinit
        if span < 1:
            raise ValueError(
                f"tinit is {self.tinit} and tfinal {self.tfinal}, which leaves none of {total} steps for "
                "pruning; make them smaller, or train for more steps"
            )
        return final + (first - final) * max(left, 0) ** 3 // span**3

    def take_step(self, model, name, optimizer, step, total):
        done, last = step + 1, total - self.tfinal
        layers = triplets(model, name)
        budget = self.budget(done, total, len(layers))
        if done <= last:
            for layer in layers:
                layer.observe(self.beta1, self.beta2)
        optimizer.step()
        allocates = done == last or (self.tinit < done < last and done % self.deltaT == 0)
        if allocates:
            allocate(layers, budget)
        if allocates or done > last:
            for layer in layers:
                layer.prune()


def triplets(model, name: str) -> list[SVDLinear]:
    """The layers of an adapter that hold triplets."""
    return [part for part in model.adapters[name].parts if isinstance(part, SVDLinear)]


def allocate(layers: list[SVDLinear], budget: int) -> None:
    """Keep the `budget` triplets of the highest scores over all layers (equation 6), of equals the first."""
    scores = torch.cat([layer.scores() for layer in layers])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = True
    for layer, mine in zip(layers, kept.split([layer.r for layer in layers]), strict=True):
        layer.kept.copy_(mine)
