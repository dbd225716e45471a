"""The Llama architecture: pre-norm decoder, rotary positions, grouped queries, SwiGLU.

    x = x + o_proj(attention(q, k, v)),   q, k, v from RMSNorm(x), q and k rotated
    x = x + down_proj(silu(gate_proj(h)) * up_proj(h)),   h = RMSNorm(x)

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.2; grouped queries: Ainslie et al. 2023,
arXiv:2305.13245. Module names and the split-half rotary layout are those of Hugging Face checkpoints.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from minift.kernels.attention import attention
from minift.kernels.decode_attention import decode_attention
from minift.models.config import ModelConfig, check_choice, check_multiple
from minift.models.interface import Dims, LanguageModel, attend, default_positions
from minift.models.layers import Linear, RMSNorm, rotary_frequencies, rotary_tables, rotate


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for texts longer than those of the pre-training.

    linear: w / factor (Chen et al. 2023, arXiv:2306.15595). llama3: w / factor for waves that turn fewer than
    low_freq_factor times in the original context, w for more than high_freq_factor, in between a mean by
    the number of turns (Llama 3.1's reference code, `apply_scaling`).
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __call__(self, w: torch.Tensor) -> torch.Tensor:
        """Frequencies (hd/2,) -> scaled ones."""
        if self.rope_type == "linear":
            return w / self.factor
        turns = self.original_max_position_embeddings * w / (2 * math.pi)
        share = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - share) * w / self.factor + share * w

    @classmethod
    def from_hf(cls, table: dict) -> "RopeScaling | None":
        """From `rope_scaling` or `rope_parameters` of config.json."""
        table = dict(table)
        kind = table.pop("rope_type", table.pop("type", "default"))
        table.pop("type", None), table.pop("rope_theta", None)
        if table.pop("partial_rotary_factor", 1) != 1 or kind not in list(ROPE_FIELDS):
            raise ValueError(
                f"config.json: rotary scaling {kind!r} {table} is not supported; supported: "
                f"rope_type {', '.join(ROPE_FIELDS)} over the whole head"
            )
        if kind == "default":
            return None
        wanted = {"factor", *ROPE_FIELDS[kind]}
        if table.keys() != wanted or not all(_positive(value) for value in table.values()):
            raise ValueError(
                f"config.json: rotary scaling {kind!r} has {table}; it needs, all positive: "
                f"{', '.join(sorted(wanted))}"
            )
        if kind == "llama3" and not table["low_freq_factor"] < table["high_freq_factor"]:
            raise ValueError("config.json: low_freq_factor must be below high_freq_factor")
        return cls(kind, **table)


ROPE_FIELDS = {
    "default": (),
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}  # model_type -> name in architectures
# Where config.json says nothing, as transformers 5.23 has it: the window, the first blocks that have none.
MISTRAL_WINDOW = 4096
QWEN2_WINDOW, QWEN2_WHOLE = 4096, 28


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Llama 2 and 3, SmolLM2; Mistral (a window); Qwen2 and 2.5 (biases on q, k and v)."""

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
    model_type: str = "llama"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    max_window_layers: int = 0  # blocks before this one see everything
    pad_token_id: int | None = None

    MUST_BE: ClassVar = {"hidden_act": ("silu",), "partial_rotary_factor": (None, 1)}
    MAY_BE_ZERO: ClassVar = ("max_window_layers", "pad_token_id")

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "model_type", FAMILIES)
        check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; rotary positions need pairs")
        if self.attention_bias and self.model_type != "llama":
            raise ValueError(
                f"config.json: attention_bias with model_type {self.model_type!r} is not supported; "
                "supported: model_type 'llama'"
            )

    @property
    def family(self) -> str:
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    def window(self, block: int) -> int | None:
        """How many tokens a block sees, itself included, or None for all."""
        return self.sliding_window if block >= self.max_window_layers else None

    @classmethod
    def from_hf(cls, config: dict) -> "LlamaConfig":
        """From config.json, old (`rope_theta`, `rope_scaling`) or new form (`rope_parameters`)."""
        config = {**config, **_rope(config)}
        names = config.get("architectures") or [""]
        named = next((t for t, name in FAMILIES.items() if str(names[0]).startswith(name)), None)
        kind = config["model_type"] = config.get("model_type") or named or "llama"
        if kind in list(FAMILIES) and named not in (None, kind):
            raise ValueError(
                f"config.json: model_type is {kind!r} and architectures is {names}; they disagree"
            )
        if kind == "mistral":
            config.setdefault("sliding_window", MISTRAL_WINDOW)
        elif kind == "qwen2" and config.get("use_sliding_window"):
            config = {"sliding_window": QWEN2_WINDOW, "max_window_layers": QWEN2_WHOLE, **config}
        else:
            config |= {"sliding_window": None, "max_window_layers": 0}
        D, H = config.get("hidden_size"), config.get("num_attention_heads")
        if config.get("num_key_value_heads") is None:
            config["num_key_value_heads"] = H
        if config.get("head_dim") is None and isinstance(D, int) and isinstance(H, int) and H > 0:
            config["head_dim"] = D // H
        found = super().from_hf(config)
        types = config.get("layer_types")
        if types is not None and types != found.layer_types():
            raise ValueError(f"config.json: layer_types {types!r} is not supported with its other fields")
        return found

    def layer_types(self) -> list[str]:
        return [
            "sliding_attention" if self.window(i) else "full_attention" for i in range(self.num_hidden_layers)
        ]

    def to_hf(self) -> dict:
        values = super().to_hf()
        scaling = values.pop("rope_scaling") or {"rope_type": "default"}
        rope = {name: value for name, value in scaling.items() if value is not None}
        values["rope_parameters"] = {**rope, "rope_theta": self.rope_theta}
        if self.model_type != "qwen2":
            del values["max_window_layers"]
        if self.model_type == "llama":
            del values["sliding_window"]
        else:
            del values["attention_bias"], values["mlp_bias"]
        if self.model_type == "qwen2":
            values["use_sliding_window"] = self.sliding_window is not None
            values["layer_types"] = self.layer_types()
        return values


def _rope(config: dict) -> dict:
    """rope_theta and rope_scaling of either form of config.json."""
    tables = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError("config.json: rope_parameters and rope_scaling are tables")
    scalings = [s for s in map(RopeScaling.from_hf, tables) if s is not None]
    thetas = [t["rope_theta"] for t in (config, *tables) if t.get("rope_theta") is not None]
    if any(t != thetas[0] for t in thetas) or any(s != scalings[0] for s in scalings):
        raise ValueError(f"config.json: rope_theta, rope_parameters and rope_scaling disagree: {tables}")
    return {"rope_scaling": next(iter(scalings), None), "rope_theta": next(iter(thetas), 10000.0)}


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        D, q, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(D, q * self.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(D, kv * self.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(D, kv * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(q * self.head_dim, D, bias=config.attention_bias)

    def forward(self, x, rotary, mask, prefix, cache):
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H hd), (B, T, KV hd) twice
        if cache is not None and T == 1 and prefix is None:
            o = decode_attention(q, k, v, *cache.of(self.index), cache.length, *rotary, mask)
            return self.o_proj(o)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, hd)
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
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F_, bias=config.mlp_bias)
        self.up_proj = Linear(D, F_, bias=config.mlp_bias)
        self.down_proj = Linear(F_, D, bias=config.mlp_bias)

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


HEAD_NAMES = {
    "causal_lm": "lm_head",
    "sequence_classification": "score",
    "token_classification": "score",
    "question_answering": "qa_outputs",
    "none": "head_of_none",
}


class Llama(LanguageModel):
    """`LlamaForCausalLM` of config.json and its siblings: the decoder above under one of the heads."""

    heads: ClassVar = (
        "causal_lm",
        "sequence_classification",
        "token_classification",
        "question_answering",
        "none",
    )
    trunks: ClassVar = ("model", "transformer")
    sites: ClassVar = {
        "attn_out": ("self_attn.o_proj",),
        "ffn": ("mlp",),
        "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
        "ffn_out": ("mlp.down_proj",),
        "k": ("self_attn.k_proj",),
        "v": ("self_attn.v_proj",),
        "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
    }
    usual_targets: ClassVar = ("q_proj", "v_proj")
    ignored_keys: ClassVar = (r".*\.self_attn\.rotary_emb\.inv_freq",)  # recomputed from rope_theta
    head_keys: ClassVar = (r"lm_head\.weight", r"score\..*", r"qa_outputs\..*")

    def __init__(self, config: LlamaConfig, head: str = "causal_lm", labels: tuple[str, ...] = ()):
        super().__init__(config, head, labels)
        answers = head == "question_answering" and config.model_type != "mistral"
        self.trunk = "transformer" if answers else "model"  # transformers' names
        self.blocks_path = f"{self.trunk}.layers"
        self.add_module(self.trunk, Decoder(config))
        D = config.hidden_size
        self.head_modules = (HEAD_NAMES[head],)
        if head == "none":
            self.add_module(HEAD_NAMES[head], nn.Identity())
        else:
            outputs = {"causal_lm": config.vocab_size, "question_answering": 2}.get(head, len(labels))
            biased = head in ("token_classification", "question_answering")
            self.add_module(HEAD_NAMES[head], Linear(D, outputs, bias=biased))
        self.tie_weights()

    @property
    def decoder(self) -> Decoder:
        return getattr(self, self.trunk)

    embed = property(lambda self: self.decoder.embed_tokens)
    head = property(lambda self: getattr(self, HEAD_NAMES[self.head_kind]))

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

    def run_blocks(self, x, attention_mask, position_ids, prefix_kv, cache):
        c, T, past = self.config, x.shape[1], 0 if cache is None else cache.length
        if position_ids is None:
            position_ids = default_positions(attention_mask, T, past, x.device)
        rotary = rotary_tables(position_ids, self.frequencies(x.device), x.dtype)
        S = past + T if attention_mask is None else attention_mask.shape[1]
        masks = {w: attend(attention_mask, T, S, w, x.device) for w in {c.window(0), c.sliding_window}}
        for i, block in enumerate(self.decoder.layers):
            prefix = None if prefix_kv is None else prefix_kv[i]
            x = self.run_block(block, x, rotary, masks[c.window(i)], prefix, cache)
        if cache is not None:
            cache.advance(T if prefix_kv is None else T + prefix_kv[0][0].shape[2])
        return self.decoder.norm(x)

    def frequencies(self, device) -> torch.Tensor:
        """Of the rotary pairs of a head: (hd/2,)."""
        c = self.config
        w = rotary_frequencies(c.head_dim, c.rope_theta, device)
        return w if c.rope_scaling is None else c.rope_scaling(w)
