"""RoBERTa: BERT with one token type, positions that start behind that of padding, and other names of heads.

Source: Liu et al. 2019, arXiv:1907.11692, section 3. Module names are those of Hugging Face checkpoints.
"""

from dataclasses import dataclass
from typing import ClassVar

from minift.models.bert import Bert, BertConfig


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    family: ClassVar[str] = "Roberta"
    MUST_BE: ClassVar[dict] = {  # the masked LM's own activation is gelu whatever hidden_act says
        **BertConfig.MUST_BE,
        "model_type": ("roberta",),
        "hidden_act": ("gelu",),
    }

    pad_token_id: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.max_position_embeddings < self.pad_token_id + 2:
            raise ValueError(
                f"config.json: max_position_embeddings {self.max_position_embeddings} leaves no position "
                f"behind that of padding, pad_token_id {self.pad_token_id}"
            )


class Roberta(Bert):
    """`RobertaModel` of config.json, or one of its siblings with a head."""

    last_layers: ClassVar = {
        **Bert.last_layers,
        "masked_lm": "lm_head.decoder",
        "sequence_classification": "classifier.out_proj",
    }
    poolers: ClassVar = {"sequence_classification": "classifier.dense", "none": "roberta.pooler.dense"}
    transform: ClassVar = ("lm_head.dense", "lm_head.layer_norm")
    ignored_keys: ClassVar = (r"(roberta\.)?embeddings\.position_ids",)
    head_keys: ClassVar = (r"(lm_head|classifier|qa_outputs)\..*",)
    renamed_keys: ClassVar = ()
    trunk, blocks_path = "roberta", "roberta.encoder.layer"

    @property
    def first_position(self) -> int:
        return self.config.pad_token_id + 1
