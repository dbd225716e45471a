"""Prompt tuning: trained embeddings before the text, on a frozen model.

    x = [P; E(text)],   P (n, D)

P starts as embeddings of sampled tokens, as those of a given text, or as N(0, s^2) with s the standard
deviation of the model's embedding matrix. The paper samples the 5,000 most common tokens (section 3.2); here
every token is as likely. Trainable: n * D.
Source: Lester et al. 2021, arXiv:2104.08691, sections 2 and 3.2.
"""

from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import ClassVar

import torch
from torch import nn

from minift.methods.base import Method, check_one_of, check_whole
from minift.methods.plan import Site
from minift.models.interface import LanguageModel
from minift.models.randomness import generator
from minift.models.slots import Slot, add_slot

UNMERGEABLE = "virtual tokens stand before the text, and no weight of the model holds them"
RULE = "virtual tokens"  # of plans
INITS = ("vocab", "text", "random")


class PromptEmbeddings(Slot):
    """P itself, fp32."""

    def __init__(self, n: int, D: int, device=None):
        super().__init__(n)
        self.prompt_embeddings = nn.Parameter(torch.empty(n, D, dtype=torch.float32, device=device))

    def prompt(self):
        return self.prompt_embeddings


@dataclass(frozen=True)
class PromptTuning(Method):
    name: ClassVar[str] = "prompt_tuning"
    law: ClassVar[str] = "n D"
    identity_at_init: ClassVar[str] = "none"
    unmergeable: ClassVar[str] = UNMERGEABLE

    num_virtual_tokens: int = 20
    """n; the model's context holds them and the text."""
    init: str = "vocab"
    """Where P starts: one of INITS."""
    init_text: str = ""
    """With init text: P starts as its embeddings, repeated or cut to n tokens."""
    init_ids: tuple[int, ...] = ()
    """Its token ids, which `with_tokenizer` fills in."""

    def __post_init__(self):
        check_whole(self, "num_virtual_tokens", 1)
        check_one_of(self, "init", INITS)
        given = "init_text" if self.init_text else "init_ids"
        if self.init != "text" and (self.init_text or self.init_ids):
            raise ValueError(
                f"{given} is given and init is {self.init!r}; say init = 'text', or leave it out"
            )
        if self.init == "text" and not (self.init_text or self.init_ids):
            raise ValueError("init is 'text' and init_text is empty; give the text, or another init")
        object.__setattr__(self, "init_ids", tuple(int(i) for i in self.init_ids))

    def with_tokenizer(self, tokenizer):
        if not self.init_text:
            return self
        ids = tokenizer.encode(self.init_text)
        if not ids:
            raise ValueError(f"init_text {self.init_text!r} has no tokens; give a longer text")
        return replace(self, init_ids=tuple(ids))

    def sites(self, model):
        n, D = self.num_virtual_tokens, model.dims.hidden
        check_room(model, n)
        if self.init == "text" and not self.init_ids:
            raise ValueError(
                "init_text has no token ids yet; apply method.with_tokenizer(tokenizer), or give init_ids"
            )
        wrong = [i for i in self.init_ids if not 0 <= i < model.dims.vocab]
        if wrong:
            raise ValueError(
                f"init_ids hold {wrong[0]}, the vocabulary is 0 to {model.dims.vocab - 1}; use the tokenizer "
                "that belongs to the model"
            )
        return (Site("prompt", RULE, (n, D), n * D, f"{n} x {D}"),)

    def inject(self, model, plan, name, seed):
        slot = PromptEmbeddings(*plan.sites[0].shape, model.device)
        if model.device.type != "meta":
            with torch.no_grad():
                slot.prompt_embeddings.copy_(self.start(model, generator(seed, f"{name}:prompt")))
        add_slot(model, name, slot)

    def start(self, model: LanguageModel, random: torch.Generator) -> torch.Tensor:
        """P (n, D) before training."""
        n = self.num_virtual_tokens
        if self.init == "random":
            return torch.randn(n, model.dims.hidden, generator=random) * model.embed_weight.std().item()
        if self.init == "text":
            ids = torch.tensor(list(islice(cycle(self.init_ids), n)))
        else:
            ids = torch.randint(model.dims.vocab, (n,), generator=random)
        return model.embed(ids[None].to(model.device))[0]

    def count(self, plan):
        n, D = plan.sites[0].shape
        return n * D


def check_room(model: LanguageModel, n: int) -> None:
    """Refuse virtual tokens that leave no room for a text."""
    taken, context = model.virtual_tokens, model.dims.context
    if taken + n >= context:
        others = f" beside {taken} of other adapters" if taken else ""
        raise ValueError(
            f"num_virtual_tokens is {n}{others}, and the model's context is {context}; a text needs some of "
            f"it, use at most {context - taken - 1}"
        )
