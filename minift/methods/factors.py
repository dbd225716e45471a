"""The delta of a low-rank adapter as its two factors: read from wrappers, cut to a rank, written back.

    delta = s B A,   B = Q_B R_B,   A^T = Q_A R_A,   R_B R_A^T = X S Y^T,   so B A = (Q_B X) S (Q_A Y)^T

The singular values of a delta without forming it: O((out + in) r^2) for each layer, in fp64. Cutting after
the first r is the nearest matrix of rank r, and the rest of S is the error.
Source: Eckart and Young 1936, Psychometrika 1, 211.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import nn

from minift.methods.lora import LoRA
from minift.methods.low_rank import LoRAEmbedding, LoRALinear


@dataclass(frozen=True)
class Factors:
    """delta = scaling * B A of one layer, (out, in); of an embedding, (V, D)."""

    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)
    scaling: float

    @property
    def r(self) -> int:
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.B), self.A.shape[1]

    def to(self, dtype: torch.dtype) -> "Factors":
        return Factors(self.A.to(dtype), self.B.to(dtype), self.scaling)

    def at(self, scaling: float) -> "Factors":
        """The same delta with another scaling: their ratio goes into B, rounded once."""
        return Factors(self.A, (self.B.double() * (self.scaling / scaling)).to(self.B.dtype), scaling)

    def delta(self) -> torch.Tensor:
        return self.scaling * (self.B.double() @ self.A.double())


def svd(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B A = U S Vh in fp64: U (out, k), S (k), Vh (k, in), k = min(r, out, in)."""
    QB, RB = torch.linalg.qr(factors.B.double())
    QA, RA = torch.linalg.qr(factors.A.double().t())
    U, S, Vh = torch.linalg.svd(RB @ RA.t(), full_matrices=False)
    return QB @ U, S, Vh @ QA.t()


def cut(U, S, Vh, scaling: float, r: int) -> tuple[Factors, float]:
    """The nearest delta of rank r to scaling * U S Vh, and its distance in the Frobenius norm.

    A has orthonormal rows and B the singular values, so that where one is zero the direction still learns.
    """
    return Factors(Vh[:r], U[:, :r] * S[:r], scaling), scaling * S[r:].norm().item()


def factors_of(part: nn.Module) -> Factors | None:
    """What a wrapper adds, where that is a product B A; with a start that is taken off, of rank 2r."""
    if isinstance(part, LoRAEmbedding):
        A, B = part.lora_embedding_B.t(), part.lora_embedding_A.t()
    elif getattr(part, "additive", False) and hasattr(part, "factors"):
        A, B = part.factors()
    else:
        return None
    return Factors(A.detach(), B.detach(), part.scaling)


def put(part: LoRALinear | LoRAEmbedding, new: Factors) -> None:
    """Give a wrapper new factors, as new parameters."""
    if isinstance(part, LoRAEmbedding):
        tensors = {"lora_embedding_A": new.B.t(), "lora_embedding_B": new.A.t()}
    else:
        tensors = {"lora_A": new.A, "lora_B": new.B}
        part.start_A = part.start_B = None
    for name, tensor in tensors.items():
        own = torch.empty(tensor.shape, dtype=tensor.dtype, device=getattr(part, name).device).copy_(tensor)
        setattr(part, name, nn.Parameter(own, getattr(part, name).requires_grad))
    part.r, part.scaling = new.r, new.scaling


def check_finite(factors: dict[str, Factors]) -> None:
    for path, f in factors.items():
        if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
            raise ValueError(f"the adapter at {path} is not finite; nothing was changed")


def with_ranks(method: LoRA, factors: dict[str, Factors]) -> LoRA:
    """The method with the ranks of these layers, and with alphas that give their scalings."""
    r, rank_pattern = _pattern({path: f.r for path, f in factors.items()})
    alpha, alpha_pattern = _pattern({path: alpha_for(method, f) for path, f in factors.items()})
    return replace(method, r=r, alpha=alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def alpha_for(method: LoRA, factors: Factors) -> float:
    """The alpha of a scaling: to the bit where some fp64 alpha gives it, else with an error of 2^-52."""
    near = factors.scaling / method.scale(factors.r, 1.0)
    tries = [float(round(near)), near, math.nextafter(near, 0), math.nextafter(near, math.inf)]
    tries = [alpha for alpha in tries if alpha > 0]
    return min(tries, key=lambda alpha: abs(method.scale(factors.r, alpha) - factors.scaling))


def _pattern(values: dict) -> tuple:
    """The commonest value, and rule -> value for the rest: a last name where all of that name agree."""
    [(usual, _)] = Counter(values.values()).most_common(1)
    of_name = {}
    for path, value in values.items():
        of_name.setdefault(path.rpartition(".")[2], set()).add(value)
    rules = {}
    for path, value in values.items():
        last = path.rpartition(".")[2]
        if value != usual:
            rules[last if len(of_name[last]) == 1 else path] = value
    return usual, rules
