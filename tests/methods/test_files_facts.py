"""Adapter files: what the metadata may hold, what counts, and what was found to go wrong once."""

import json

import pytest
import torch
from conftest import tiny_llama
from test_files_kinds import IDS, rewrite, trained

import minift
from minift.methods import METHODS


@pytest.mark.parametrize(
    "key, text",
    [
        (key, text)
        for key in ("minift.scaling", "minift.method", "minift.beneath")
        for text in ("[]", "3", "null", '"x"', "{", "[" * 100_000)
    ]
    + [
        ("minift.scaling", '{"model.layers.0.self_attn.q_proj": NaN}'),
        ("minift.scaling", '{"model.layers.0.self_attn.q_proj": "x"}'),
        ("minift.scaling", '{"somewhere": 2.0}'),
        ("minift.method", '{"lr_ratio": "x"}'),
        ("minift.beneath", '{"a": ["x"]}'),
    ],
)
def test_metadata_of_another_kind_are_one_error_and_touch_nothing(tmp_path, key, text):
    trained("lora", tmp_path, r=2)
    rewrite(tmp_path, lambda _, facts: facts.update({key: text}))
    fresh = tiny_llama()
    with pytest.raises(ValueError, match=r"minift\.|scaling|lr_ratio|trained over another adapter \(a\)"):
        minift.load_adapter(fresh, tmp_path)
    assert not fresh.adapters and all(p.requires_grad for p in fresh.parameters())


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"q_proj": 10**400}},
        {"rank_pattern": [1]},
        {"target_modules": 5},
    ],
)
def test_values_that_no_adapter_can_have_are_one_error_and_touch_nothing(tmp_path, fields):
    trained("lora", tmp_path, r=2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    fresh = tiny_llama()
    with pytest.raises(ValueError):
        minift.load_adapter(fresh, tmp_path)
    assert not fresh.adapters and all(p.requires_grad for p in fresh.parameters())


def test_what_the_config_says_counts(tmp_path):
    trained("bottleneck", tmp_path / "b", bottleneck_dim=3)
    trained("adalora", tmp_path / "a", r=4, target_r=3)
    for folder, change in (("b", {"activation": "gelu"}), ("a", {"target_r": 2, "lora_dropout": 0.25})):
        path = tmp_path / folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    bottleneck, adalora = tiny_llama(), tiny_llama()
    minift.load_adapter(bottleneck, tmp_path / "b")
    minift.load_adapter(adalora, tmp_path / "a")
    assert bottleneck.adapters["default"].method.activation == "gelu"
    method = adalora.adapters["default"].method
    assert (method.target_r, method.dropout) == (2, 0.25)


def test_an_adapter_that_was_trained_over_another_wants_it_there(tmp_path):
    model = trained("lora", tmp_path / "first", r=2)
    minift.apply(model, METHODS["ia3"](), name="second")
    minift.save_adapter(model, tmp_path / "second", "second")
    fresh = tiny_llama()
    with pytest.raises(ValueError, match=r"trained over another adapter \(default\) that is not active here"):
        minift.load_adapter(fresh, tmp_path / "second")
    minift.load_adapter(fresh, tmp_path / "first", name="whatever")
    minift.load_adapter(fresh, tmp_path / "second", name="second")
    assert torch.equal(fresh(IDS), model(IDS))
    minift.load_adapter(tiny_llama(), tmp_path / "second", check_base=False)


@pytest.mark.parametrize("r", [1, 3])
def test_a_branch_of_rank_one_on_a_tie_is_saved(tmp_path, r):
    model = trained("lora", tmp_path, tie=True, r=r, target_modules=["embed_tokens"], tied="both")
    fresh = tiny_llama(tie_word_embeddings=True)
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))


@pytest.mark.parametrize("tied", ["both", "untie"])
def test_adalora_beside_a_trained_end_of_a_tie_loads(tmp_path, tied):
    model = trained("adalora", tmp_path, tie=True, r=4, target_r=2, modules_to_save=["lm_head"], tied=tied)
    fresh = tiny_llama(tie_word_embeddings=True)
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))


def test_the_first_rule_of_a_pattern_still_counts_after_a_file(tmp_path):
    pattern = {"model.layers.0.self_attn.q_proj": 5, "*.q_proj": 3}
    model = trained("lora", tmp_path, r=2, rank_pattern=pattern, lr_ratio=8.0)
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS)) and fresh.adapters["default"].method.lr_ratio == 8.0


def test_loftq_remembers_that_it_makes_up_for_quantization(tmp_path):
    original, model = tiny_llama(), tiny_llama()
    minift.apply(model, METHODS["qlora"](r=2, init="loftq"))
    minift.save_adapter(model, tmp_path)
    fresh = tiny_llama()
    minift.quantize_model(fresh)
    minift.load_adapter(fresh, tmp_path)
    for loaded in (model, fresh):
        with pytest.raises(ValueError, match="it would do so twice: merge with mode 'dequantized'"):
            minift.merge(loaded, mode="original", original=original)
