"""The low-rank branch and the layers that carry it: linear layers, embeddings, a tied head.

    y = base(x) + scaling * B A dropout(x),   A (r, in), B (out, r)

The branch computes in x's dtype from fp32 parameters. A start A0, B0 with B0 different from zero (PiSSA,
OLoRA) is kept, frozen, and taken off again, so that the base keeps its weights:

    y = base(x) + scaling * (B A - B0 A0) dropout(x),   B A - B0 A0 = (B - B0) A + B0 (A - A0)

computed as on the right: zero to the bit at the start, and no small change is lost beside a large start.
Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from minift.kernels.lora_linear import lora_linear
from minift.models.interface import stands_alone
from minift.models.layers import Linear
from minift.models.wrappers import Wrapper, check_rows, innermost
from minift.quant.linear import QuantizedLinear


class LowRank(torch.autograd.Function):
    """y + scaling * x A^T B^T, keeping x, A, B and the thin product h = x A^T.

        dB = scaling * dy^T h,   dh = scaling * dy B,   dA = dh^T x,   dx = dh A

    x (..., in), y (..., out), A (r, in) and B (out, r) in their own dtype, rounded to x's for the products.
    Where neighbours share their input (q, k and v), autograd keeps that one x for all of them.
    """

    @staticmethod
    def forward(ctx, x, y, A, B, scaling):
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        h = rows @ A.to(x.dtype).t()  # (n, r)
        ctx.save_for_backward(x, A, B, h)
        ctx.scaling = scaling
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, B.to(x.dtype).t(), alpha=scaling).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, A, B, h = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1]).to(dy.dtype)  # autocast gives dy another dtype than x
        dy_rows = dy.reshape(-1, dy.shape[-1])
        dh = (dy_rows @ B.to(dy.dtype)) * ctx.scaling  # (n, r)
        need_x, _, need_A, need_B, _ = ctx.needs_input_grad
        dx = (dh @ A.to(dy.dtype)).view(x.shape) if need_x else None
        dA = (dh.t() @ rows).to(A.dtype) if need_A else None  # (r, in)
        dB = (dy_rows.t() @ h * ctx.scaling).to(B.dtype) if need_B else None  # (out, r)
        return dx, dy, dA, dB, None


class Branch(Wrapper):
    """A branch that amounts to a change of the weight."""

    additive: ClassVar = True

    def delta(self, dtype=torch.float32) -> torch.Tensor:
        """The change, of the weight's shape."""
        raise NotImplementedError

    def fold(self, tensors):
        return {**tensors, "weight": tensors["weight"] + self.delta(tensors["weight"].dtype)}


class LoRALinear(Branch):
    """The branch on a linear layer of any kind, or around another wrapper."""

    keys: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base: nn.Module, r: int, scaling: float, dropout: float = 0.0, device=None):
        super().__init__(base)
        self.r, self.scaling, self.dropout = r, scaling, dropout
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        self.register_buffer("start_A", None)  # A0 and B0, where B0 is not zero
        self.register_buffer("start_B", None)

    def forward(self, x):
        if not self.active:
            return self.base(x)
        A, B = self.factors()
        if self.rows is None and not (self.dropout and self.training):
            matrix = frozen_matrix(self.base, x.dtype)
            if matrix is not None:
                rows = x.reshape(-1, self.in_features).contiguous()
                y = lora_linear(rows, matrix, A, B, self.scaling)
                return y.view(*x.shape[:-1], self.out_features)
        y, dropped = self.base(x), F.dropout(x, self.dropout, self.training)
        if self.rows is None:
            return LowRank.apply(dropped, y, A, B, self.scaling)
        check_rows(self.rows, len(y))
        meant = self.rows.nonzero().flatten()  # the branch runs on the texts that it is for
        return y.index_copy(0, meant, LowRank.apply(dropped[meant], y[meant], A, B, self.scaling))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of the whole delta: with a start that is taken off, [A; A - A0] and [B - B0, B0]."""
        A, B = self.lora_A, self.lora_B
        if self.start_A is None:
            return A, B
        A = torch.cat((A, A - self.start_A))  # (2r, in)
        return A, torch.cat((B - self.start_B, self.start_B), dim=1)  # (out, 2r)

    def start_at(self, A: torch.Tensor, B: torch.Tensor | None) -> None:
        """Start at A and a zero B, or at A and B with their product taken off."""
        self.lora_A.data.copy_(A)
        if B is not None:
            self.lora_B.data.copy_(B)
            self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def delta(self, dtype=torch.float32) -> torch.Tensor:
        """scaling * B A, (out, in)."""
        A, B = self.factors()
        return self.scaling * (B.to(dtype) @ A.to(dtype))

    def state(self):
        found = super().state()
        if self.start_A is not None:
            found[self.keys["lora_A"]], found[self.keys["lora_B"]] = self.factors()
        return found


class LoRAEmbedding(Branch):
    """The branch on an embedding: y = base(i) + scaling * B A[:, i],   A (r, V) from zero, B (D, r)."""

    keys: ClassVar = {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}

    def __init__(self, base: nn.Module, r: int, scaling: float, device=None):
        super().__init__(base)
        self.r, self.scaling = r, scaling
        vocabulary, D = embedding_shape(base)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, vocabulary, dtype=torch.float32, device=device))
        self.lora_embedding_B = nn.Parameter(torch.empty(D, r, dtype=torch.float32, device=device))

    def forward(self, ids):
        y = self.base(ids)
        if not self.active:
            return y
        h = F.embedding(ids, self.lora_embedding_A.t())  # (B, T, r)
        branch = self.scaling * (h @ self.lora_embedding_B.t())  # (B, T, D)
        return self.where_meant((y + branch).to(y.dtype), y)

    def delta(self, dtype=torch.float32) -> torch.Tensor:
        """scaling * (B A)^T, (V, D)."""
        return self.scaling * (self.lora_embedding_B.to(dtype) @ self.lora_embedding_A.to(dtype)).t()


class TiedLoRAHead(Wrapper):
    """The head's share of a LoRAEmbedding, of one weight: y = base(x) + scaling * (B A)^T dropout(x)."""

    additive: ClassVar = True

    def __init__(self, base: nn.Module, embedding: LoRAEmbedding, dropout: float = 0.0):
        super().__init__(base)
        self.dropout = dropout
        self.of = (embedding,)  # not a child: its parameters belong to the embedding

    def forward(self, x):
        y = self.base(x)
        if not self.active:
            return y
        [e] = self.of
        A, B = e.lora_embedding_B.t(), e.lora_embedding_A.t()  # (r, D), (V, r)
        dropped = F.dropout(x, self.dropout, self.training)
        return self.where_meant(LowRank.apply(dropped, y, A, B, e.scaling), y)

    def state(self):
        """PEFT holds the head's copy of both factors."""
        [e] = self.of
        return {
            "lora_A.weight": e.lora_embedding_B.t().clone(),
            "lora_B.weight": e.lora_embedding_A.t().clone(),
        }

    def fold(self, tensors):
        return self.of[0].fold(tensors)


def embedding_shape(layer: nn.Module) -> tuple[int, int]:
    """(V, D) of an embedding, wrapped or not."""
    layer = innermost(layer)
    return layer.num_embeddings, layer.embedding_dim


def frozen_matrix(base: nn.Module, dtype: torch.dtype):
    """W of a plain frozen layer without bias that computes in `dtype`, as `lora_linear` takes it.

    None for any other layer: wrappers, those that do not stand alone, and W in odd strides.
    """
    if type(base) not in (nn.Linear, Linear, QuantizedLinear) or base.bias is not None:
        return None
    if not stands_alone(base):
        return None
    if type(base) is QuantizedLinear:
        return base.as_packed() if base.compute_dtype == dtype else None
    W = base.weight
    return W if W.dtype == dtype and not W.requires_grad and W.is_contiguous() else None
