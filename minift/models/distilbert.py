"""DistilBERT: BERT without token types, under names of its own.

Source: Sanh et al. 2019, arXiv:1910.01108, section 3. Module names are those of Hugging Face checkpoints.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from minift.models.bert import ACTIVATIONS, Bert
from minift.models.config import ModelConfig, check_choice, check_multiple


@dataclass(frozen=True)
class DistilBertConfig(ModelConfig):
    family: ClassVar[str] = "DistilBert"
    BLOCKS: ClassVar = ("n_layers",)
    MUST_BE: ClassVar[dict] = {"model_type": ("distilbert",), "auto_map": (None,)}

    vocab_size: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    max_position_embeddings: int
    activation: str = "gelu"
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    hidden_size = property(lambda self: self.dim)  # what BERT calls them
    intermediate_size = property(lambda self: self.hidden_dim)
    num_hidden_layers = property(lambda self: self.n_layers)
    num_attention_heads = property(lambda self: self.n_heads)
    hidden_act = property(lambda self: self.activation)
    type_vocab_size, layer_norm_eps = 0, 1e-12

    def __post_init__(self):
        super().__post_init__()
        check_multiple(self, "dim", "n_heads")
        check_choice(self, "activation", ACTIVATIONS)


class DistilBert(Bert):
    """`DistilBertModel` of config.json, or one of its siblings with a head."""

    block_paths: ClassVar = {
        **{name: f"attention.{name}_lin" for name in "qkv"},
        "o": "attention.out_lin",
        "norm_1": "sa_layer_norm",
        "ffn_in": "ffn.lin1",
        "ffn_out": "ffn.lin2",
        "norm_2": "output_layer_norm",
    }
    last_layers: ClassVar = {**Bert.last_layers, "masked_lm": "vocab_projector"}
    poolers: ClassVar = {"sequence_classification": "pre_classifier"}
    transform: ClassVar = ("vocab_transform", "vocab_layer_norm")
    squash: ClassVar = staticmethod(F.relu)
    sites: ClassVar = {
        "attn_out": ("out_lin",),
        "ffn": (),
        "ffn_in": ("lin1",),
        "ffn_out": ("lin2",),
        "k": ("k_lin",),
        "v": ("v_lin",),
        "norms": ("LayerNorm", "sa_layer_norm", "output_layer_norm"),
    }
    usual_targets: ClassVar = ("q_lin", "v_lin")
    ignored_keys: ClassVar = (r"(distilbert\.)?embeddings\.position_ids",)
    head_keys: ClassVar = (r"(vocab_\w+|pre_classifier|classifier|qa_outputs)\..*",)
    renamed_keys: ClassVar = ()
    trunk, blocks_path = "distilbert", "distilbert.transformer.layer"

    def run_blocks(self, x, attention_mask, position_ids, prefix_kv, cache):
        """Without token_type_ids."""
        return super().run_blocks(x, attention_mask, position_ids, prefix_kv, cache)
