"""Prefix tuning: trained keys and values before the text, in every block of a frozen model.

    keys = [Pk_l; k(text)],   values = [Pv_l; v(text)],   Pk_l and Pv_l (KV, n, hd) for each block l

The columns of one matrix P (n, 2 L KV hd), in the order [2 L, KV, hd]: index 2 l holds the keys of block l,
2 l + 1 its values. Keys stand as the cache holds them, after the rotation; the text's positions start at n.
P starts as N(0, STD^2). With a projection, P = W2 tanh(W1 h + b1) + b2 of h (n, KV hd), which starts as in
P-tuning, and an adapter file holds P alone.
Trainable: n L 2 KV hd; with a projection of H hidden units n KV hd + H (KV hd + 1) + 2 L KV hd (H + 1).
Source: Li and Liang 2021, arXiv:2101.00190, sections 4.2 and 4.3; the order of the columns and the width of h
are PEFT's (0.21, PrefixEncoder).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import Method, check_flag, check_whole
from minift.methods.p_tuning import linear_site, start_
from minift.methods.plan import Site
from minift.methods.prompt_tuning import RULE, UNMERGEABLE, check_room
from minift.models.interface import Dims
from minift.models.randomness import generator
from minift.models.slots import Slot, add_slot

# Near zero: SmolLM2-135M's loss on a text is 2.7 nats, with a start of STD 1 (PEFT's) 7.3, with this one 2.8
STD = 0.02


class Prefix(Slot):
    """P, or h and the projection, fp32."""

    def __init__(self, n: int, dims: Dims, H: int, device=None):
        """`H` hidden units of the projection; 0 means none."""
        super().__init__(n)
        self.shape = (n, 2 * dims.blocks, dims.kv_heads, dims.head_dim)
        self.encoded = H > 0
        width = dims.kv_heads * dims.head_dim
        if self.encoded:
            self.embedding = nn.Parameter(torch.empty(n, width, device=device))
            self.projection = nn.Sequential(
                nn.Linear(width, H, device=device),
                nn.Tanh(),
                nn.Linear(H, 2 * dims.blocks * width, device=device),
            )
        else:
            self.prompt_embeddings = nn.Parameter(torch.empty(n, 2 * dims.blocks * width, device=device))
        self.float()

    def columns(self) -> torch.Tensor:
        """P (n, 2 L KV hd)."""
        return self.projection(self.embedding) if self.encoded else self.prompt_embeddings

    def prefix_kv(self):
        kv = self.columns().view(self.shape).permute(1, 2, 0, 3)  # (2 L, KV, n, hd)
        return list(zip(kv[0::2], kv[1::2], strict=True))

    def state(self):
        return {"prompt_embeddings": self.columns()}


@dataclass(frozen=True)
class PrefixTuning(Method):
    name: ClassVar[str] = "prefix_tuning"
    law: ClassVar[str] = "n L 2 KV hd, and the projection"
    identity_at_init: ClassVar[str] = "none"
    unmergeable: ClassVar[str] = UNMERGEABLE

    num_virtual_tokens: int = 20
    """n; the model's context holds them and the text."""
    prefix_projection: bool = False
    """Make P with a small network while training."""
    encoder_hidden_size: int = 0
    """Its hidden units; 0 means as many as a block's keys have numbers, KV hd."""

    def __post_init__(self):
        check_whole(self, "num_virtual_tokens", 1)
        check_whole(self, "encoder_hidden_size", 0)
        check_flag(self, "prefix_projection")
        if self.encoder_hidden_size and not self.prefix_projection:
            raise ValueError(
                f"encoder_hidden_size is {self.encoder_hidden_size} and prefix_projection is false; set it "
                "to true, or leave the size out"
            )

    def refuses(self, model):
        return None if model.takes_prefix else f"the blocks of {type(model).__name__} take no prefix"

    def sites(self, model):
        n, L, KV, hd = self.num_virtual_tokens, model.dims.blocks, model.dims.kv_heads, model.dims.head_dim
        check_room(model, n)
        if self.prefix_projection:
            H = self.encoder_hidden_size or KV * hd
            sites = (
                Site("prefix.embedding", RULE, (n, KV * hd), n * KV * hd, f"{n} x {KV * hd}"),
                linear_site("prefix.projection.0", H, KV * hd),
                linear_site("prefix.projection.2", 2 * L * KV * hd, H),
            )
        else:
            formula = f"{n} x {L} x 2 x {KV * hd}"
            sites = (Site("prefix", RULE, (n, 2 * L * KV * hd), n * L * 2 * KV * hd, formula),)
        return sites

    def inject(self, model, plan, name, seed):
        n, H = self.num_virtual_tokens, plan.sites[1].shape[0] if self.prefix_projection else 0
        slot = Prefix(n, model.dims, H, "meta")
        if model.device.type != "meta":
            slot.to_empty(device=model.device)
            random = generator(seed, f"{name}:prefix")
            if slot.encoded:
                start_(slot, random)
            else:
                slot.prompt_embeddings.data.copy_(torch.randn(plan.sites[0].shape, generator=random) * STD)
        add_slot(model, name, slot)

    def count(self, plan):
        n, width = plan.sites[0].shape
        if not self.prefix_projection:
            return n * width
        H, columns = plan.sites[1].shape[0], plan.sites[2].shape[0]
        return n * width + H * (width + 1) + columns * (H + 1)
