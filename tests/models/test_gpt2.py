"""The GPT-2 model beside its formulas: shapes, positions, padding, cache, heads, checkpoints, config.json."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from safetensors.torch import load_file, save_file
from tiny import tiny

import minift
from minift.models import MODELS, gpt2
from minift.models.gpt2 import GPT2, GPT2Config
from minift.models.interface import Dims

LM = "GPT2LMHeadModel"
HF = {"model_type": "gpt2", "vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
# fp64: 2 blocks of 4 products with sums of at most 128 terms, rounded to 2^-53: 8 * 128 * 2^-53 = 1.1e-13 of
# numbers up to about 30 to first order; the factor left is for what norms and softmax amplify.
FP64 = 1e-10


def plain(model, ids: list[int]) -> torch.Tensor:
    """Hidden states (T, D) of one text by the formulas, head by head, token by token."""
    w, c = dict(model.transformer.named_parameters()), model.config
    hd, T = c.n_embd // c.n_head, len(ids)

    def norm(x, name):
        middle = x - x.mean(-1, keepdim=True)
        rstd = (middle.square().mean(-1, keepdim=True) + c.layer_norm_epsilon).rsqrt()
        return middle * rstd * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = torch.stack([w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(ids)])
    for i in range(c.n_layer):
        qkv, out = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), torch.zeros_like(x)
        for h in range(c.n_head):
            q, k, v = (qkv[:, n * c.n_embd + h * hd :][:, :hd] for n in range(3))
            for t in range(T):
                share = (k[: t + 1] @ q[t] / math.sqrt(hd)).softmax(0)  # (t + 1,)
                out[t, h * hd : (h + 1) * hd] = share @ v[: t + 1]
        x = x + linear(out, f"h.{i}.attn.c_proj")
        z = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        x = x + linear(gelu, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


def check_forward(module):
    """Two texts of different lengths in one batch, and one after a prefix through the cache."""
    weights = tiny(LM, dtype=torch.float64)
    model = module.GPT2(module.GPT2Config.from_hf(HF)).double().eval()
    model.load_state_dict(weights.state_dict())
    texts = [[5, 9, 33, 8, 71], [6, 1, 2]]
    ids = torch.tensor([texts[0], [0, 0, *texts[1]]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    want = [plain(weights, text) @ weights.embed.weight.T for text in texts]
    with torch.no_grad():
        got = model(ids, attention_mask=mask)
        cache = model.new_cache(2, 5)
        parts = [(0, 3), (3, 4), (4, 5)]
        read = [model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache) for a, b in parts]
    for logits in (got, torch.cat(read, dim=1)):
        torch.testing.assert_close(logits[0], want[0], rtol=0, atol=FP64)
        torch.testing.assert_close(logits[1, 2:], want[1], rtol=0, atol=FP64)


MUTANTS = [
    ('approximate="tanh"', 'approximate="none"'),
    ("view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)",
     "view(B, T, self.n_head, 3, -1).permute(3, 0, 2, 1, 4)"),
    ("q, k, v = self.c_attn", "k, q, v = self.c_attn"),
    ("o.transpose(1, 2).reshape", "o.reshape"),
    ("attention(q, k, v, mask)", "attention(q, k, v, None)"),
    ("x + self.attn(self.ln_1(x)", "x + self.attn(self.ln_2(x)"),
    ("return x + self.mlp(self.ln_2(x))", "return x + self.mlp(x)"),
    ("x = x + self.transformer.wpe(position_ids)", "x = x + self.transformer.wpe(position_ids * 0)"),
    ("default_positions(attention_mask, T, past, x.device)", "default_positions(None, T, past, x.device)"),
    ("return self.transformer.ln_f(x)", "return x"),
    ("self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)",
     "self.ln_1 = nn.LayerNorm(config.n_embd, 1e-3)"),
    ("cache.advance(T if", "cache.advance(1 if"),
]  # fmt: skip


def test_the_forward_is_that_of_the_formulas_and_every_mutant_is_not():
    check_forward(gpt2)
    assert [m for m in MUTANTS if survives(check_forward, gpt2, *m)] == []


@given(st.integers(1, 6), st.integers(0, 5))
def test_left_padding_changes_no_logit(length, pad):
    model = tiny(LM, dtype=torch.float64)
    ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(length))
    padded = torch.cat((torch.full((1, pad), 5), ids), 1)
    mask = torch.cat((torch.zeros(1, pad), torch.ones(1, length)), 1)
    got = model(padded, attention_mask=mask)[:, pad:]
    torch.testing.assert_close(got, model(ids), rtol=0, atol=FP64)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_reading_in_pieces_through_the_cache_gives_the_same_logits(pieces):
    model, T = tiny(LM, dtype=torch.float64), sum(pieces)
    ids = torch.randint(97, (2, T), generator=torch.Generator().manual_seed(T))
    cache = model.new_cache(2, T)
    with torch.no_grad():
        got = torch.cat([model(part, cache=cache) for part in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids), rtol=0, atol=FP64)
    assert cache.length == T


def test_a_given_prefix_is_the_text_that_made_it():
    model = tiny(LM, dtype=torch.float64)
    ids = torch.randint(97, (2, 7))
    with torch.no_grad():
        cache = model.new_cache(2, 3)
        model(ids[:, :3], cache=cache)
        got = model(ids[:, 3:], prefix_kv=list(zip(cache.keys, cache.values, strict=True)))
        torch.testing.assert_close(got, model(ids)[:, 3:], rtol=0, atol=FP64)


def test_a_text_longer_than_the_positions_says_so_and_padding_does_not_count():
    model = tiny(LM, n_positions=8)
    with pytest.raises(ValueError, match="a text has 9 tokens.* 8 positions .n_positions."):
        model(torch.zeros(1, 9, dtype=torch.long))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    assert torch.isfinite(model(torch.zeros(1, 11, dtype=torch.long), attention_mask=mask)).all()


@pytest.mark.parametrize("head", GPT2.heads)
def test_a_head_reads_the_hidden_states(head):
    [name] = [name for name, entry in MODELS.items() if entry[0] is GPT2 and entry[2] == head]
    model = tiny(name, dtype=torch.float64)
    ids, mask = torch.tensor([[4, 8, 15, 0], [0, 0, 16, 23]]), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    hidden = [plain(model, [4, 8, 15]), plain(model, [16, 23])]
    got = model(ids, attention_mask=mask)
    if head == "sequence_classification":
        want = torch.stack([h[-1] for h in hidden])
    else:
        want, got = torch.cat(hidden), got[mask.bool()]
    weight = getattr(model.head, "weight", torch.eye(32, dtype=torch.float64))
    bias = 0 if getattr(model.head, "bias", None) is None else model.head.bias
    torch.testing.assert_close(got, want @ weight.T + bias, rtol=0, atol=FP64)
    assert model.architecture == name and model.to_hf()["architectures"] == [name]
    assert (bias is 0) == (head not in ("token_classification", "question_answering"))  # noqa: F632


def test_checkpoints_hold_transposed_matrices_and_the_model_does_not(tmp_path):
    model = tiny(LM)
    minift.save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied
    assert stored["transformer.h.1.attn.c_attn.weight"].shape == (32, 96)
    assert model.blocks[1].attn.c_attn.weight.shape == (96, 32)
    assert stored["transformer.wpe.weight"].shape == model.transformer.wpe.weight.shape == (64, 32)
    again = minift.load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_old_checkpoints_store_masks_and_no_prefix(tmp_path, prefix):
    model = tiny(LM)
    minift.save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {prefix + key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    for i in range(2):
        old[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        old[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, tmp_path / "model.safetensors")
    again = minift.load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    del old[f"{prefix}h.0.attn.c_attn.bias"]  # which the masks' names must not hide
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing transformer\.h\.0\.attn\.c_attn\.bias"):
        minift.load_model(tmp_path)


def test_a_new_head_on_a_language_model_is_new_and_trains(tmp_path):
    minift.save_model(tiny(LM, tie_word_embeddings=False), tmp_path)
    model = minift.load_model(tmp_path, head="sequence_classification", num_labels=3, seed=1)
    assert model.new_modules == ("score",) and model.score.weight.shape == (3, 32)
    plan = minift.apply(model, minift.LoRA(target_modules=("c_attn",)))
    assert plan.trainable == 2 * 8 * (32 + 96) + 3 * 32
    assert minift.load_model(tmp_path, head="none")(torch.tensor([[1, 2]])).shape == (1, 2, 32)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"model_type": "gptj"}, "model_type = 'gptj'"),
        ({"n_head": 5}, "n_embd 32 is no multiple of n_head 5"),
        ({"n_layer": 0}, "n_layer is 0; it must be positive"),
        ({"n_layer": 1025}, "n_layer is 1025; at most 1024"),
        ({"n_embd": None}, "lacks n_embd"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon is -1.0"),
        ({"n_inner": "no"}, "n_inner is 'no'"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        GPT2Config.from_hf({**HF, **change})


def test_what_changes_no_forward_is_read_over_and_config_json_comes_back():
    old = {**HF, "n_ctx": 64, "attn_pdrop": 0.1, "summary_type": "cls_index", "reorder_and_upcast_attn": True}
    config = GPT2Config.from_hf({**old, "activation_function": "gelu_pytorch_tanh"})
    assert config == GPT2Config.from_hf(HF) and config.tie_word_embeddings
    assert GPT2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_what_methods_may_rely_on():
    model = tiny(LM, n_inner=40)
    assert model.dims == Dims(2, 32, 4, 8, 97, 64) and model.tied and len(model.blocks) == 2
    assert model.block_index("transformer.h.1.mlp.c_fc") == 1 and model.block_index("transformer.wpe") is None
    assert model.blocks[0].mlp.c_fc.out_features == 40
    untied = tiny(LM, tie_word_embeddings=False)
    assert not untied.tied and untied.head.weight.shape == (97, 32)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    alone = [minift.generate(model, [p], 10)[0] for p in prompts]
    assert minift.generate(model, prompts, 10) == alone
