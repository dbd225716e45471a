"""The GPT-2 architecture: pre-norm decoder, learned positions, one fused layer for q, k and v, tied head.

    x = wte[token] + wpe[position]
    x = x + c_proj(attention(q, k, v)),   [q | k | v] = c_attn(ln_1(x))
    x = x + c_proj(gelu(c_fc(ln_2(x))))

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. gelu is the
tanh form of Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2. Module names are those of Hugging Face
checkpoints, which hold the four matrices of a block as (in, out); here they are (out, in).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.kernels.attention import attention
from minift.models.config import ModelConfig, check_multiple
from minift.models.heads import HEADS
from minift.models.interface import Dims, LanguageModel, attend, check_positions, default_positions


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None  # of the feed-forward; 4 n_embd by default
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None

    BLOCKS: ClassVar = ("n_layer",)
    MUST_BE: ClassVar = {  # reorder_and_upcast_attn is not here: it changes only how scores are rounded
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }

    def __post_init__(self):
        super().__post_init__()
        check_multiple(self, "n_embd", "n_head")


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.index, self.n_head = index, config.n_head
        D = config.n_embd
        self.c_attn = nn.Linear(D, 3 * D)
        self.c_proj = nn.Linear(D, D)

    def forward(self, x, mask, prefix, cache):
        B, T, D = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, hd)
        if prefix is not None:  # keys and values before the text
            k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, H, S, hd)
        o = attention(q, k, v, mask)  # (B, H, T, hd)
        return self.c_proj(o.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        D, F_ = config.n_embd, config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(D, F_)
        self.c_proj = nn.Linear(F_, D)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, index)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, mask, prefix, cache):
        x = x + self.attn(self.ln_1(x), mask, prefix, cache)
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """The part that checkpoints call `transformer`."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)


HEAD_NAMES = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "classifier",
    "question_answering": "qa_outputs",
    "none": "head_of_none",
}
ARCHITECTURES = {**{head: "GPT2" + HEADS[head] for head in HEAD_NAMES}, "causal_lm": "GPT2LMHeadModel"}


class GPT2(LanguageModel):
    """`GPT2LMHeadModel` of config.json and its siblings: the decoder above under one of the heads."""

    heads: ClassVar = tuple(HEAD_NAMES)
    trunks: ClassVar = ("transformer",)
    trunk, blocks_path = "transformer", "transformer.h"
    sites: ClassVar = {
        "attn_out": ("attn.c_proj",),
        "ffn": ("mlp",),
        "ffn_in": ("mlp.c_fc",),
        "ffn_out": ("mlp.c_proj",),
        "k": ("attn.c_attn",),  # one layer makes q, k and v
        "v": ("attn.c_attn",),
        "norms": ("ln_1", "ln_2", "ln_f"),
    }
    usual_targets: ClassVar = ("c_attn",)
    ignored_keys: ClassVar = (
        r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
    )  # the causal mask, once stored
    head_keys: ClassVar = (r"lm_head\.weight", r"(score|classifier|qa_outputs)\..*")
    transposed: ClassVar = (r".*\.(c_attn|c_fc|c_proj)\.weight",)

    def __init__(self, config: GPT2Config, head: str = "causal_lm", labels: tuple[str, ...] = ()):
        super().__init__(config, head, labels)
        self.transformer = Decoder(config)
        self.head_modules = (HEAD_NAMES[head],)
        outputs = {"causal_lm": config.vocab_size, "question_answering": 2}.get(head, len(labels))
        biased = head in ("token_classification", "question_answering")
        last = nn.Identity() if head == "none" else nn.Linear(config.n_embd, outputs, bias=biased)
        self.add_module(HEAD_NAMES[head], last)
        self.tie_weights()

    embed = property(lambda self: self.transformer.wte)
    head = property(lambda self: getattr(self, HEAD_NAMES[self.head_kind]))

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.head_kind]

    @property
    def dims(self) -> Dims:
        c = self.config
        return Dims(c.n_layer, c.n_embd, c.n_head, c.n_embd // c.n_head, c.vocab_size, c.n_positions)

    def run_blocks(self, x, attention_mask, position_ids, prefix_kv, cache):
        T, past = x.shape[1], 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = default_positions(attention_mask, T, past, x.device)
        S = past + T if attention_mask is None else attention_mask.shape[1]
        check_positions(position_ids, S, self.dims.context, "n_positions")
        x = x + self.transformer.wpe(position_ids)  # (B, T, D)
        mask = attend(attention_mask, T, S, device=x.device)
        for i, block in enumerate(self.transformer.h):
            x = self.run_block(block, x, mask, None if prefix_kv is None else prefix_kv[i], cache)
        if cache is not None:
            cache.advance(T if prefix_kv is None else T + prefix_kv[0][0].shape[2])
        return self.transformer.ln_f(x)
