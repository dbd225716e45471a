"""A tiny model of every architecture, with weights large enough that every part of the forward matters."""

import torch

from minift.models import MODELS
from minift.models.heads import CLASSIFIERS

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2.0**-20,
}
BERT = {name: LLAMA[name] for name in (*list(LLAMA)[:5], "max_position_embeddings")}
T5 = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
SIZES = {  # the beginning of an architecture's name -> fields of its config
    "Llama": LLAMA,
    "Mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
    "Qwen2": {**LLAMA, "model_type": "qwen2"},
    "GPT2": {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Bert": BERT,
    "Roberta": BERT,
    "DistilBert": {
        "vocab_size": 97,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
    "T5EncoderModel": {**T5, "is_encoder_decoder": False},
    "T5": T5,
}
LABELS = ("no", "yes", "perhaps")


def tiny(architecture: str, seed=0, dtype=torch.float32, **changes):
    """The model that config.json calls so; `changes` are fields of its config."""
    family, config_class, head = MODELS[architecture]
    sizes = next(sizes for start, sizes in SIZES.items() if architecture.startswith(start))
    model = family(config_class(**{**sizes, **changes}), head, LABELS if head in CLASSIFIERS else ())
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=random)
            p.copy_(1 + 0.1 * drawn if p.dim() == 1 and name.endswith("weight") else 0.2 * drawn)
    return model.to(dtype).eval()
