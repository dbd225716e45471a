"""GPT-2 beside transformers: outputs and gradients on random configs, every head, checkpoints both ways."""

import pytest
import torch
from families import (
    check_folders,
    check_new_head,
    check_old_spelling,
    compare_everywhere,
    compare_with_cache,
    ours_of,
    random_peer,
    theirs_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

import minift

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
ENDS = {"bos_token_id": None, "eos_token_id": None}
HEADS = {
    "GPT2LMHeadModel": {},
    "GPT2Model": {},
    "GPT2ForSequenceClassification": {"num_labels": 3},
    "GPT2ForTokenClassification": {"num_labels": 2},
    "GPT2ForQuestionAnswering": {},
}
configs = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([31, 64]),
        "n_positions": st.sampled_from([9, 40]),
        "n_embd": st.sampled_from([12, 24]),
        "n_layer": st.integers(1, 3),
        "n_head": st.sampled_from([1, 2, 3, 6]),
        "n_inner": st.sampled_from([None, 20]),
        "layer_norm_epsilon": st.sampled_from([1e-5, 1e-3]),
        "tie_word_embeddings": st.booleans(),
        "activation_function": st.sampled_from(["gelu_new", "gelu_pytorch_tanh"]),
    }
)


@settings(max_examples=6)
@given(configs, st.integers(0, 99))
def test_outputs_and_gradients_agree_on_random_configs(tmp_path_factory, config, seed):
    peer = random_peer("GPT2LMHeadModel", seed, **config, **ENDS)
    ours = ours_of(peer, tmp_path_factory.mktemp("m"))
    compare_everywhere(ours, peer, positions=True)
    compare_with_cache(ours, peer)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_agrees(tmp_path, name):
    peer = random_peer(name, **SIZES, **ENDS, **HEADS[name])
    ours = ours_of(peer, tmp_path)
    compare_everywhere(ours, peer, positions=True)
    if ours.head_kind != "sequence_classification":  # which reads the end of a whole text
        compare_with_cache(ours, peer)


def test_regression_has_one_output(tmp_path):
    peer = random_peer("GPT2ForSequenceClassification", **SIZES, **ENDS, num_labels=1)
    ours = ours_of(peer, tmp_path)
    assert ours.labels == ("LABEL_0",)
    compare_everywhere(ours, peer, positions=True)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_folders_go_both_ways_to_the_bit(tmp_path, name, tied):
    peer = random_peer(name, **SIZES, **HEADS[name], tie_word_embeddings=tied)
    check_folders(peer, tmp_path)
    check_old_spelling(peer, tmp_path / "old")


@pytest.mark.parametrize(
    "head, options",
    [
        ("sequence_classification", {"num_labels": 3}),
        ("token_classification", {"num_labels": 2}),
        ("question_answering", {}),
        ("regression", {}),
    ],
)
def test_a_new_head_stands_on_a_language_model(tmp_path, head, options):
    peer = random_peer("GPT2LMHeadModel", **SIZES, **ENDS)
    check_new_head(peer, tmp_path, head, positions=True, **options)


def test_greedy_generation_agrees_in_a_padded_batch(tmp_path):
    ours = tiny("GPT2LMHeadModel")
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    out = theirs_of(ours, tmp_path).generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert minift.generate(ours, prompts, 20) == out[:, 5:].tolist()
