"""Architectures by the name that config.json gives them: (family, its config, head)."""

from minift.models.bert import Bert, BertConfig
from minift.models.distilbert import DistilBert, DistilBertConfig
from minift.models.gpt2 import ARCHITECTURES, GPT2, GPT2Config
from minift.models.heads import HEADS
from minift.models.llama import FAMILIES, Llama, LlamaConfig
from minift.models.roberta import Roberta, RobertaConfig
from minift.models.t5 import ENCODER_MODEL, T5, T5Config

MODELS = {
    **{name + HEADS[head]: (Llama, LlamaConfig, head) for name in FAMILIES.values() for head in Llama.heads},
    **{name: (GPT2, GPT2Config, head) for head, name in ARCHITECTURES.items()},
    **{
        config.family + HEADS[head]: (family, config, head)
        for family, config in ((Bert, BertConfig), (Roberta, RobertaConfig), (DistilBert, DistilBertConfig))
        for head in family.heads
    },
    "BertForPreTraining": (Bert, BertConfig, "masked_lm"),
    **{T5Config.family + HEADS[head]: (T5, T5Config, head) for head in T5.heads},
    ENCODER_MODEL: (T5, T5Config, "none"),
    "T5WithLMHeadModel": (T5, T5Config, "seq2seq_lm"),  # its old name
}
