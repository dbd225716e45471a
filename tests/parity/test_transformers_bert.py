"""BERT, RoBERTa and DistilBERT beside transformers: outputs, gradients, folders both ways."""

import pytest
import torch
from families import (
    GRID,
    TOLERANCE,
    check_folders,
    check_new_head,
    check_old_spelling,
    compare,
    largest,
    ours_of,
    output_of,
    positions_of,
    random_peer,
    texts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift.models import MODELS

pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

BERT = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}
DISTIL = {
    "vocab_size": 31,
    "dim": 12,
    "hidden_dim": 20,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "Bert": BERT,
    "Roberta": {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "DistilBert": DISTIL,
}
HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "Model",
)
ALL = [family + head for family in FAMILIES for head in HEADS]


def fields_of(name):
    sizes = next(sizes for family, sizes in FAMILIES.items() if name.startswith(family))
    return {**sizes, **({"num_labels": 3} if "Classification" in name else {})}


def peer_of(name, seed=0, **fields):
    return random_peer(name, seed, **{**fields_of(name), **fields})


def forget_second_bias(peer):
    """A masked LM has two names for its last bias, or, untied, a second bias that it does not read."""
    for module in peer.modules():
        if hasattr(module, "decoder"):
            module._parameters.pop("bias", None)


def compare_all(ours, peer, name, grid=GRID):
    """Padding on the left of a classifier has its own test: theirs reads the first token, padding or not."""
    forget_second_bias(peer)
    shift = peer.config.pad_token_id + 1 if name.startswith("Roberta") else 0
    for seed, (B, T, padding) in enumerate(grid):
        if padding == "left" and "SequenceClassification" in name:
            continue
        ids, mask = texts(31, B, T, padding, seed)
        types = torch.randint(2, (B, T), generator=torch.Generator().manual_seed(seed))
        more = {"token_type_ids": types} if name.startswith("Bert") else {}
        compare(ours, peer, ids, mask, theirs={"position_ids": positions_of(mask) + shift}, **more)


@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients_agree(name, tmp_path):
    peer = peer_of(name)
    compare_all(ours_of(peer, tmp_path), peer, name)


@settings(max_examples=12)
@given(
    st.sampled_from(ALL),
    st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([7, 24]), st.integers(1, 3)),
    st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_configs_agree(tmp_path_factory, name, sizes, activation, tied, seed):
    if name.startswith("DistilBert"):
        names = ("n_heads", "hidden_dim", "n_layers")
        fields = {"activation": activation, **dict(zip(names, sizes, strict=True))}
    else:
        names = ("num_attention_heads", "intermediate_size", "num_hidden_layers")
        fields = {"hidden_act": "gelu" if name.startswith("Roberta") else activation}
        fields |= dict(zip(names, sizes, strict=True))
    peer = peer_of(name, seed, tie_word_embeddings=tied, **fields)
    ours = ours_of(peer, tmp_path_factory.mktemp("m"))
    compare_all(ours, peer, name, grid=[(3, 5, "left"), (2, 8, "right")])


@pytest.mark.parametrize("name", ALL)
def test_folders_go_both_ways(name, tmp_path):
    check_folders(peer_of(name), tmp_path, shard="2KB")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_masked_lm_goes_both_ways_without_the_bias_that_nothing_reads(family, tmp_path):
    peer = peer_of(f"{family}ForMaskedLM", tie_word_embeddings=False)
    ours = ours_of(peer, tmp_path / "theirs")
    assert not ours.tied
    forget_second_bias(peer)
    minift.save_model(ours, tmp_path / "ours")
    back = type(peer).from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in peer.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_reads_the_first_real_token_wherever_the_padding_is(family, tmp_path):
    """Transformers' answer for each text alone, without padding."""
    peer = peer_of(f"{family}ForSequenceClassification")
    ours = ours_of(peer, tmp_path)
    ids, mask = texts(31, 3, 9, "left")
    got = ours(ids, attention_mask=mask)
    want = torch.cat([output_of(peer(row[real.bool()][None])) for row, real in zip(ids, mask, strict=True)])
    assert (got - want).abs().max() <= TOLERANCE * largest([want])


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_pooler_of_a_model_without_a_head_agrees(family, tmp_path):
    peer = peer_of(f"{family}Model")
    ours = ours_of(peer, tmp_path)
    ids, mask = texts(31, 3, 9, "right")
    got = ours.pool(ours(ids, attention_mask=mask), ids, mask)
    want = peer(ids, attention_mask=mask).pooler_output
    assert (got - want).abs().max() <= TOLERANCE * largest([want])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_given_count_from_the_start_of_the_text(family, tmp_path):
    peer = peer_of(f"{family}ForMaskedLM")
    ours = ours_of(peer, tmp_path)
    ids, positions = torch.randint(1, 31, (2, 5)), torch.tensor([[3, 0, 1, 7, 2], [4, 4, 0, 9, 1]])
    shift = 1 if family == "Roberta" else 0
    want = peer(ids, position_ids=positions + shift).logits
    assert (ours(ids, position_ids=positions) - want).abs().max() <= TOLERANCE * largest([want])


def test_a_model_for_pre_training_is_a_masked_lm_or_a_pooled_classifier(tmp_path):
    peer = peer_of("BertForPreTraining")
    ours, ids = ours_of(peer, tmp_path), torch.randint(1, 31, (2, 5))
    want = peer(ids)
    assert ours.head_kind == "masked_lm" and ours.architecture == "BertForMaskedLM"
    assert (ours(ids) - want.prediction_logits).abs().max() <= TOLERANCE * largest([want.prediction_logits])
    ours = minift.load_model(tmp_path, head="sequence_classification", num_labels=2)
    assert ours.new_modules == ("classifier",)
    with torch.no_grad():
        ours.classifier.weight.copy_(peer.cls.seq_relationship.weight)
        ours.classifier.bias.copy_(peer.cls.seq_relationship.bias)
    want = want.seq_relationship_logits
    assert (ours(ids) - want).abs().max() <= TOLERANCE * largest([want])


def test_every_architecture_of_these_families_is_compared():
    ours = {name for name in MODELS if name.startswith(tuple(FAMILIES))}
    assert ours == {*ALL, "BertForPreTraining"}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_config_json_say_one_model(family, tmp_path):
    check_old_spelling(peer_of(f"{family}ForSequenceClassification"), tmp_path)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
@pytest.mark.parametrize("stored", ["ForMaskedLM", "Model", "ForSequenceClassification"])
def test_a_new_head_on_another_checkpoint_agrees(family, stored, tmp_path):
    check_new_head(peer_of(f"{family}{stored}"), tmp_path, "question_answering", positions=True)
