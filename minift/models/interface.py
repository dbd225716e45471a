"""What every model promises to methods, loading, training and generation.

Dimensions, here and in every file of the package: B batch, T sequence, S keys, D model, H heads,
KV key-value heads, hd head size, V vocabulary, N supervised positions.

A base layer is anything with `in_features`, `out_features` and `forward(x)`: a linear layer or a wrapper
that a method put around one (models/wrappers.py). `dense_weight` and `set_weight` read and write its matrix.
"""

import re
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minift.models.adapters import Adapters
from minift.models.slots import active_slots, most_virtual_tokens, with_virtual_tokens
from minift.models.wrappers import Wrapper, innermost


class Dims(NamedTuple):
    """Sizes that methods plan with."""

    blocks: int
    hidden: int  # D
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # most positions


class LanguageModel(nn.Module):
    """A decoder. Subclasses set `config`, name their parts, and implement `backbone`.

    The module tree carries the names of the published checkpoints, so that weights load by name and an
    adapter file's keys are the module paths. `adapters` maps the name of each resident adapter to it.
    """

    blocks_path = ""  # where the blocks stand in the module tree, as "model.layers"
    sites: ClassVar[
        dict
    ] = {}  # role -> rules: attn_out, ffn (the whole), ffn_in, ffn_out, k, v, norms; see targets.match
    takes_prefix = True  # its blocks take prefix_kv
    ignored_keys = ()  # checkpoint keys that this family knows and does not use, as regular expressions

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = ""  # what load_model was asked for, and the dtype
        self.loaded_dtype = ""
        self.adapters = Adapters(self)
        self.slots = nn.ModuleList()  # virtual tokens, one Slot for each adapter that has some
        self.kept = {}  # what merge(keep=True) put aside: name -> how to bring it back
        self.gradient_checkpointing = False  # recompute each block in the backward
        self.quantization = ()  # a quant.Quantization for each time that layers were quantized
        self.quantization_table = ()  # what that did to each layer

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get_submodule(self.blocks_path)

    @property
    def embed(self) -> nn.Embedding:
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        raise NotImplementedError

    @property
    def dims(self) -> Dims:
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Share what the config says is shared; called after parameters were replaced."""

    def backbone(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        prefix_kv=None,
        cache=None,
    ):
        """Hidden states (B, T, D) before the head.

        input_ids (B, T), or inputs_embeds (B, T, D) in their place. attention_mask (B, S) is 1 on real
        tokens, over the tokens in the cache and the new ones. position_ids (B, T) follow the mask by
        default, so that left padding is right without being asked; they count from the start of the text.
        prefix_kv: for each block keys and values (B or 1, KV, P, hd) that stand before the text, as the cache
        would hold them, given with the first piece of a text alone. Virtual tokens of the active adapters
        (models/slots.py) are added here and left out of what is returned.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        T = x.shape[1]
        extended = with_virtual_tokens(self, x, attention_mask, position_ids, prefix_kv, cache)
        return self.run_blocks(*extended, cache)[:, extended[0].shape[1] - T :]

    def run_blocks(self, x, attention_mask, position_ids, prefix_kv, cache):
        """The blocks and the last norm on embeddings (B, T, D), virtual ones included; -> the same shape."""
        raise NotImplementedError

    def run_block(self, block, *arguments):
        """One block, recomputed in the backward under gradient checkpointing."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def new_cache(self, B: int, capacity: int):
        """A KV cache for B texts of at most `capacity` tokens, those of a given prefix_kv among them."""
        return self.make_cache(B, capacity + sum(slot.num_virtual_tokens for slot in active_slots(self)))

    def make_cache(self, B: int, capacity: int):
        """A KV cache of just that capacity."""
        raise NotImplementedError

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        prefix_kv=None,
        cache=None,
    ):
        """Logits (B, T, V); arguments as in `backbone`."""
        return self.head(
            self.backbone(input_ids, inputs_embeds, attention_mask, position_ids, prefix_kv, cache)
        )

    @property
    def virtual_tokens(self) -> int:
        """How many of the context's positions the active adapters take."""
        return most_virtual_tokens(self)

    @property
    def embed_weight(self) -> nn.Parameter:
        """The embedding's own matrix (V, D), whatever is wrapped around it."""
        return innermost(self.embed).weight

    @property
    def tied(self) -> bool:
        return getattr(innermost(self.head), "weight", None) is self.embed_weight

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_weight.dtype

    @property
    def device(self):
        return self.embed_weight.device

    def block_index(self, path: str) -> int | None:
        """The block that a module path lies in, or None outside the blocks."""
        found = re.match(re.escape(self.blocks_path) + r"\.(\d+)\.", path)
        return int(found.group(1)) if found else None


def positions(attention_mask: torch.Tensor, T: int) -> torch.Tensor:
    """Positions of the last T tokens, counted over real tokens: mask (B, S) -> (B, T) int64."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -T:]


def attend(attention_mask: torch.Tensor | None, T: int) -> torch.Tensor | None:
    """Who sees whom: mask (B, S) over cached and new tokens -> bool (B, 1, T, S), or None for plain causal.

    Padding on the right needs no mask under causal attention, since no real token looks that way.
    A padding token sees itself, so that no row of the softmax is empty.
    """
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    S = mask.shape[1]
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    causal = torch.ones(T, S, dtype=torch.bool, device=mask.device).tril(S - T)
    itself = torch.eye(S, dtype=torch.bool, device=mask.device)[S - T :]
    return (causal & mask[:, None, :] | itself)[:, None]  # (B, 1, T, S)


def stands_alone(layer: nn.Module) -> bool:
    """Whether a layer is its parameters and its class's forward, so that an op may take them instead.

    Not so with hooks, with a forward of its own, under autocast, or where the parameters are sharded.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    plain = all(type(p) in (nn.Parameter, torch.Tensor) for p in layer._parameters.values() if p is not None)
    device = next(iter(layer._parameters.values())).device.type
    return plain and not any(hooks) and "forward" not in vars(layer) and not torch.is_autocast_enabled(device)


def is_quantized(layer) -> bool:
    return hasattr(layer, "quantized")


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The matrix (out, in) of a linear layer, dequantized if need be; (V, D) of an embedding."""
    if is_quantized(layer):
        return layer.dequantize()
    if not isinstance(layer, nn.Linear | nn.Embedding):
        raise TypeError(f"{type(layer).__name__} has no dense weight; merge or remove what wraps it first")
    return layer.weight


def set_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Write the matrix (out, in) of a linear layer; its dtype, or its quantized format, stays."""
    with torch.no_grad():
        if is_quantized(layer):
            layer.quantize_(weight)
        else:
            dense_weight(layer).copy_(weight)


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, a tied one once; a quantized weight counts as the matrix that it stands
    for, and a trained copy of a weight in its place."""
    total = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    total += sum(m.in_features * m.out_features for m in model.modules() if is_quantized(m))
    return total - sum(m.replaced() for m in model.modules() if isinstance(m, Wrapper))
