"""Architectures by the name that config.json gives them."""

from minift.models.llama import Llama, LlamaConfig

MODELS = {"LlamaForCausalLM": (Llama, LlamaConfig)}
