"""Folders of BERT, RoBERTa and DistilBERT: spellings of keys, new heads, config.json and what it may say."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bert import ALL
from tiny import SIZES, tiny

import minift
from minift.models import MODELS


def rewrite(folder, change):
    """Put changed tensors into a folder's model.safetensors."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def check_equal(a, b):
    for name, parameter in a.named_parameters():
        assert torch.equal(parameter, b.get_parameter(name)), name


def test_the_first_checkpoints_spelling_loads(tmp_path):
    """LayerNorm.gamma and beta, position_ids, a head for the next sentence, a pooler that nothing reads."""
    model = tiny("BertForMaskedLM")
    minift.save_model(model, tmp_path)

    def old(tensors):
        tensors = {
            k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
            for k, t in tensors.items()
        }
        tensors["cls.predictions.bias"] = tensors.pop("cls.predictions.decoder.bias")
        return {
            **tensors,
            "bert.embeddings.position_ids": torch.arange(64)[None],
            "bert.pooler.dense.weight": torch.zeros(32, 32),
            "bert.pooler.dense.bias": torch.zeros(32),
            "cls.seq_relationship.weight": torch.zeros(2, 32),
            "cls.seq_relationship.bias": torch.zeros(2),
        }

    rewrite(tmp_path, old)
    check_equal(model, minift.load_model(tmp_path))
    pooled = minift.load_model(tmp_path, head="sequence_classification", num_labels=2)
    assert pooled.new_modules == ("classifier",)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stored", ["alone", "in the layer", "both"])
@pytest.mark.parametrize("family, name", [("Bert", "cls.predictions"), ("Roberta", "lm_head")])
def test_the_last_bias_of_a_masked_lm_may_stand_alone(family, name, stored, tied, tmp_path):
    """Both: of tied models transformers reads the one that stands alone, of others the layer's."""
    model = tiny(f"{family}ForMaskedLM", tie_word_embeddings=tied)
    minift.save_model(model, tmp_path)

    def stand_alone(tensors):
        bias = tensors.pop(f"{name}.decoder.bias")
        alone, inside = (bias, bias + 1) if tied else (bias + 1, bias)
        found = {f"{name}.bias": alone, f"{name}.decoder.bias": inside}
        wanted = {"alone": f"{name}.bias", "in the layer": f"{name}.decoder.bias"}.get(stored)
        return {**tensors, **(found if wanted is None else {wanted: bias})}

    rewrite(tmp_path, stand_alone)
    check_equal(model, minift.load_model(tmp_path))


# what a checkpoint lacks: head of the checkpoint, head asked for -> the new modules
NEW = {
    ("BertForMaskedLM", "sequence_classification"): ("bert.pooler", "classifier"),
    ("BertModel", "sequence_classification"): ("classifier",),
    ("BertModel", "masked_lm"): ("cls",),
    ("BertForSequenceClassification", "question_answering"): ("qa_outputs",),
    ("RobertaForMaskedLM", "sequence_classification"): ("classifier",),
    ("RobertaModel", "sequence_classification"): ("classifier",),
    ("RobertaModel", "masked_lm"): ("lm_head",),
    ("RobertaForMaskedLM", "none"): ("roberta.pooler",),
    ("DistilBertForMaskedLM", "sequence_classification"): ("pre_classifier", "classifier"),
    ("DistilBertModel", "masked_lm"): ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ("DistilBertForQuestionAnswering", "none"): (),
}


@pytest.mark.parametrize("stored, head", NEW, ids=str)
def test_what_a_checkpoint_lacks_of_another_head_is_new_and_trains(stored, head, tmp_path):
    minift.save_model(tiny(stored), tmp_path)
    model = minift.load_model(
        tmp_path, head=head, num_labels=2 if head == "sequence_classification" else None
    )
    assert model.new_modules == NEW[stored, head]
    wanted = {
        name for name, _ in model.named_parameters() if model.is_new(name)
    }  # a tied one has another name
    plan = minift.apply(model, minift.LoRA())
    assert {site.path for site in plan.head} == wanted and bool(wanted) == bool(model.new_modules)
    assert {site.path.rpartition(".")[2] for site in plan.sites} == set(model.usual_targets)


HF = {"architectures": ["BertModel"], "model_type": "bert", **SIZES["Bert"]}
DISTIL = {"architectures": ["DistilBertModel"], "model_type": "distilbert", **SIZES["DistilBert"]}
ROBERTA = {**HF, "architectures": ["RobertaModel"], "model_type": "roberta"}
UNSUPPORTED = [
    (HF, {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' changes"),
    (HF, {"is_decoder": True}, "is_decoder = True changes the forward"),
    (HF, {"add_cross_attention": True}, "add_cross_attention = True changes the forward"),
    (HF, {"model_type": "nomic_bert"}, "model_type = 'nomic_bert' changes the forward"),
    (HF, {"auto_map": {"AutoModel": "modeling.Bert"}}, "auto_map = .* changes the forward"),
    (HF, {"hidden_act": "swish-1"}, "hidden_act is 'swish-1'; supported: 'gelu'"),
    (HF, {"hidden_act": ["gelu"]}, "hidden_act is .*gelu.*, expected str"),
    (HF, {"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5"),
    (HF, {"type_vocab_size": 0}, "type_vocab_size is 0; it must be positive"),
    (HF, {"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; it must be positive"),
    (HF, {"hidden_size": None}, "config.json lacks hidden_size"),
    (ROBERTA, {"hidden_act": "relu"}, "hidden_act = 'relu' changes the forward"),
    (
        ROBERTA,
        {"max_position_embeddings": 2},
        "max_position_embeddings 2 leaves no position behind that of padding",
    ),
    (DISTIL, {"activation": "gelu_10"}, "activation is 'gelu_10'; supported: 'gelu'"),
    (DISTIL, {"n_heads": 5}, "dim 32 is no multiple of n_heads 5"),
    (DISTIL, {"model_type": "bert"}, "model_type = 'bert' changes the forward"),
]


@pytest.mark.parametrize("config, change, message", UNSUPPORTED, ids=[str(c) for _, c, _ in UNSUPPORTED])
def test_a_field_that_is_not_supported_is_refused_by_name(config, change, message, tmp_path):
    minift.save_model(tiny(config["architectures"][0]), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        minift.load_model(tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_config_json_comes_back(name):
    model = tiny(name)
    family, config_class, head = MODELS[name]
    written = model.to_hf()
    assert written["architectures"] == [name] and family is type(model) and head == model.head_kind
    assert config_class.from_hf(written) == model.config
