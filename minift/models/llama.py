"""The Llama architecture: pre-norm decoder, rotary positions, grouped queries, SwiGLU.

    x = x + o_proj(attention(q, k, v)),   q, k, v from RMSNorm(x), q and k rotated
    x = x + down_proj(silu(gate_proj(h)) * up_proj(h)),   h = RMSNorm(x)

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245. Module names and the split-half rotary layout are those of Hugging Face checkpoints.
"""

from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.kernels.attention import attention
from minift.models.interface import Dims, LanguageModel, attend, positions
from minift.models.layers import KVCache, RMSNorm, rotary_tables, rotate
from minift.models.wrappers import innermost


@dataclass(frozen=True)
class LlamaConfig:
    """Field names of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else field.type
            if not isinstance(value, kinds) or (isinstance(value, bool) and field.type is not bool):
                raise ValueError(f"config.json: {field.name} is {value!r}, expected {field.type.__name__}")
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"config.json: {field.name} is {value}; it must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; rotary positions need pairs")

    @classmethod
    def from_hf(cls, config: dict) -> "LlamaConfig":
        """From config.json, old (`rope_theta`) or new form (`rope_parameters`); the unsupported raises."""
        for name, supported in MUST_BE.items():
            if config.get(name, supported) not in (supported, None):
                raise ValueError(
                    f"config.json: {name} = {config[name]!r} changes the forward and is not "
                    f"supported; supported: {supported!r}"
                )
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, dict) or not isinstance(config.get("rope_scaling") or {}, dict):
            raise ValueError("config.json: rope_parameters and rope_scaling are tables")
        for table in (rope, config.get("rope_scaling") or {}):
            kind = table.get("rope_type", table.get("type", "default"))
            if kind != "default" or table.get("partial_rotary_factor", 1) != 1:
                raise ValueError(
                    f"config.json: rotary scaling {table} is not supported; supported: "
                    "rope_type 'default' over the whole head"
                )
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        missing = [
            n
            for n in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
            if n not in values
        ]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        D, H = values["hidden_size"], values["num_attention_heads"]
        if not isinstance(D, int) or not isinstance(H, int) or H < 1:
            raise ValueError(
                f"config.json: hidden_size is {D!r} and num_attention_heads {H!r}; both are counts"
            )
        values.setdefault("head_dim", D // H)
        return cls(**values)

    def to_hf(self) -> dict:
        values = asdict(self)
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": rope,
            **values,
        }


# Fields of config.json that change the forward, with the one value that this file computes.
MUST_BE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        D, q, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, q * self.head_dim, bias=False)
        self.k_proj = nn.Linear(D, kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(D, kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(q * self.head_dim, D, bias=False)

    def forward(self, x, rotary, mask, prefix, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, hd)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if prefix is not None:  # keys and values before the text, rotated already
            k, v = torch.cat((prefix[0], k), dim=2), torch.cat((prefix[1], v), dim=2)
        if cache is not None:
            k, v = cache.update(self.index, k, v)  # (B, KV, S, hd)
        o = attention(q, k, v, mask)  # (B, H, T, hd)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, mask, prefix, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, prefix, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The part that checkpoints call `model`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(LanguageModel):
    """`LlamaForCausalLM` of config.json: backbone as above, head tied to the embedding or not."""

    blocks_path = "model.layers"
    sites: ClassVar = {
        "attn_out": ("self_attn.o_proj",),
        "ffn": ("mlp",),
        "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
        "ffn_out": ("mlp.down_proj",),
        "k": ("self_attn.k_proj",),
        "v": ("self_attn.v_proj",),
        "norms": ("input_layernorm", "post_attention_layernorm", "model.norm"),
    }
    ignored_keys = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # recomputed from rope_theta

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    embed = property(lambda self: self.model.embed_tokens)
    head = property(lambda self: self.lm_head)

    @property
    def dims(self) -> Dims:
        c = self.config
        return Dims(
            c.num_hidden_layers,
            c.hidden_size,
            c.num_key_value_heads,
            c.head_dim,
            c.vocab_size,
            c.max_position_embeddings,
        )

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            innermost(self.lm_head).weight = innermost(self.model.embed_tokens).weight

    def run_blocks(self, x, attention_mask, position_ids, prefix_kv, cache):
        T, past = x.shape[1], 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = (
                torch.arange(past, past + T, device=x.device)[None]
                if attention_mask is None
                else positions(attention_mask, T)
            )
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = attend(attention_mask, T)
        for i, block in enumerate(self.model.layers):
            x = self.run_block(block, x, rotary, mask, None if prefix_kv is None else prefix_kv[i], cache)
        if cache is not None:
            cache.advance(T if prefix_kv is None else T + prefix_kv[0][0].shape[2])
        return self.model.norm(x)

    def make_cache(self, B: int, capacity: int) -> KVCache:
        return KVCache(B, capacity, self.dims, self.dtype, self.device)


# GGUF: metadata keys and tensor names of the same architecture (gguf-py's MODEL_ARCH.LLAMA).
GGUF_FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_config(metadata: dict, tensor_shapes: dict) -> dict:
    """The config.json that says the same as a GGUF file's metadata."""
    config = {"model_type": metadata.get("general.architecture")}
    for name, key in GGUF_FIELDS.items():
        if key in metadata:
            config[name] = metadata[key]
    if "token_embd.weight" in tensor_shapes:
        config["vocab_size"] = tensor_shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in tensor_shapes
    if "llama.attention.key_length" in metadata:
        config["head_dim"] = metadata["llama.attention.key_length"]
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        config["rope_scaling"] = {"rope_type": metadata["llama.rope.scaling.type"]}
    rotated = metadata.get("llama.rope.dimension_count")
    if rotated is not None and rotated != config.get("head_dim", _head_dim(config)):
        raise ValueError(
            f"the GGUF file rotates {rotated} dimensions of each head, not all of them; not supported"
        )
    if metadata.get("llama.rope.scale_linear", 1.0) != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": metadata["llama.rope.scale_linear"]}
    return config


def _head_dim(config: dict) -> int:
    return config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))


def gguf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in GGUF_NAMES:
        return f"model.layers.{parts[1]}.{GGUF_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in GGUF_NAMES:
        return f"{GGUF_NAMES[parts[0]]}.{parts[1]}"
    return name


def gguf_rows(name: str, config: LlamaConfig) -> torch.Tensor | None:
    """Row order that turns a stored q or k, interleaved for rotary pairs (2i, 2i+1), into split halves.

    Stored row (head, i, half) is wanted at (head, half, i); None for tensors stored as they are.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is None:
        return None
    rows = torch.arange(heads * config.head_dim)
    return rows.view(heads, config.head_dim // 2, 2).transpose(1, 2).reshape(-1)
