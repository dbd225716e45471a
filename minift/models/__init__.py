"""Architectures by the name that config.json gives them: (family, its config, head)."""

from minift.models.heads import HEADS
from minift.models.llama import FAMILIES, Llama, LlamaConfig

MODELS = {
    **{name + HEADS[head]: (Llama, LlamaConfig, head) for name in FAMILIES.values() for head in Llama.heads}
}
