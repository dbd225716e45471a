"""Slots: virtual tokens before a text, which soft prompts and prefixes fill.

    sequence = [prefix keys and values | prompt embeddings | text]

Positions count from the first virtual token. Virtual tokens are prepended only while the cache is empty; mask
and positions are extended by them, and the hidden states that belong to them are dropped, so that outputs keep
the length of the text.
"""

import torch
from torch import nn


class Slot(nn.Module):
    """Virtual tokens of one adapter: embeddings for the input (`prompt`) or keys and values (`prefix_kv`)."""

    num_virtual_tokens = 0

    def __init__(self):
        super().__init__()
        self.active, self.rows = True, None  # as in Wrapper

    def prompt(self) -> torch.Tensor | None:
        """(P, D), or None."""
        return None

    def prefix_kv(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """(keys, values) of each block, each (KV, P, hd), as they stand in the cache; or None."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """Key -> tensor, as an adapter file holds them."""
        raise NotImplementedError


def active_slots(model) -> list[Slot]:
    return [slot for slot in model.slots if slot.active]


def with_virtual_tokens(model, x, attention_mask, position_ids, prefix_kv, cache):
    """What the blocks read: (x, mask, position_ids, prefix_kv), extended by the active slots.

    x (B, T, D) becomes (B, P + T, D); the mask covers prefix, prompt, cached and new tokens; prefix_kv is
    None or a list over the blocks of (keys, values), each (B, KV, P, hd).
    """
    B, T, past = x.shape[0], x.shape[1], 0 if cache is None else cache.length
    virtual = None if cache is None else cache.virtual
    seen = past - (0 if virtual is None else virtual.shape[1])
    if attention_mask is not None and tuple(attention_mask.shape) != (B, seen + T):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; there are {B} texts, the cache holds "
            f"{seen} tokens of each and {T} are new, so it must be {(B, seen + T)}"
        )
    if past == 0:
        x, prefix_kv, virtual = _prepend(model, x, prefix_kv)
        if cache is not None:
            cache.virtual = virtual
    if virtual is None:
        return x, attention_mask, position_ids, prefix_kv
    text = torch.ones(B, seen + T, device=x.device) if attention_mask is None else attention_mask
    if position_ids is not None:
        position_ids = position_ids + virtual.sum(dim=1, keepdim=True)
        if past == 0:
            new = x.shape[1] - T
            before = (virtual.long().cumsum(dim=1) - 1).clamp(min=0)[:, virtual.shape[1] - new :]
            position_ids = torch.cat((before, position_ids.expand(B, T)), dim=1)
    return x, torch.cat((virtual, text.bool()), dim=1), position_ids, prefix_kv


def _prepend(model, x, prefix_kv):
    """(x with the prompts before it, keys and values of all prefixes, mask (B, P) over both or None)."""
    B, masks, prompts, prefixes = len(x), [], [], []
    if prefix_kv is not None:
        prefixes.append(prefix_kv)
        masks.append(torch.ones(B, prefix_kv[0][0].shape[-2], dtype=torch.bool, device=x.device))
    for slot in active_slots(model):
        found = slot.prefix_kv()
        if found is not None:
            prefixes.append(found)
            masks.append(_mask(slot, B, x.device))
    for slot in active_slots(model):
        prompt = slot.prompt()
        if prompt is not None:
            prompts.append(prompt.to(x.dtype).expand(B, -1, -1))
            masks.append(_mask(slot, B, x.device))
    if not masks:
        return x, None, None
    kv = None
    if prefixes:
        kv = [
            tuple(
                torch.cat([t.to(x.dtype).expand(B, -1, -1, -1) for t in part], dim=2)
                for part in zip(*block, strict=True)
            )
            for block in zip(*prefixes, strict=True)
        ]
    return torch.cat([*prompts, x], dim=1), kv, torch.cat(masks, dim=1)


def _mask(slot: Slot, B: int, device) -> torch.Tensor:
    """(B, P): the texts that see these virtual tokens."""
    rows = torch.ones(B, dtype=torch.bool, device=device) if slot.rows is None else slot.rows
    if len(rows) != B:
        raise ValueError(f"adapters were chosen for {len(rows)} texts, and the batch holds {B}")
    return rows[:, None].expand(B, slot.num_virtual_tokens)
