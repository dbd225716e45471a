"""The Llama line beside transformers: outputs and gradients of every variant and head, folders both ways."""

import pytest
import torch
from families import (
    change_config,
    check_folders,
    check_new_head,
    check_old_spelling,
    compare_everywhere,
    compare_with_cache,
    old_spelling,
    ours_of,
    random_peer,
    theirs_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

import minift

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,  # a wave of each kind: turning often, rarely, and in between
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {  # name -> (architecture without its head, fields)
    "llama": ("Llama", {}),
    "attention bias": ("Llama", {"attention_bias": True}),
    "mlp bias": ("Llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    "wide heads": ("Llama", {"head_dim": 10}),
    "rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "rope llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, a window": ("Mistral", {"sliding_window": 3}),
    "qwen2": ("Qwen2", {"sliding_window": 2, "tie_word_embeddings": True}),  # use_sliding_window is false
    "qwen2, a window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
}
HEADS = {
    "ForCausalLM": {},
    "Model": {},
    "ForSequenceClassification": {"num_labels": 3},
    "ForTokenClassification": {"num_labels": 2},
    "ForQuestionAnswering": {},
}
configs = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([12, 24]),
        "intermediate_size": st.sampled_from([20, 40]),
        "num_hidden_layers": st.integers(1, 3),
        "vocab_size": st.sampled_from([31, 64]),
        "num_attention_heads": st.just(6),
        "num_key_value_heads": st.sampled_from([1, 2, 3, 6]),
        "head_dim": st.sampled_from([4, 8]),
        "rope_parameters": st.sampled_from(
            [{"rope_type": "default", "rope_theta": theta} for theta in (10000.0, 100000.0)]
        ),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-3]),
        "tie_word_embeddings": st.booleans(),
    }
)


QWEN2 = ("head_dim", "max_window_layers")  # D / H, which is the default; layer_types says what the other does


def variant(name, head="ForCausalLM", **changes):
    kind, fields = VARIANTS[name]
    return random_peer(kind + head, **{**SIZES, **fields, **HEADS[head], **changes})


@settings(max_examples=6)
@given(configs, st.integers(0, 99))
def test_outputs_and_gradients_agree_on_random_configs(tmp_path_factory, config, seed):
    peer = random_peer("LlamaForCausalLM", seed, **config)
    compare_everywhere(ours_of(peer, tmp_path_factory.mktemp("m")), peer, positions=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_agrees_with_the_cache_and_without(tmp_path, name):
    peer = variant(name)
    ours = ours_of(peer, tmp_path)
    compare_everywhere(ours, peer, positions=True)
    compare_with_cache(ours, peer)
    compare_with_cache(ours, peer, (1,) * 9, "none")


@pytest.mark.parametrize("kind", ["llama", "mistral, a window", "qwen2, a window"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_agrees(tmp_path, kind, head):
    peer = variant(kind, head)
    ours = ours_of(peer, tmp_path)
    compare_everywhere(ours, peer, positions=True)
    if ours.head_kind != "sequence_classification":  # which reads the end of a whole text
        compare_with_cache(ours, peer)


def test_regression_has_one_output(tmp_path):
    peer = variant("llama", "ForSequenceClassification", num_labels=1)
    compare_everywhere(ours_of(peer, tmp_path), peer, positions=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_folders_go_both_ways_to_the_bit_in_both_spellings(tmp_path, name):
    peer = variant(name)
    check_folders(peer, tmp_path, unimportant=QWEN2)
    check_old_spelling(peer, tmp_path / "old")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("head", HEADS)
def test_folders_of_every_head_go_both_ways(tmp_path, kind, head):
    check_folders(variant(kind, head), tmp_path, unimportant=QWEN2)


def test_the_oldest_spelling_of_rotary_scaling_says_type(tmp_path):
    new = ours_of(variant("rope linear"), tmp_path)
    change_config(tmp_path, lambda c: {**old_spelling(c), "rope_scaling": {"type": "linear", "factor": 3.0}})
    assert minift.load_model(tmp_path).config == new.config


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize(
    "head, options",
    [
        ("sequence_classification", {"num_labels": 3}),
        ("token_classification", {"num_labels": 2}),
        ("question_answering", {}),
    ],
)
def test_a_new_head_stands_on_a_language_model(tmp_path, kind, head, options):
    check_new_head(variant(kind), tmp_path, head, positions=True, **options)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_greedy_generation_agrees_in_a_padded_batch(tmp_path, name):
    ours = tiny(name)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    out = theirs_of(ours, tmp_path).generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert minift.generate(ours, prompts, 20) == out[:, 5:].tolist()
