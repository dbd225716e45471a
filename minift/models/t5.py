"""The T5 architecture: encoder and decoder, pre-norm, positions as a trained bias of the attention's scores.

    x = x + o(softmax(q k^T + bias) v),   q, k, v from h = RMSNorm(x); no division by sqrt(hd), no biases
    x = x + the same with k and v from the encoder's states and no bias (decoder alone)
    x = x + wo(relu(wi(h))), or of version 1.1 and FLAN-T5 wo(gelu(wi_0(h)) * wi_1(h)),   h = RMSNorm(x)

bias[h, t, s] is the entry of a table for head h and for the bucket of the distance s - t; the first block of
each stack holds the table for all. Embeddings are one matrix for both stacks and, where the config says so,
for the head, which then reads states / sqrt(D).

A batch of seq2seq_lm has input_ids (B, S), attention_mask (B, S) and labels (B, T), -100 where there is no
loss: the decoder reads `shift_right(labels)` and predicts labels. Classifiers of texts and of answers read
their own input, shifted in the same way, in the decoder; those of tokens have an encoder alone.

Virtual tokens of prompts stand before the encoder's text, where the decoder's cross-attention sees them, as
PEFT 0.21 has it for prompt tuning and P-tuning; what a model returns has no place for them.

Source: Raffel et al. 2020, arXiv:1910.10683, sections 2.1 and 3.1.1; version 1.1: Shazeer 2020,
arXiv:2002.05202. Modules, heads and the fields of config.json are those of transformers (5.23, models/t5).
"""

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.kernels.attention import causal_mask
from minift.models.config import LARGEST, ModelConfig, check_choice, check_supported
from minift.models.heads import last_token
from minift.models.interface import Dims, LanguageModel, attend, attend_everywhere
from minift.models.layers import CrossCache, RMSNorm
from minift.models.slots import with_virtual_tokens
from minift.models.weights import same_tensor
from minift.models.wrappers import innermost

FEED_FORWARD = {"relu": "relu", "gated-gelu": "gelu_new"}  # feed_forward_proj -> dense_act_fn
ENCODER_MODEL = "T5EncoderModel"  # the one architecture whose name tells that there is no decoder


@dataclass(frozen=True)
class T5Config(ModelConfig):
    """T5, T5 version 1.1, FLAN-T5."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    is_encoder_decoder: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0  # where config.json says nothing, that of padding

    MUST_BE: ClassVar = {"model_type": ("t5",), "is_decoder": (False,), "tie_encoder_decoder": (None, False)}
    BLOCKS: ClassVar = ("num_layers", "num_decoder_layers")
    family: ClassVar[str] = "T5"

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "feed_forward_proj", FEED_FORWARD)
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or farthest <= buckets // 2:
            raise ValueError(
                f"config.json: relative_attention_num_buckets is {buckets}, at least 4 are allowed, and "
                f"relative_attention_max_distance is {farthest}, which must be above half of them"
            )

    @classmethod
    def from_hf(cls, config: dict) -> "T5Config":
        """From config.json, old or of transformers 5.

        Until version 5 tie_word_embeddings also said whether the head reads scaled states; since then
        scale_decoder_outputs says that, tie_word_embeddings is always true, and a head is tied unless the
        checkpoint stores another matrix for it (`T5.settle`).
        """
        config = dict(config)
        if config.get("num_decoder_layers") is None:
            config["num_decoder_layers"] = config.get("num_layers")
        if config.get("scale_decoder_outputs") is None:
            config["scale_decoder_outputs"] = config.get("tie_word_embeddings") is not False
        if config.get("decoder_start_token_id") is None:
            config["decoder_start_token_id"] = config.get("pad_token_id")
        if config.get("architectures") == [ENCODER_MODEL]:
            config["is_encoder_decoder"] = False  # transformers 4 saved it as true
        found = super().from_hf(config)
        act = FEED_FORWARD[found.feed_forward_proj]
        check_supported(config, {"dense_act_fn": (act, None), "is_gated_act": (found.gated, None)})
        return found

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"

    @property
    def inner(self) -> tuple[str, ...]:
        """The layers that read the feed-forward's input."""
        return ("wi_0", "wi_1") if self.gated else ("wi",)


def bucket(distance: torch.Tensor, buckets: int, farthest: int, causal: bool) -> torch.Tensor:
    """The table's entry for a distance, key's place less query's, of any shape; int64.

    With n buckets, the first n/2 are for the distances below n/2 tokens, one each; the others for ranges that
    grow as powers, up to `farthest`, and the last one for all beyond:

        n/2 + floor(n/2 * ln(d / (n/2)) / ln(farthest / (n/2))),   at most n - 1

    An encoder has half of the buckets for tokens before and half for those behind; a decoder has none for
    what it cannot see. In fp32, as T5 was trained: on the border of two ranges it decides by its rounding.
    """
    n = buckets if causal else buckets // 2
    d = (-distance).clamp(min=0) if causal else distance.abs()
    near = n // 2
    turns = torch.log(d.clamp(min=near).float() / near) / math.log(farthest / near)
    far = near + (turns * (n - near)).long()
    found = torch.where(d < near, d, far.clamp(max=n - 1))
    return found if causal else found + n * (distance > 0)


class Attention(nn.Module):
    """The first of each stack knows positions."""

    def __init__(self, config: T5Config, positions: bool = False, causal: bool = False):
        super().__init__()
        self.config, self.causal = config, causal
        D, inner = config.d_model, config.num_heads * config.d_kv
        self.q = nn.Linear(D, inner, bias=False)
        self.k = nn.Linear(D, inner, bias=False)
        self.v = nn.Linear(D, inner, bias=False)
        self.o = nn.Linear(inner, D, bias=False)
        if positions:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)

    def position_bias(self, T: int, S: int) -> torch.Tensor:
        """For queries at the last T of S places: (1, H, T, S)."""
        table, farthest = self.relative_attention_bias, self.config.relative_attention_max_distance
        weight = innermost(table).weight  # (buckets, H)
        distances = torch.arange(1 - S, T, device=weight.device)  # (S + T - 1,)
        along = table(bucket(distances, len(weight), farthest, self.causal)[None])[0]  # (S + T - 1, H)
        return along.T.unfold(1, S, 1).flip(1)[None]  # the last query's keys are the farthest behind

    def keys_values(self, x):
        """(B, S, D) -> keys and values, each (B, H, S, hd)."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def _heads(self, x):
        return x.view(*x.shape[:2], -1, self.config.d_kv).transpose(1, 2)

    def forward(self, x, k, v, bias):
        o = attention(self._heads(self.q(x)), k, v, bias)  # (B, H, T, hd)
        return self.o(o.transpose(1, 2).reshape(*x.shape[:2], -1))


def attention(q, k, v, bias=None):
    """softmax(q k^T + bias) v: q (B, H, T, hd), k and v (B, H, S, hd), bias broadcast to (B, H, T, S)."""
    if q.device.type == "cpu" and torch.is_grad_enabled():  # torch's op is slower to train there with a bias
        scores = q @ k.transpose(-1, -2)  # (B, H, T, S)
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


class FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        D, F_ = config.d_model, config.d_ff
        self.gated = config.gated
        for name in config.inner:
            self.add_module(name, nn.Linear(D, F_, bias=False))
        self.wo = nn.Linear(F_, D, bias=False)

    def forward(self, x):
        if self.gated:
            return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return self.wo(F.relu(self.wi(x)))


class Block(nn.Module):
    def __init__(self, config: T5Config, index: int, decodes: bool):
        super().__init__()
        self.index = index
        parts = {"SelfAttention": Attention(config, positions=index == 0, causal=decodes)}
        if decodes:
            parts["EncDecAttention"] = Attention(config)
        parts["DenseReluDense"] = FeedForward(config)
        norm = (config.d_model, config.layer_norm_epsilon)
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": RMSNorm(*norm)}) for name, part in parts.items()
        )

    def forward(self, x, bias, cache=None, states=None, kv=None, cross=None):
        """A decoder's block reads the encoder's states (B, S, D), or kv, their keys and values of this block;
        `cross` is what is added to those scores."""
        own, *others, last = self.layer
        h = own.layer_norm(x)
        k, v = own.SelfAttention.keys_values(h)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, H, S, hd)
        x = x + own.SelfAttention(h, k, v, bias)
        for other in others:
            k, v = other.EncDecAttention.keys_values(states) if kv is None else kv
            x = x + other.EncDecAttention(other.layer_norm(x), k, v, cross)
        return x + last.DenseReluDense(last.layer_norm(x))


class Stack(nn.Module):
    def __init__(self, config: T5Config, decodes: bool):
        super().__init__()
        blocks = config.num_decoder_layers if decodes else config.num_layers
        self.block = nn.ModuleList(Block(config, i, decodes) for i in range(blocks))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def bias(self, T: int, S: int, seen=None) -> torch.Tensor:
        """What is added to the scores: of positions, and of who sees whom (B or 1, 1, T or 1, S)."""
        return masked(self.block[0].layer[0].SelfAttention.position_bias(T, S), seen)


def masked(bias: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """The lowest number where nothing is seen: finite, so that a text without a real token gives numbers."""
    return bias if seen is None else bias.masked_fill(~seen, torch.finfo(bias.dtype).min)


HEAD_PATHS = {
    "seq2seq_lm": "lm_head",
    "sequence_classification": "classification_head.out_proj",
    "token_classification": "classifier",
    "question_answering": "qa_outputs",
    "none": "head_of_none",
}
COPY = re.compile(r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight")  # of the embeddings


class T5(LanguageModel):
    """`T5ForConditionalGeneration` of config.json and its siblings; `T5EncoderModel` has the head none."""

    heads: ClassVar = tuple(HEAD_PATHS)
    trunks: ClassVar = ("transformer",)
    sites: ClassVar = {
        "attn_out": ("SelfAttention.o", "EncDecAttention.o"),
        "ffn": ("DenseReluDense",),
        "ffn_in": ("wi",),  # or two, by the config
        "ffn_out": ("wo",),
        "k": ("k",),
        "v": ("v",),
        "norms": ("layer_norm", "final_layer_norm"),
    }
    ignored_keys: ClassVar = (r".*\.EncDecAttention\.relative_attention_bias\.weight",)  # never used
    head_keys: ClassVar = (r"lm_head\.weight", r"(classification_head|classifier|qa_outputs)\..*")
    usual_targets: ClassVar = ("q", "v")
    takes_prefix = False  # its decoder attends twice, and a prefix has keys for one attention of each block

    def __init__(self, config: T5Config, head: str = "seq2seq_lm", labels: tuple[str, ...] = ()):
        super().__init__(config, head, labels)
        self.is_encoder_decoder = head != "token_classification" and config.is_encoder_decoder
        if not self.is_encoder_decoder and head not in ("token_classification", "none"):
            raise ValueError(
                f"config.json: is_encoder_decoder is false, and the head {head!r} reads a decoder; an "
                "encoder alone has the heads token_classification and none"
            )
        self.sites = {**self.sites, "ffn_in": config.inner}
        self.trunk = "transformer" if head.endswith("_classification") else ""
        stack = "decoder" if self.is_encoder_decoder else "encoder"
        self.blocks_path = f"{self.trunk}.{stack}.block".lstrip(".")
        if not self.is_encoder_decoder:
            self.head_keys = (*self.head_keys, r"(transformer\.)?decoder\..*")
        V, D = config.vocab_size, config.d_model
        parts = {"shared": nn.Embedding(V, D), "encoder": Stack(config, decodes=False)}
        if self.is_encoder_decoder:
            parts["decoder"] = Stack(config, decodes=True)
        for name, part in {self.trunk: nn.ModuleDict(parts)}.items() if self.trunk else parts.items():
            self.add_module(name, part)
        self.head_modules = (HEAD_PATHS[head],)
        if head == "none":
            self.head_of_none = nn.Identity()
        elif head == "sequence_classification":
            layers = {"dense": nn.Linear(D, D), "out_proj": nn.Linear(D, len(labels))}
            self.classification_head = nn.ModuleDict(layers)
            self.head_modules = ("classification_head.dense", "classification_head.out_proj")
        elif head == "seq2seq_lm":
            self.lm_head = nn.Linear(D, V, bias=False)
        else:
            self.add_module(HEAD_PATHS[head], nn.Linear(D, len(labels) or 2))
        self.tie_weights()

    root = property(lambda self: self.get_submodule(self.trunk))
    embed = property(lambda self: self.root.shared)
    head = property(lambda self: self.get_submodule(HEAD_PATHS[self.head_kind]))
    decoder_start_id = property(lambda self: self.config.decoder_start_token_id)

    @property
    def architecture(self):
        alone = self.head_kind == "none" and not self.is_encoder_decoder
        return ENCODER_MODEL if alone else super().architecture

    @property
    def dims(self) -> Dims:
        c = self.config  # positions are relative and end nowhere
        return Dims(len(self.blocks), c.d_model, c.num_heads, c.d_kv, c.vocab_size, LARGEST)

    def block_index(self, path):
        """Block 3 of the encoder and block 3 of the decoder are both number 3."""
        found = re.match(r"(?:transformer\.)?(?:encoder|decoder)\.block\.(\d+)\.", path)
        return int(found.group(1)) if found else None

    def settle(self, tensors):
        """The stacks' copies of the embeddings must equal them; another matrix for the head unties it."""
        shared = f"{self.trunk}.shared.weight".lstrip(".")
        for name in [name for name in tensors if COPY.fullmatch(name)]:
            copy = tensors.pop(name)
            if tensors.setdefault(shared, copy) is not copy and not same_tensor(tensors[shared], copy):
                raise ValueError(f"the checkpoint stores {name} with other numbers than {shared}; T5 has one")
        stored = tensors.get("lm_head.weight")
        if self.tied and stored is not None and not same_tensor(tensors.get(shared, stored), stored):
            self.config = replace(self.config, tie_word_embeddings=False)
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.lm_head.weight))

    def backbone(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        prefix_kv=None,
        cache=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
    ):
        """The decoder's states (B, T, D), or the encoder's where it is alone; scaled for a head that is.

        attention_mask (B, S) is the encoder's, decoder_attention_mask is over the decoder's tokens, cached
        and new. A cache that holds keys and values of the encoder's states stands for the encoder.
        """
        if position_ids is not None or prefix_kv is not None:
            raise ValueError("a T5 has relative positions and takes no position_ids and no prefix_kv")
        if not self.is_encoder_decoder:
            if cache is not None or decoder_input_ids is not None or decoder_attention_mask is not None:
                raise ValueError("this T5 is an encoder alone: it takes no cache and nothing for a decoder")
            return self.encode(input_ids, attention_mask, inputs_embeds)
        if decoder_input_ids is None and decoder_attention_mask is not None:
            raise ValueError("decoder_attention_mask is given and decoder_input_ids are not; give both")
        if decoder_input_ids is None:
            decoder_input_ids, decoder_attention_mask = self._own_input(input_ids, attention_mask)
        states, kv = None, [None] * len(self.blocks)
        if cache is None or cache.encoded is None:
            states, seen = self._read(input_ids, attention_mask, inputs_embeds)
        if cache is not None:
            if cache.encoded is None:
                cache.encoded = [b.layer[1].EncDecAttention.keys_values(states) for b in self.blocks]
                cache.seen = seen
            kv, seen = cache.encoded, cache.seen
        cross = None if seen is None else masked(self.embed_weight.new_zeros(1), seen)  # (B, 1, 1, S)
        x = self.embed(decoder_input_ids)  # (B, T, D)
        bias = self._decoder_bias(*x.shape[:2], decoder_attention_mask, cache)
        for block, known in zip(self.blocks, kv, strict=True):
            x = self.run_block(block, x, bias, cache, states, known, cross)
        if cache is not None:
            cache.advance(x.shape[1])
        x = self.root.decoder.final_layer_norm(x)
        scaled = self.config.scale_decoder_outputs and self.head_kind == "seq2seq_lm"
        return x * self.config.d_model**-0.5 if scaled else x

    def encode(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        """The encoder's states of the text: (B, S) -> (B, S, D)."""
        states, _ = self._read(input_ids, attention_mask, inputs_embeds)
        text = inputs_embeds if input_ids is None else input_ids
        return states[:, states.shape[1] - text.shape[1] :]

    def _read(self, input_ids, attention_mask, inputs_embeds):
        """The encoder's states, those of virtual tokens before the text among them, and which are real:
        (B, P + S, D) and bool (B, 1, 1, P + S), or None for all."""
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, D)
        x, attention_mask, _, _ = with_virtual_tokens(self, x, attention_mask, None, None, None)
        stack, S, seen = self.root.encoder, x.shape[1], attend_everywhere(attention_mask)
        bias = stack.bias(S, S, seen)
        for block in stack.block:
            x = self.run_block(block, x, bias)
        return stack.final_layer_norm(x), seen

    def _decoder_bias(self, B: int, T: int, attention_mask, cache):
        S = T if cache is None else cache.length + T
        if attention_mask is not None and tuple(attention_mask.shape) != (B, S):
            raise ValueError(
                f"decoder_attention_mask has shape {tuple(attention_mask.shape)}; over the decoder's tokens, "
                f"cached and new, it is {(B, S)}"
            )
        seen = attend(attention_mask, T, S, device=self.device)
        if seen is None and T > 1:
            seen = causal_mask(T, S, self.device)
        return self.root.decoder.bias(T, S, seen)

    def shift_right(self, labels, attention_mask=None):
        """What the decoder reads to write labels (B, T): the start, then all but the last; -100 is padding.

        With a mask (B, T) the start stands before the first real token of each text, wherever that is.
        """
        start, padding = self.decoder_start_id, self.config.pad_token_id
        shifted = F.pad(labels[:, :-1], (1, 0), value=start)  # (B, T)
        if attention_mask is not None:
            first = attention_mask.bool() & (attention_mask.long().cumsum(dim=-1) == 1)
            shifted = shifted.masked_fill(first, start)
        return shifted.masked_fill(shifted == -100, padding)

    def _own_input(self, input_ids, attention_mask):
        """What the decoder reads without decoder_input_ids, and its mask: the encoder's text, shifted.

        transformers gives it no mask there, and its answers change with padding on the left.
        """
        if self.head_kind in ("seq2seq_lm", "none") or input_ids is None:
            raise ValueError("decoder_input_ids are missing; model.shift_right(labels) makes them of labels")
        return self.shift_right(input_ids, attention_mask), attention_mask

    def pool(self, hidden, input_ids=None, attention_mask=None):
        """tanh(dense(x)) of the decoder's state x at the last EOS of its text: (B, T, D) -> (B, D)."""
        if input_ids is None:
            raise ValueError("a T5 sequence classifier reads at the last EOS of input_ids; give them")
        ends = input_ids == self.config.eos_token_id  # (B, T)
        if attention_mask is not None:
            ends = ends & attention_mask.bool()
        if not bool(ends.any(dim=1).all()):
            raise ValueError(
                f"text {int(ends.any(dim=1).long().argmin())} of the batch has no eos_token_id, "
                f"{self.config.eos_token_id}; a T5 sequence classifier reads there, let the tokenizer add it"
            )
        return self.classification_head.dense(last_token(hidden, ends)).tanh()

    def make_cache(self, B, capacity):
        if not self.is_encoder_decoder:
            raise ValueError("an encoder sees whole texts at once and writes none: it has no KV cache")
        return CrossCache(B, capacity, self.dims, self.dtype, self.device)
