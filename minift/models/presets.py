"""Shapes of published models by name: config.json's own fields, no weights.

Sources: the config.json of each model on the Hugging Face hub; GPT-3: Brown et al. 2020, arXiv:2005.14165,
table 2.1. What changes no shape (rotary base, windows, dropout) is left out.
BERT stands here as its checkpoint's `bert`, pooler included, without a head.
"""

import difflib

from minift.models import MODELS
from minift.models.gpt2 import GPT2Config
from minift.models.interface import LanguageModel
from minift.models.skeleton import GPT3, shapes_only

GPT = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")
BERT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
T5 = ("d_model", "num_layers", "num_heads", "d_kv", "d_ff", "feed_forward_proj", "tie_word_embeddings")
LLAMA = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)
SHARED = {  # architecture -> what all sizes have in common
    "BertModel": {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2},
    "T5ForConditionalGeneration": {
        "vocab_size": 32128,
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
    },
}
SIZES = {  # (architecture, fields) -> name -> their values
    ("GPT2LMHeadModel", GPT): {
        "gpt2": (768, 12, 12, 1024, 50257),
        "gpt2-medium": (1024, 24, 16, 1024, 50257),
        "gpt2-large": (1280, 36, 20, 1024, 50257),
        "gpt2-xl": (1600, 48, 25, 1024, 50257),
    },
    ("GPT3", GPT): {"gpt3-175b": (12288, 96, 96, 2048, 50257)},
    ("BertModel", BERT): {"bert-base": (768, 12, 12, 3072), "bert-large": (1024, 24, 16, 4096)},
    ("T5ForConditionalGeneration", T5): {
        "t5-small": (512, 6, 8, 64, 2048, "relu", True),
        "t5-base": (768, 12, 12, 64, 3072, "relu", True),
        "t5-large": (1024, 24, 16, 64, 4096, "relu", True),
        "t5-3b": (1024, 24, 32, 128, 16384, "relu", True),
        "t5-11b": (1024, 24, 128, 128, 65536, "relu", True),
        "flan-t5-small": (512, 8, 6, 64, 1024, "gated-gelu", False),
        "flan-t5-base": (768, 12, 12, 64, 2048, "gated-gelu", False),
        "flan-t5-large": (1024, 24, 16, 64, 2816, "gated-gelu", False),
        "flan-t5-xl": (2048, 24, 32, 64, 5120, "gated-gelu", False),
        "flan-t5-xxl": (4096, 24, 64, 64, 10240, "gated-gelu", False),
    },
    ("LlamaForCausalLM", LLAMA): {
        "llama-2-7b": (4096, 32, 32, 32, 11008, 4096, 32000, False),
        "llama-2-13b": (5120, 40, 40, 40, 13824, 4096, 32000, False),
        "llama-2-70b": (8192, 80, 64, 8, 28672, 4096, 32000, False),
        "llama-3-8b": (4096, 32, 32, 8, 14336, 8192, 128256, False),
        "llama-3-70b": (8192, 80, 64, 8, 28672, 8192, 128256, False),
        "smollm2-135m": (576, 30, 9, 3, 1536, 8192, 49152, True),
        "smollm2-360m": (960, 32, 15, 5, 2560, 8192, 49152, True),
        "smollm2-1.7b": (2048, 24, 32, 32, 8192, 8192, 49152, True),
    },
    ("MistralForCausalLM", LLAMA): {"mistral-7b": (4096, 32, 32, 8, 14336, 32768, 32000, False)},
    ("Qwen2ForCausalLM", LLAMA): {
        "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 32768, 151936, True),
        "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 131072, 151936, True),
        "qwen2.5-3b": (2048, 36, 16, 2, 11008, 32768, 151936, True),
        "qwen2.5-7b": (3584, 28, 28, 4, 18944, 131072, 152064, False),
    },
}
PRESETS = {
    name: {"architectures": [kind], **SHARED.get(kind, {}), **dict(zip(fields, values, strict=True))}
    for (kind, fields), sizes in SIZES.items()
    for name, values in sizes.items()
}


def build_preset(name: str) -> LanguageModel:
    """The model on the meta device."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; nearest: {', '.join(nearest_presets(name))}")
    config = PRESETS[name]
    kind = config["architectures"][0]
    family, config_class, head = (GPT3, GPT2Config, "causal_lm") if kind == "GPT3" else MODELS[kind]
    with shapes_only():
        model = family(config_class.from_hf(config), head)
    model.source = name
    return model


def nearest_presets(name: str) -> list[str]:
    """Names that look like one that is none; all of them where none does."""
    return difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.5) or list(PRESETS)
