"""Shapes of published models without their forwards: what plans and counts need, on the meta device.

A family is a function from config.json to its modules, under the names of the published checkpoint. Matrices
are (out, in), also GPT-2's, whose checkpoint holds them transposed. BERT stands here as its checkpoint's
`bert`, pooler included, without a head. GPT-3 has no public checkpoint: its shapes are table 2.1 of Brown et
al. 2020 (arXiv:2005.14165), with q, k and v apart as in Hu et al. 2021 (arXiv:2106.09685).
"""

import re
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minift.models.interface import Dims, LanguageModel
from minift.models.layers import RMSNorm
from minift.models.llama import Llama
from minift.models.wrappers import get_module, innermost


class SkipInit(TorchFunctionMode):
    """Leave out torch.nn.init: random starts on the meta device load 77 MB of modules for nothing."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


@contextmanager
def shapes_only():
    """Modules made in here lie on the meta device."""
    with torch.device("meta"), SkipInit():
        yield


class Layout(NamedTuple):
    """A family at one size."""

    modules: dict[str, nn.Module]  # path -> module, in the model's order
    dims: Dims
    sites: dict[str, tuple[str, ...]]
    blocks_path: str
    embed: str
    head: str
    tied: bool


class Skeleton(LanguageModel):
    """A model of a family in LAYOUTS that plans, counts and takes adapters, and computes nothing."""

    def __init__(self, config: dict):
        super().__init__(config)
        self.layout = LAYOUTS[config["architectures"][0]](config)
        self.blocks_path, self.sites = self.layout.blocks_path, self.layout.sites
        for path, module in self.layout.modules.items():
            _place(self, path, module)
        self.tie_weights()

    embed = property(lambda self: get_module(self, self.layout.embed))
    head = property(lambda self: get_module(self, self.layout.head))
    dims = property(lambda self: self.layout.dims)

    def tie_weights(self):
        if self.layout.tied:
            innermost(self.head).weight = innermost(self.embed).weight

    def block_index(self, path):
        """T5: block 3 of the encoder and block 3 of the decoder are both number 3."""
        stacks = {self.blocks_path, self.blocks_path.replace("decoder", "encoder")}
        found = re.match(rf"(?:{'|'.join(map(re.escape, stacks))})\.(\d+)\.", path)
        return int(found.group(1)) if found else None

    def run_blocks(self, *_):
        raise ValueError(f"{self.source or 'this model'} is a preset, shapes without weights or a forward")


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for part, child in zip(parents, path.split(".")[1:], strict=True):
        if not hasattr(root, part):
            root.add_module(part, nn.ModuleList() if child.isdigit() else nn.Module())
        root = getattr(root, part)
    root.add_module(name, module)


def stack(path: str, count: int, block) -> dict[str, nn.Module]:
    """Path -> module of `count` blocks; `block(i)` gives those of one."""
    return {f"{path}.{i}.{name}": module for i in range(count) for name, module in block(i).items()}


def gpt(c: dict, attention: dict[str, int]) -> Layout:
    """GPT-2 and GPT-3; `attention`: the layers that make q, k and v -> their widths as multiples of D."""
    D, V = c["n_embd"], c["vocab_size"]

    def block(i):
        return {
            "ln_1": nn.LayerNorm(D),
            **{name: nn.Linear(D, width * D) for name, width in attention.items()},
            "attn.c_proj": nn.Linear(D, D),
            "ln_2": nn.LayerNorm(D),
            "mlp.c_fc": nn.Linear(D, 4 * D),
            "mlp.c_proj": nn.Linear(4 * D, D),
        }

    modules = {
        "transformer.wte": nn.Embedding(V, D),
        "transformer.wpe": nn.Embedding(c["n_positions"], D),
        **stack("transformer.h", c["n_layer"], block),
        "transformer.ln_f": nn.LayerNorm(D),
        "lm_head": nn.Linear(D, V, bias=False),
    }
    names = list(attention)
    sites = {
        "attn_out": ("attn.c_proj",),
        "ffn": ("mlp",),
        "ffn_in": ("mlp.c_fc",),
        "ffn_out": ("mlp.c_proj",),
        "k": (names[-2:][0],),  # the same as v's where they are fused
        "v": (names[-1],),
        "norms": ("ln_1", "ln_2", "transformer.ln_f"),
    }
    dims = Dims(c["n_layer"], D, c["n_head"], D // c["n_head"], V, c["n_positions"])
    return Layout(modules, dims, sites, "transformer.h", "transformer.wte", "lm_head", tied=True)


def bert(c: dict) -> Layout:
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]

    def block(i):
        return {
            **{f"attention.self.{name}": nn.Linear(D, D) for name in ("query", "key", "value")},
            "attention.output.dense": nn.Linear(D, D),
            "attention.output.LayerNorm": nn.LayerNorm(D),
            "intermediate.dense": nn.Linear(D, F),
            "output.dense": nn.Linear(F, D),
            "output.LayerNorm": nn.LayerNorm(D),
        }

    modules = {
        "bert.embeddings.word_embeddings": nn.Embedding(V, D),
        "bert.embeddings.position_embeddings": nn.Embedding(c["max_position_embeddings"], D),
        "bert.embeddings.token_type_embeddings": nn.Embedding(c["type_vocab_size"], D),
        "bert.embeddings.LayerNorm": nn.LayerNorm(D),
        **stack("bert.encoder.layer", c["num_hidden_layers"], block),
        "bert.pooler.dense": nn.Linear(D, D),
        "classifier": nn.Identity(),  # a task brings its own
    }
    sites = {
        "attn_out": ("attention.output.dense",),
        "ffn": (),  # no module of its own
        "ffn_in": ("intermediate.dense",),
        "ffn_out": ("bert.encoder.layer.*[0-9].output.dense",),  # and no attention.output.dense
        "k": ("key",),
        "v": ("value",),
        "norms": ("LayerNorm",),
    }
    H = c["num_attention_heads"]
    dims = Dims(c["num_hidden_layers"], D, H, D // H, V, c["max_position_embeddings"])
    embed = "bert.embeddings.word_embeddings"
    return Layout(modules, dims, sites, "bert.encoder.layer", embed, "classifier", tied=False)


def t5(c: dict) -> Layout:
    D, F, V, heads = c["d_model"], c["d_ff"], c["vocab_size"], c["num_heads"]
    inner, gated = heads * c["d_kv"], c["feed_forward_proj"].startswith("gated")

    def attention(at, biased):
        found = {f"{at}.{name}": nn.Linear(D, inner, bias=False) for name in "qkv"}
        found[f"{at}.o"] = nn.Linear(inner, D, bias=False)
        if biased:  # the first block's; the others reuse it
            buckets = c["relative_attention_num_buckets"]
            found[f"{at}.relative_attention_bias"] = nn.Embedding(buckets, heads)
        return found

    def block(i, cross=False):
        parts = [
            attention("SelfAttention", i == 0),
            *([attention("EncDecAttention", False)] if cross else []),
        ]
        ffn_in = {f"DenseReluDense.{n}": nn.Linear(D, F, bias=False) for n in wi}
        parts.append({**ffn_in, "DenseReluDense.wo": nn.Linear(F, D, bias=False)})
        return {
            f"layer.{n}.{name}": module
            for n, part in enumerate(parts)
            for name, module in {**part, "layer_norm": RMSNorm(D, 1e-6)}.items()
        }

    wi = ("wi_0", "wi_1") if gated else ("wi",)
    modules = {
        "shared": nn.Embedding(V, D),
        **stack("encoder.block", c["num_layers"], block),
        "encoder.final_layer_norm": RMSNorm(D, 1e-6),
        **stack("decoder.block", c["num_layers"], lambda i: block(i, cross=True)),
        "decoder.final_layer_norm": RMSNorm(D, 1e-6),
        "lm_head": nn.Linear(D, V, bias=False),
    }
    sites = {
        "attn_out": ("SelfAttention.o", "EncDecAttention.o"),
        "ffn": ("DenseReluDense",),
        "ffn_in": wi,
        "ffn_out": ("wo",),
        "k": ("k",),
        "v": ("v",),
        "norms": ("layer_norm", "final_layer_norm"),
    }
    dims = Dims(c["num_layers"], D, heads, c["d_kv"], V, c["n_positions"])
    return Layout(modules, dims, sites, "decoder.block", "shared", "lm_head", c["tie_word_embeddings"])


def qwen2(c: dict) -> Layout:
    """Llama's tree; q, k and v have biases."""
    D, F, V, H = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_attention_heads"]
    hd, kv = D // H, c["num_key_value_heads"] * (D // H)

    def block(i):
        return {
            **{f"self_attn.{n}_proj": nn.Linear(D, out) for n, out in (("q", D), ("k", kv), ("v", kv))},
            "self_attn.o_proj": nn.Linear(D, D, bias=False),
            "mlp.gate_proj": nn.Linear(D, F, bias=False),
            "mlp.up_proj": nn.Linear(D, F, bias=False),
            "mlp.down_proj": nn.Linear(F, D, bias=False),
            "input_layernorm": RMSNorm(D, 1e-6),
            "post_attention_layernorm": RMSNorm(D, 1e-6),
        }

    modules = {
        "model.embed_tokens": nn.Embedding(V, D),
        **stack("model.layers", c["num_hidden_layers"], block),
        "model.norm": RMSNorm(D, 1e-6),
        "lm_head": nn.Linear(D, V, bias=False),
    }
    dims = Dims(c["num_hidden_layers"], D, kv // hd, hd, V, c["max_position_embeddings"])
    sites, tied = Llama.sites, c["tie_word_embeddings"]
    return Layout(modules, dims, sites, "model.layers", "model.embed_tokens", "lm_head", tied)


LAYOUTS = {
    "GPT2LMHeadModel": lambda c: gpt(c, {"attn.c_attn": 3}),
    "GPT3": lambda c: gpt(c, {"attn.q_proj": 1, "attn.k_proj": 1, "attn.v_proj": 1}),
    "BertModel": bert,
    "T5ForConditionalGeneration": t5,
    "Qwen2ForCausalLM": qwen2,
}
