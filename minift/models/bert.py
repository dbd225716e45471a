"""The BERT architecture: post-norm encoder, learned positions, token types.

    x = LayerNorm(word + position + token type)
    x = LayerNorm(x + dense(attention(q, k, v))),   q, k, v linear in x, every token seeing all real ones
    x = LayerNorm(x + dense(gelu(dense(x))))

A sequence classifier reads tanh(dense(x_0)), x_0 the state of the first real token. A masked language model
reads LayerNorm(gelu(dense(x))); its last layer is the embedding's matrix and a bias.
Source: Devlin et al. 2019, arXiv:1810.04805, section 3 and appendix A; the block: Vaswani et al. 2017,
arXiv:1706.03762, section 3. Module names are those of Hugging Face checkpoints.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.kernels.attention import attention
from minift.models.config import ModelConfig, check_choice, check_multiple
from minift.models.interface import Dims, LanguageModel, attend_everywhere, check_positions, default_positions

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class BertConfig(ModelConfig):
    family: ClassVar[str] = "Bert"
    MUST_BE: ClassVar[dict] = {
        "model_type": ("bert",),
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
    }

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_choice(self, "hidden_act", ACTIVATIONS)


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, with empty modules above it where there are none."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.types = config.type_vocab_size
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)

    def forward(self, words, position_ids, token_type_ids):
        x = words + self.position_embeddings(position_ids)  # (B, T, D)
        if self.types:
            types = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)  # (B, T)
            if token_type_ids is not None:
                types[:, types.shape[1] - token_type_ids.shape[1] :] = token_type_ids  # virtual ones keep 0
            x = x + self.token_type_embeddings(types)
        return self.LayerNorm(x)


class Block(nn.Module):
    """Two of the formulas above; `paths` is what a family calls its layers."""

    def __init__(self, config: BertConfig, paths: dict[str, str]):
        super().__init__()
        D, F_, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.paths, self.H = paths, config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        sizes = {"ffn_in": (D, F_), "ffn_out": (F_, D)}
        for name, path in paths.items():
            layer = nn.LayerNorm(D, eps) if "norm" in name else nn.Linear(*sizes.get(name, (D, D)))
            place(self, path, layer)

    def forward(self, x, mask, prefix):
        q, k, v, o, norm_1, ffn_in, ffn_out, norm_2 = map(self.get_submodule, self.paths.values())
        x = norm_1(x + o(self.mix(q(x), k(x), v(x), mask, prefix)))
        return norm_2(x + ffn_out(self.activation(ffn_in(x))))

    def mix(self, q, k, v, mask, prefix):
        """Attention in both directions: q, k and v (B, T, D) -> (B, T, D)."""
        q, k, v = (x.unflatten(-1, (self.H, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, T, hd)
        if prefix is not None:  # keys and values before the text
            k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
        return attention(q, k, v, mask, causal=False).transpose(1, 2).flatten(2)


class Bert(LanguageModel):
    """`BertModel` of config.json, or one of its siblings with a head."""

    block_paths: ClassVar[dict[str, str]] = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "norm_1": "attention.output.LayerNorm",
        "ffn_in": "intermediate.dense",
        "ffn_out": "output.dense",
        "norm_2": "output.LayerNorm",
    }
    last_layers: ClassVar[dict[str, str]] = {
        "masked_lm": "cls.predictions.decoder",
        "sequence_classification": "classifier",
        "token_classification": "classifier",
        "question_answering": "qa_outputs",
        "none": "head_of_none",
    }
    poolers: ClassVar[dict[str, str]] = {  # heads whose checkpoints have one
        "sequence_classification": "bert.pooler.dense",
        "none": "bert.pooler.dense",
    }
    transform: ClassVar[tuple[str, str]] = (  # before a masked LM's last layer
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
    )
    heads: ClassVar = tuple(last_layers)
    sites: ClassVar = {
        "attn_out": ("attention.output.dense",),
        "ffn": (),  # no module of its own
        "ffn_in": ("intermediate.dense",),
        "ffn_out": ("*.layer.*[0-9].output.dense",),  # and no attention.output.dense
        "k": ("key",),
        "v": ("value",),
        "norms": ("LayerNorm",),
    }
    usual_targets: ClassVar = ("query", "value")
    ignored_keys: ClassVar = (r"(\w+\.)?embeddings\.position_ids", r"cls\.seq_relationship\..*")
    head_keys: ClassVar = (r"(cls|classifier|qa_outputs)\..*",)
    renamed_keys: ClassVar = (
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    )
    trunk, blocks_path = "bert", "bert.encoder.layer"
    squash: ClassVar = staticmethod(torch.tanh)  # of the pooler
    first_position = 0  # what the position of a text's first token is in the table

    def __init__(self, config: BertConfig, head: str = "masked_lm", labels: tuple[str, ...] = ()):
        super().__init__(config, head, labels)
        D, parts = config.hidden_size, {}
        if head == "masked_lm":
            dense, norm = self.transform
            parts = {dense: nn.Linear(D, D), norm: nn.LayerNorm(D, config.layer_norm_eps)}
        elif head in self.poolers:
            parts = {self.poolers[head]: nn.Linear(D, D)}
        outputs = config.vocab_size if head == "masked_lm" else len(labels) or 2
        parts[self.last_layers[head]] = nn.Identity() if head == "none" else nn.Linear(D, outputs)
        blocks = nn.ModuleList(Block(config, self.block_paths) for _ in range(config.num_hidden_layers))
        place(self, f"{self.trunk}.embeddings", Embeddings(config))
        place(self, self.blocks_path, blocks)
        for path, module in parts.items():
            place(self, path, module)
        whole = (re.match(rf"({self.trunk}\.)?\w+", path)[0] for path in parts)  # "cls" for all in it
        self.head_modules = tuple(dict.fromkeys(whole))
        self.tie_weights()

    embeddings = property(lambda self: getattr(self, self.trunk).embeddings)
    embed = property(lambda self: self.embeddings.word_embeddings)
    head = property(lambda self: self.get_submodule(self.last_layers[self.head_kind]))

    @property
    def dims(self) -> Dims:
        c, position = self.config, self.first_position
        D, H = c.hidden_size, c.num_attention_heads
        return Dims(c.num_hidden_layers, D, H, D // H, c.vocab_size, c.max_position_embeddings - position)

    def settle(self, tensors):
        """A pooler that no head reads is left out; a masked LM's last bias stands alone in checkpoints.

        bert-base-uncased is BertForMaskedLM by its config and has a pooler. transformers ties the bias of the
        last layer to the one that stands alone, and without tied weights reads the last layer's.
        """
        own = dict(self.named_parameters())
        for name in [name for name in tensors if name not in own]:
            if re.fullmatch(rf"({self.trunk}\.)?pooler\.dense\.(weight|bias)", name):
                del tensors[name]
        last = f"{self.last_layers[self.head_kind]}.bias"
        alone = tensors.pop(last.replace(".decoder.", "."), None) if ".decoder." in last else None
        if alone is not None and (self.tied or last not in tensors):
            tensors[last] = alone

    def run_blocks(self, x, attention_mask, position_ids, prefix_kv, cache, token_type_ids=None):
        """token_type_ids (B, T) are those of the text, by default 0; virtual tokens have 0."""
        if position_ids is None:
            position_ids = default_positions(attention_mask, x.shape[1], 0, x.device)
        S = x.shape[1] if attention_mask is None else attention_mask.shape[1]
        check_positions(position_ids, S, self.dims.context, "max_position_embeddings")
        x = self.embeddings(x, position_ids + self.first_position, token_type_ids)
        mask = attend_everywhere(attention_mask)
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, mask, None if prefix_kv is None else prefix_kv[i])
        if self.head_kind != "masked_lm":
            return x
        dense, norm = map(self.get_submodule, self.transform)
        return norm(ACTIVATIONS[self.config.hidden_act](dense(x)))

    def pool(self, hidden, input_ids=None, attention_mask=None):
        """The state of each text's first real token through the pooler: (B, T, D) -> (B, D)."""
        first = hidden[:, 0]
        if attention_mask is not None:
            rows = torch.arange(len(hidden), device=hidden.device)
            first = hidden[rows, attention_mask.long().argmax(dim=-1)]
        return self.squash(self.get_submodule(self.poolers[self.head_kind])(first))

    def make_cache(self, B, capacity):
        raise ValueError(f"{self.architecture} reads whole texts at once and has no KV cache")
