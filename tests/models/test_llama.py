"""The Llama model: shapes, padding, positions, cache, config.json."""

import pytest
import torch
from conftest import tiny_config, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from minift.models.gguf_llama import gguf_name, gguf_rows
from minift.models.interface import Dims, attend, dense_weight, positions, set_weight
from minift.models.layers import KVCache, Normalize, RMSNorm, rotary_frequencies, rotary_tables, rotate
from minift.models.llama import Llama, LlamaConfig
from minift.models.wrappers import base_layers


def test_rmsnorm_gradients():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: Normalize.apply(x, w, 1e-5), (x, w))
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    torch.testing.assert_close(Normalize.apply(x, w, 1e-5), exact, rtol=1e-13, atol=0)


def test_rmsnorm_in_bf16_is_the_fp32_result_rounded_once():
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    x = torch.randn(4, 64).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (norm(x) != wide.bfloat16()).float().mean() < 0.01  # fp32 sums in another order, rarely a last bit


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        turned = [
            rotate(x, *rotary_tables(torch.tensor([[p]]), rotary_frequencies(16, 10000.0), torch.float64))
            for x, p in ((q, i), (k, j))
        ]
        assert torch.allclose(turned[0].norm(), q.norm(), rtol=1e-6)
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(24, 20), rtol=1e-5, atol=1e-5)  # tables are made in fp32
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rotation_is_the_split_half_layout():
    x = torch.arange(8.0).view(1, 1, 1, 8)
    cos, sin = rotary_tables(torch.tensor([[1]]), rotary_frequencies(8, 10000.0), torch.float32)
    angle = 10000.0 ** (-torch.arange(4.0) / 4)
    want = torch.cat(
        (
            x[..., :4] * angle.cos() - x[..., 4:] * angle.sin(),
            x[..., 4:] * angle.cos() + x[..., :4] * angle.sin(),
        ),
        -1,
    )
    torch.testing.assert_close(rotate(x, cos, sin), want)


@given(st.integers(1, 6), st.integers(0, 5))
def test_left_padding_leaves_real_logits_as_they_are(length, pad):
    model = tiny_llama(torch.float64)
    ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(length))
    padded = torch.cat((torch.full((1, pad), 5), ids), 1)
    mask = torch.cat((torch.zeros(1, pad), torch.ones(1, length)), 1)
    got = model(padded, attention_mask=mask)[:, pad:]
    torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-10)


def test_right_padding_and_holes():
    model = tiny_llama(torch.float64)
    ids = torch.randint(97, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(
        model(ids, attention_mask=mask)[0, :4], model(ids[:1, :4])[0], rtol=0, atol=1e-10
    )
    assert attend(mask, 6, 6) is None  # no real token looks to its right
    assert attend(torch.cat((torch.ones(2, 3), mask), 1), 6, 9) is None  # nor behind a prefix
    hole = torch.tensor([[1, 0, 1, 1, 1, 1]])
    without = model(torch.cat((ids[:1, :1], ids[:1, 2:]), 1))
    torch.testing.assert_close(model(ids[:1], attention_mask=hole)[:, 2:], without[:, 1:], rtol=0, atol=1e-10)


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions(mask, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert positions(mask, 2).tolist() == [[0, 1], [2, 3]]


def test_a_padded_query_sees_itself_so_that_nothing_is_nan():
    logits = tiny_llama()(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.tensor([[0, 0, 0, 1]]))
    assert torch.isfinite(logits).all()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_reading_in_pieces_through_the_cache_gives_the_same_logits(pieces):
    model, T = tiny_llama(torch.float64), sum(pieces)
    ids = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(T))
    mask = torch.ones(2, T)
    mask[1, 0] = 0
    cache, got, at = model.new_cache(2, T), [], 0
    with torch.no_grad():
        for n in pieces:
            got.append(model(ids[:, at : at + n], attention_mask=mask[:, : at + n], cache=cache))
            at += n
        want = model(ids, attention_mask=mask)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-10)
    assert cache.length == T


def test_a_full_cache_and_a_wrong_mask_say_so():
    with pytest.raises(ValueError, match="holds 2 tokens and 3"):
        KVCache(1, 2, Dims(1, 8, 1, 4, 97, 64), torch.float32, "cpu").update(
            0, torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
        )
    with pytest.raises(ValueError, match=r"shape \(1, 3\).* must be \(1, 4\)"):
        tiny_llama()(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 3))


def test_embeddings_may_take_the_place_of_ids(model):
    ids = torch.randint(97, (2, 5))
    assert torch.equal(model(inputs_embeds=model.embed(ids)), model(ids))


def test_a_tied_head_is_one_parameter():
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    assert tied.head.weight is tied.embed.weight
    names = dict(tied.named_parameters())
    assert "lm_head.weight" not in names and "lm_head.weight" in dict(untied.named_parameters())


def test_what_methods_may_rely_on(model):
    assert len(model.blocks) == 2 and model.block_index("model.layers.1.mlp.up_proj") == 1
    assert model.block_index("lm_head") is None
    layers = base_layers(model)
    assert len(layers) == 2 * 7 + 1 and next(iter(layers)) == "model.layers.0.self_attn.q_proj"
    layer = layers["model.layers.0.mlp.down_proj"]
    set_weight(layer, torch.ones_like(dense_weight(layer)))
    assert (layer.weight == 1).all()
    assert dense_weight(model.embed) is model.embed.weight
    with pytest.raises(TypeError, match="RMSNorm has no dense weight"):
        dense_weight(model.model.norm)


HF = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def test_both_forms_of_rotary_settings():
    assert LlamaConfig.from_hf({**HF, "rope_theta": 5e5}).rope_theta == 5e5
    assert (
        LlamaConfig.from_hf({**HF, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rope_theta
        == 5e5
    )
    assert LlamaConfig.from_hf(HF).rope_theta == 10000.0
    config = LlamaConfig.from_hf({**HF, "rope_theta": 5e5})
    assert LlamaConfig.from_hf(config.to_hf()) == config


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"model_type": "llama", "architectures": ["Qwen2ForCausalLM"]}, "they disagree"),
        ({"attention_bias": True, "model_type": "qwen2"}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rotary scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "rotary scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rotary scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}, "rope_scaling": LLAMA3}, "disagree"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "disagree"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below"),
        ({"num_hidden_layers": 2000}, "at most 1024"),
        ({"vocab_size": 2**40}, "at most"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": 0}, "must be positive"),
        ({"head_dim": 7}, "odd"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_config_that_changes_the_forward_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        LlamaConfig.from_hf({**HF, **change})


def test_a_qwen_that_names_no_window_has_the_usual_one():
    config = LlamaConfig.from_hf({**HF, "model_type": "qwen2", "use_sliding_window": True})
    assert config.sliding_window == 4096 and config.max_window_layers == 28


def test_the_architecture_says_the_family_where_model_type_does_not():
    config = {key: value for key, value in HF.items() if key != "model_type"}
    found = LlamaConfig.from_hf({**config, "architectures": ["Qwen2ForCausalLM"]})
    assert found.model_type == "qwen2" and found.qkv_bias


def test_parameter_count_of_a_meta_build():
    c = tiny_config()
    with torch.device("meta"):
        model = Llama(c)
    D, F, V, q, kv = c.hidden_size, c.intermediate_size, c.vocab_size, 4 * 8, 2 * 8
    block = D * (q + 2 * kv) + q * D + 3 * D * F + 2 * D
    assert sum(p.numel() for p in model.parameters()) == 2 * V * D + 2 * block + D


def test_gguf_names_and_rows():
    assert gguf_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert gguf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert gguf_name("rope_freqs.weight") == "rope_freqs.weight"
    order = gguf_rows("model.layers.0.self_attn.k_proj.weight", tiny_config())
    assert order[:8].tolist() == [0, 2, 4, 6, 1, 3, 5, 7] and sorted(order.tolist()) == list(range(16))
    assert gguf_rows("model.layers.0.self_attn.v_proj.weight", tiny_config()) is None
