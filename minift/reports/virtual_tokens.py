"""What a learned prompt resembles: the tokens whose embeddings point most nearly as each virtual token does.

    cosine(p, e) = p . e / (|p| |e|)   for a virtual token p and an embedding e of the vocabulary

A description, not an explanation: a learned prompt need not be near any token (Lester et al. 2021,
arXiv:2104.08691, section 7).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minift.models.slots import Slot

ROWS = 4096  # of the vocabulary in fp32 at a time


@dataclass(frozen=True)
class Near:
    """A token near a virtual token."""

    position: int  # of the virtual token, from 0
    token: int
    text: str
    cosine: float


class NearestTokens(list):
    """Rows of Near, k for each virtual token, the nearest first; printing them gives the table."""

    def __str__(self):
        lines = {}
        for row in self:
            lines.setdefault(row.position, []).append(f"{row.text!r} {row.cosine:.3f}")
        width = max(len("position"), len(str(len(lines))))
        return "\n".join(
            [
                f"{'position':>{width}}  nearest tokens and their cosine",
                *(f"{position:>{width}}  {'  '.join(near)}" for position, near in lines.items()),
            ]
        )


@torch.no_grad()
def nearest_tokens(model, tokenizer, name: str = "default", k: int = 5) -> NearestTokens:
    """The k tokens of the vocabulary nearest to each virtual token of adapter `name`."""
    prompt, E = _prompt(model, name), model.embed_weight  # (P, D), (V, D)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(E):
        raise ValueError(f"k is {k!r}; it is a number of tokens from 1 to {len(E)}, the vocabulary")
    if not torch.isfinite(prompt).all():
        raise ValueError(f"the prompt embeddings of {name!r} are not finite; train the adapter again")
    directions = F.normalize(prompt.float(), dim=1)
    cosines = torch.cat([directions @ F.normalize(e.float(), dim=1).t() for e in E.split(ROWS)], 1)  # (P, V)
    found = cosines.topk(k, dim=1)
    return NearestTokens(
        Near(position, token, tokenizer.decode([token], skip_special_tokens=False), cosine)
        for position, row in enumerate(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        for token, cosine in zip(*row, strict=True)
    )


def _prompt(model, name: str) -> torch.Tensor:
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    slot = model.adapters[name].modules.get("")
    prompt = slot.prompt() if isinstance(slot, Slot) else None
    if prompt is None:
        raise ValueError(
            f"{name!r} is {model.adapters[name].method.name}, which has no prompt embeddings to compare with "
            "the vocabulary; prompt_tuning and p_tuning have"
        )
    return prompt
