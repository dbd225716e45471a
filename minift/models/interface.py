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
from minift.models.heads import CLASSIFIERS, HEADS, LANGUAGE_MODELS, label_fields, last_token
from minift.models.layers import KVCache
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
    """A transformer with a head. Subclasses name their parts and implement `run_blocks`.

    The module tree carries the names of the published checkpoints, so that weights load by name and an
    adapter file's keys are the module paths. `adapters` maps the name of each resident adapter to it.
    """

    heads: ClassVar[tuple[str, ...]] = ("causal_lm",)  # of heads.HEADS
    trunks: ClassVar[tuple[str, ...]] = ()  # what checkpoints may call the part without the head
    ignored_keys: ClassVar[tuple[str, ...]] = ()  # of checkpoints, as regular expressions: known and not used
    head_keys: ClassVar[tuple[str, ...]] = ()  # likewise: what other heads of the family store
    renamed_keys: ClassVar[tuple[tuple[str, str], ...]] = ()  # (regular expression, what to put there)
    transposed: ClassVar[tuple[str, ...]] = ()  # matrices that checkpoints hold as (in, out), likewise
    sites: ClassVar[dict] = {}  # role -> rules: attn_out, ffn (the whole), ffn_in, ffn_out, k, v, norms
    usual_targets: ClassVar[tuple[str, ...]] = ()  # the layers that LoRA is usually put on
    takes_prefix = True  # its blocks take prefix_kv
    is_encoder_decoder = False

    trunk = ""  # the part without the head in this module tree, as "model"
    blocks_path = ""  # where the blocks stand, as "model.layers"
    head_modules: tuple[str, ...] = ()  # paths of what belongs to the head alone
    new_modules: tuple[str, ...] = ()  # those of them that the checkpoint did not have

    def __init__(self, config, head: str = "causal_lm", labels: tuple[str, ...] = ()):
        if head not in self.heads:
            raise ValueError(f"{type(self).__name__} has no head {head!r}; it has {', '.join(self.heads)}")
        if bool(labels) != (head in CLASSIFIERS):
            raise ValueError(f"labels {labels} with head {head!r}: classifiers, and only they, have labels")
        super().__init__()
        self.config, self.head_kind, self.labels = config, head, tuple(labels)
        self.source = ""  # what load_model was asked for
        self.loaded_dtype = ""
        self.adapters = Adapters(self)
        self.slots = nn.ModuleList()  # virtual tokens, one Slot for each adapter that has some
        self.kept = {}  # what merge(keep=True) put aside: name -> how to bring it back
        self.gradient_checkpointing = False  # recompute each block in the backward
        self.quantization = ()  # a quant.Quantization for each time that layers were quantized
        self.quantization_table = ()  # what that did to each layer

    @property
    def architecture(self) -> str:
        """What config.json calls this family with this head."""
        return self.config.family + HEADS[self.head_kind]

    def to_hf(self) -> dict:
        """config.json."""
        return {"architectures": [self.architecture], **self.config.to_hf(), **label_fields(self.labels)}

    @property
    def blocks(self) -> nn.ModuleList:
        return self.get_submodule(self.blocks_path)

    @property
    def embed(self) -> nn.Embedding:
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        """The last layer: linear, or nn.Identity where the head is "none"."""
        raise NotImplementedError

    @property
    def dims(self) -> Dims:
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Share what the config says is shared; called after parameters were replaced."""
        if self.config.tie_word_embeddings and self.head_kind in LANGUAGE_MODELS:
            innermost(self.head).weight = innermost(self.embed).weight

    def settle(self, tensors: dict) -> None:
        """Take what config.json leaves open from a checkpoint's tensors by name, before they are read."""

    def backbone(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        prefix_kv=None,
        cache=None,
        **more,
    ):
        """Hidden states (B, T, D) before the head; `more` is what a family takes besides.

        input_ids (B, T), or inputs_embeds (B, T, D) in their place. attention_mask (B, S) is 1 on real
        tokens, over the tokens in the cache and the new ones. position_ids (B, T) follow the mask by
        default, so that left padding is right without being asked; they count from the start of the text.
        prefix_kv: for each block keys and values (B or 1, KV, P, hd) that stand before the text, as the cache
        would hold them, given with the first piece of a text alone. Virtual tokens of the active adapters
        (models/slots.py) are added here and left out of what is returned.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids, or inputs_embeds in their place")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        T = x.shape[1]
        extended = with_virtual_tokens(self, x, attention_mask, position_ids, prefix_kv, cache)
        return self.run_blocks(*extended, cache, **more)[:, extended[0].shape[1] - T :]

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
        return KVCache(B, capacity, self.dims, self.dtype, self.device)

    def pool(self, hidden, input_ids=None, attention_mask=None):
        """What a sequence classifier's head reads of each text: (B, T, D) -> (B, D)."""
        return last_token(hidden, attention_mask)

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        prefix_kv=None,
        cache=None,
        **more,
    ):
        """Logits; arguments as in `backbone`.

        (B, T, V) of language models, (B, labels) of sequence classifiers, (B, T, labels) of token
        classifiers, (B, T, 2) for the start and the end of an answer; hidden states where the head is "none".
        """
        hidden = self.backbone(
            input_ids, inputs_embeds, attention_mask, position_ids, prefix_kv, cache, **more
        )
        if self.head_kind == "sequence_classification":
            hidden = self.pool(hidden, input_ids, attention_mask)
        return self.head(hidden)

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

    def is_new(self, path: str) -> bool:
        """Whether a module belongs to what the checkpoint did not have."""
        return any(path == new or path.startswith(new + ".") for new in self.new_modules)

    def block_index(self, path: str) -> int | None:
        """The block that a module path lies in, or None outside the blocks."""
        found = re.match(re.escape(self.blocks_path) + r"\.(\d+)\.", path)
        return int(found.group(1)) if found else None


def positions(attention_mask: torch.Tensor, T: int) -> torch.Tensor:
    """Positions of the last T tokens, counted over real tokens: mask (B, S) -> (B, T) int64."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -T:]


def default_positions(attention_mask, T: int, past: int, device) -> torch.Tensor:
    """(B or 1, T): as `positions`, or counted from what the cache holds where there is no mask."""
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)[None]
    return positions(attention_mask, T)


def check_positions(position_ids: torch.Tensor, S: int, most: int, field: str) -> None:
    """Learned positions end; `field` is what config.json calls their number."""
    if most < S and int(position_ids.max()) >= most:  # a text of S tokens may be padded
        raise ValueError(
            f"a text has {int(position_ids.max()) + 1} tokens, virtual ones included; the model has {most} "
            f"positions ({field}), so cut the text"
        )


def attend(attention_mask: torch.Tensor | None, T: int, S: int, window: int | None = None, device=None):
    """Who sees whom: mask (B, S) over cached and new tokens -> bool (B or 1, 1, T, S), or None for causal.

    With a window, a token sees itself and the window - 1 tokens before it. Padding on the right needs no mask
    under causal attention, since no real token looks that way. A padding token sees itself, so that no row of
    the softmax is empty.
    """
    narrow = window is not None and window < S
    mask = None if attention_mask is None else attention_mask.bool()
    if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None
    if mask is None and not narrow:
        return None
    device = device if attention_mask is None else attention_mask.device
    allowed = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if narrow:
        allowed = allowed.triu(S - T - window + 1)
    if mask is None:
        return allowed[None, None]
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - T :]
    return (allowed & mask[:, None, :] | itself)[:, None]  # (B, 1, T, S)


def attend_everywhere(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The same of an encoder, whose tokens see every real token: bool (B, 1, 1, S), or None for all.

    A text without a real token sees all of its padding, so that no row of the softmax is empty.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    real = attention_mask.bool()
    return (real | ~real.any(dim=1, keepdim=True))[:, None, None]


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
