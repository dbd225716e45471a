"""P-tuning: prompt embeddings that a small network makes while training.

    P = f(h),   h (n, D) trained,   x = [P; E(text)]
    mlp:  f(h) = W3 relu(W2 relu(W1 h + b1) + b2) + b3
    lstm: f(h) = W2 relu(W1 LSTM(h) + b1) + b2, a bidirectional LSTM of two layers over the n rows

h starts as N(0, 1); matrices and biases of a linear layer start as U(-b, b) with b = 1 / sqrt(its inputs), of
the LSTM with b = 1 / sqrt(H). An adapter file holds P alone. The paper also puts virtual tokens inside the
text; here they all stand before it.
Trainable: n D + H (D + 1) + H (H + 1) + D (H + 1) for mlp, n D + 8 H (D + H + 2) + 8 H (3 H + 2)
+ 2 H (2 H + 1) + D (2 H + 1) for lstm, with H the encoder's hidden size.
Source: Liu et al. 2021, arXiv:2103.10385, section 3.2; the widths are PEFT's (0.21, PromptEncoder).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import Method, check_one_of, check_whole
from minift.methods.plan import Site
from minift.methods.prompt_tuning import RULE, UNMERGEABLE, check_room
from minift.models.randomness import generator
from minift.models.slots import Slot, add_slot

ENCODERS = ("mlp", "lstm")


class PromptEncoder(Slot):
    """h and f, fp32."""

    encoded: ClassVar = True

    def __init__(self, encoder: str, n: int, D: int, H: int, device=None):
        super().__init__(n)
        self.embedding = nn.Parameter(torch.empty(n, D, device=device))
        self.lstm = (
            nn.LSTM(D, H, num_layers=2, bidirectional=True, device=device) if encoder == "lstm" else None
        )
        widths = (D, H, H, D) if encoder == "mlp" else (2 * H, 2 * H, D)
        layers = [nn.Linear(a, b, device=device) for a, b in pairwise(widths)]
        self.mlp = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
        self.float()

    def prompt(self):
        h = self.embedding if self.lstm is None else self.lstm(self.embedding)[0]  # (n, D) or (n, 2 H)
        return self.mlp(h)

    def state(self):
        return {"prompt_embeddings": self.prompt()}


def start_(slot: Slot, random: torch.Generator) -> None:
    """The slot's embedding N(0, 1), and torch's own starts of its layers, from one stream."""
    with torch.no_grad():
        slot.embedding.copy_(torch.randn(slot.embedding.shape, generator=random))
        for layer in slot.modules():
            width = getattr(layer, "hidden_size", getattr(layer, "in_features", None))
            for parameter in layer.parameters(recurse=False) if width else ():
                bound = width**-0.5
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=random))


@dataclass(frozen=True)
class PTuning(Method):
    name: ClassVar[str] = "p_tuning"
    law: ClassVar[str] = "n D and the encoder"
    identity_at_init: ClassVar[str] = "none"
    unmergeable: ClassVar[str] = UNMERGEABLE

    num_virtual_tokens: int = 20
    """n; the model's context holds them and the text."""
    encoder: str = "mlp"
    """The network f: one of ENCODERS."""
    encoder_hidden_size: int = 0
    """H; 0 means the model's hidden size."""

    def __post_init__(self):
        check_whole(self, "num_virtual_tokens", 1)
        check_whole(self, "encoder_hidden_size", 0)
        check_one_of(self, "encoder", ENCODERS)

    def sites(self, model):
        n, D = self.num_virtual_tokens, model.dims.hidden
        H = self.encoder_hidden_size or D
        check_room(model, n)
        sites = [Site("prompt.embedding", RULE, (n, D), n * D, f"{n} x {D}")]
        if self.encoder == "mlp":
            shapes = {0: (H, D), 2: (H, H), 4: (D, H)}
        else:
            for i, fan_in in enumerate((D, 2 * H)):  # two directions of four gates, each with two biases
                size, formula = 8 * H * (fan_in + H + 2), f"8 {H} ({fan_in} + {H} + 2)"
                sites.append(Site(f"prompt.lstm.{i}", RULE, (2 * H, fan_in), size, formula))
            shapes = {0: (2 * H, 2 * H), 2: (D, 2 * H)}
        sites += [linear_site(f"prompt.mlp.{i}", *shape) for i, shape in shapes.items()]
        return tuple(sites)

    def inject(self, model, plan, name, seed):
        n, D = plan.sites[0].shape
        slot = PromptEncoder(self.encoder, n, D, self.encoder_hidden_size or D, "meta")
        if model.device.type != "meta":
            slot.to_empty(device=model.device)
            start_(slot, generator(seed, f"{name}:prompt"))
        add_slot(model, name, slot)

    def count(self, plan):
        n, D = plan.sites[0].shape
        H = self.encoder_hidden_size or D
        if self.encoder == "mlp":
            return n * D + H * (D + 1) + H * (H + 1) + D * (H + 1)
        return n * D + 8 * H * (D + H + 2) + 8 * H * (3 * H + 2) + 2 * H * (2 * H + 1) + D * (2 * H + 1)


def linear_site(path: str, fan_out: int, fan_in: int) -> Site:
    """A plan's row for a linear layer with a bias."""
    formula = f"{fan_out} ({fan_in} + 1)"
    return Site(path, RULE, (fan_out, fan_in), fan_out * (fan_in + 1), formula)
