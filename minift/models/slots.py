"""Slots: virtual tokens before a text, which soft prompts and prefixes fill.

    sequence = [prefix keys and values | prompt embeddings | text]

Positions count from the first virtual token that a text sees. Virtual tokens are prepended only while the
cache is empty; mask and positions are extended by them, and the hidden states that belong to them are
dropped, so that outputs keep the length of the text.
"""

from typing import ClassVar

import torch
from torch import nn

from minift.models.wrappers import check_rows


class Slot(nn.Module):
    """Virtual tokens of one adapter: embeddings for the input (`prompt`) or keys and values (`prefix_kv`)."""

    encoded: ClassVar[bool] = False  # `state` is computed from the parameters, and they cannot be had back

    def __init__(self, num_virtual_tokens: int):
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.active, self.rows = True, None  # as in Wrapper

    def prompt(self) -> torch.Tensor | None:
        """(P, D), or None."""
        return None

    def prefix_kv(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """(keys, values) of each block, each (KV, P, hd), as they stand in the cache; or None."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """Key -> tensor, as an adapter file holds them."""
        return self.trainable_state()

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """Name -> parameter: what training goes on from."""
        return dict(self.named_parameters())

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the values of another slot's `trainable_state`."""
        own = self.trainable_state()
        if own.keys() != tensors.keys():
            raise ValueError(
                f"the virtual tokens are held in {sorted(own)}, and {sorted(tensors)} were given; an encoder "
                "cannot be had back from what it computed"
            )
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} of the virtual tokens has shape {tuple(parameter.shape)}, and "
                    f"{tuple(tensors[name].shape)} was given"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def add_slot(model, name: str, slot: Slot) -> None:
    """Make a slot the one part of adapter `name`."""
    model.slots.append(slot.train(model.training))
    model.adapters[name].modules[""] = slot


def active_slots(model) -> list[Slot]:
    return [slot for slot in model.slots if slot.active]


def most_virtual_tokens(model) -> int:
    """Virtual tokens of the text that sees the most of them."""
    slots = active_slots(model)
    everywhere = sum(slot.num_virtual_tokens for slot in slots if slot.rows is None)
    chosen = [slot.num_virtual_tokens * slot.rows.long() for slot in slots if slot.rows is not None]
    return everywhere + (int(torch.stack(chosen).sum(dim=0).max()) if chosen else 0)


def with_virtual_tokens(model, x, attention_mask, position_ids, prefix_kv, cache):
    """What the blocks read: (x, mask, position_ids, prefix_kv), extended by the active slots.

    x (B, T, D) becomes (B, P + T, D); the mask covers prefix, prompt, cached and new tokens; prefix_kv is
    None or a list over the blocks of (keys, values), each (B, KV, P, hd).
    """
    B, T, past = x.shape[0], x.shape[1], 0 if cache is None else cache.length
    virtual = cache.virtual if past else None  # (B, P)
    seen = past - (0 if virtual is None else virtual.shape[1])
    if attention_mask is not None and tuple(attention_mask.shape) != (B, seen + T):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; there are {B} texts, the cache holds "
            f"{seen} tokens of each and {T} are new, so it must be {(B, seen + T)}"
        )
    if past and prefix_kv is not None:
        raise ValueError(
            f"prefix_kv stands before a text, and the cache holds {past} tokens already; give it with the "
            "first piece of the text alone"
        )
    if not past:
        x, prefix_kv, virtual = _prepend(model, x, prefix_kv)
        if cache is not None:
            cache.virtual = virtual
    if virtual is None:
        return x, attention_mask, position_ids, prefix_kv
    text = torch.ones(B, seen + T, device=x.device) if attention_mask is None else attention_mask
    if position_ids is not None:
        position_ids = position_ids + virtual.sum(dim=1, keepdim=True)  # (B, T)
        if not past:  # prompt embeddings are new too; a prefix has its positions in its keys
            prefix = virtual.shape[1] - (x.shape[1] - T)
            before = (virtual.long().cumsum(dim=1) - 1).clamp(min=0)[:, prefix:]
            position_ids = torch.cat((before, position_ids.expand(B, T)), dim=1)
    return x, torch.cat((virtual, text.bool()), dim=1), position_ids, prefix_kv


def _prepend(model, x, prefix_kv):
    """(x with the prompts before it, keys and values of all prefixes, mask (B, P) over both or None)."""
    B, masks, prompts, prefixes = len(x), [], [], []
    if prefix_kv is not None:
        P = _prefix_length(prefix_kv, B, model.dims)
        prefixes.append(prefix_kv)
        masks.append(torch.ones(B, P, dtype=torch.bool, device=x.device))
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
    joined = None if not prefixes else [_join(parts, B, x.dtype) for parts in zip(*prefixes, strict=True)]
    return torch.cat([*prompts, x], dim=1), joined, torch.cat(masks, dim=1)


def _prefix_length(prefix_kv, B: int, dims) -> int:
    shapes = {tuple(tensor.shape) for block in prefix_kv for tensor in block}
    P = next(iter(shapes))[-2] if shapes else 0
    allowed = {(b, dims.kv_heads, P, dims.head_dim) for b in (1, B)}
    if len(prefix_kv) != dims.blocks or len(shapes) != 1 or not shapes <= allowed:
        raise ValueError(
            f"prefix_kv holds tensors of shape {sorted(shapes)} for {len(prefix_kv)} blocks; it must hold "
            f"keys and values of one shape, ({B} or 1, {dims.kv_heads}, P, {dims.head_dim}), for each of "
            f"the {dims.blocks} blocks"
        )
    return P


def _join(parts, B: int, dtype) -> tuple[torch.Tensor, ...]:
    """One block's (keys, values) of several prefixes as one pair, each (B, KV, P, hd)."""
    return tuple(
        torch.cat([t.to(dtype).expand(B, -1, -1, -1) for t in tensors], dim=2)
        for tensors in zip(*parts, strict=True)
    )


def _mask(slot: Slot, B: int, device) -> torch.Tensor:
    """(B, P): the texts that see these virtual tokens."""
    rows = torch.ones(B, dtype=torch.bool, device=device) if slot.rows is None else slot.rows
    check_rows(rows, B)
    return rows[:, None].expand(B, slot.num_virtual_tokens)
