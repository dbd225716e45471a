"""The Llama architecture in GGUF files: metadata keys, tensor names, row order.

Source: gguf-py's MODEL_ARCH.LLAMA.
"""

import torch

from minift.models.llama import LlamaConfig

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
