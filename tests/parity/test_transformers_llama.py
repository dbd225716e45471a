"""Llama beside transformers: logits and gradients on random configs, checkpoints both ways."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import minift

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

configs = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([12, 24]),
        "intermediate_size": st.sampled_from([20, 40]),
        "num_hidden_layers": st.integers(1, 3),
        "vocab_size": st.sampled_from([31, 64]),
        "num_attention_heads": st.just(6),
        "num_key_value_heads": st.sampled_from([1, 2, 3, 6]),
        "head_dim": st.sampled_from([4, 8]),
        "rope_theta": st.sampled_from([10000.0, 100000.0]),
        "tie_word_embeddings": st.booleans(),
    }
)


def theirs(ours, folder):
    """The model as transformers loads what we saved."""
    minift.save_model(ours, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def close(a, b, scale=1.0):
    return (a - b).abs().max() <= 1e-5 * scale


@settings(max_examples=25)
@given(configs, st.integers(1, 3), st.integers(1, 11), st.integers(0, 4), st.integers(0, 99))
def test_logits_and_gradients_agree(tmp_path_factory, config, B, T, pad, seed):
    ours = tiny_llama(seed=seed, **config)
    peer = theirs(ours, tmp_path_factory.mktemp("m"))
    ids = torch.randint(config["vocab_size"], (B, T + pad))
    mask = torch.ones(B, T + pad, dtype=torch.long)
    mask[0, :pad] = 0  # the first row is padded on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    a = ours(ids, attention_mask=mask)
    b = peer(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert close(a[real], b[real], 1 + b[real].abs().max())
    for logits in (a, b):
        torch.nn.functional.cross_entropy(logits[real], ids[real]).backward()
    grads = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, grads[name].grad, 1 + grads[name].grad.abs().max()), name


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_written_by_transformers_load(tmp_path, tied):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (2, 9))
    for folder, options in (("one", {}), ("sharded", {"max_shard_size": "20KB"})):
        peer.save_pretrained(tmp_path / folder, **options)
        ours = minift.load_model(tmp_path / folder)
        assert ours.config.rope_theta == 5e4 and ours.config.tie_word_embeddings == tied
        assert close(ours(ids), peer(ids).logits)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1


def test_greedy_generation_agrees_in_a_padded_batch(tmp_path):
    ours = tiny_llama(max_position_embeddings=64)
    peer = theirs(ours, tmp_path)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    out = peer.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert minift.generate(ours, prompts, 20) == out[:, 5:].tolist()
