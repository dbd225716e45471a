"""Adapter files beyond plain LoRA: encoders, ties, templates, the ledger, layouts of our own."""

import json

import pytest
import torch
from conftest import tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.methods.fingerprint import template_hash

IDS = torch.arange(20).view(2, 10)
WEIGHTS = "adapter_model.safetensors"


def trained(name, folder, tie=False, **fields):
    """A model with a moved adapter, saved."""
    model = tiny_llama(tie_word_embeddings=tie)
    minift.apply(model, METHODS[name](**fields))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.1 * torch.randn_like(p))
    minift.save_adapter(model, folder)
    return model


def metadata(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return file.metadata()


def rewrite(folder, change, name=WEIGHTS):
    tensors = load_file(folder / name)
    with safe_open(folder / name, framework="pt") as file:
        facts = file.metadata()
    change(tensors, facts)
    save_file(tensors, folder / name, facts)


ENCODED = {
    "prefix": (
        "prefix_tuning",
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 6},
    ),
    "mlp": ("p_tuning", {"num_virtual_tokens": 4, "encoder_hidden_size": 6}),
    "lstm": ("p_tuning", {"num_virtual_tokens": 4, "encoder": "lstm", "encoder_hidden_size": 6}),
}


@pytest.mark.parametrize("name, fields", ENCODED.values(), ids=ENCODED)
def test_what_an_encoder_made_is_exported_and_the_encoder_trains_on(tmp_path, name, fields):
    model = trained(name, tmp_path, **fields)
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert fresh.adapters["default"].method == model.adapters["default"].method
    ours, theirs = trainable(model), trainable(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(fresh(IDS), model(IDS))
    (tmp_path / "adapter_encoder.safetensors").unlink()  # as PEFT would have written it
    plain = tiny_llama()
    minift.load_adapter(plain, tmp_path)
    assert torch.equal(plain(IDS), model(IDS))
    assert [n.rpartition(".")[2] for n in trainable(plain)] == ["prompt_embeddings"]


@pytest.mark.parametrize("name, fields", ENCODED.values(), ids=ENCODED)
def test_an_encoder_of_another_adapter_is_refused_and_touches_nothing(tmp_path, name, fields):
    trained(name, tmp_path, **fields)
    rewrite(tmp_path, lambda t, _: t["prompt_embeddings"].add_(0.5))
    fresh = tiny_llama()
    with pytest.raises(ValueError, match="prompt_embeddings is not what the other tensors make it"):
        minift.load_adapter(fresh, tmp_path)
    assert not fresh.adapters and not fresh.slots and all(p.requires_grad for p in fresh.parameters())


def test_an_adapter_without_an_encoder_replaces_one_that_had_it(tmp_path):
    trained("p_tuning", tmp_path, num_virtual_tokens=3)
    model = trained("prompt_tuning", tmp_path, num_virtual_tokens=3)
    assert not (tmp_path / "adapter_encoder.safetensors").exists()
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))


def test_an_encoder_that_belongs_to_nothing_is_refused(tmp_path):
    trained("p_tuning", tmp_path, num_virtual_tokens=3)
    name = "adapter_encoder.safetensors"
    rewrite(tmp_path, lambda _, facts: facts.pop("minift.method"), name)
    with pytest.raises(ValueError, match="does not say which method it belongs to"):
        minift.load_adapter(tiny_llama(), tmp_path)
    trained("p_tuning", tmp_path, num_virtual_tokens=3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 5}))
    with pytest.raises(ValueError, match="num_virtual_tokens 5, adapter_encoder.safetensors 3"):
        minift.load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed_tokens"], "tied": "both"},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "tied": "both"},
    ],
)
def test_both_ends_of_a_tie_are_in_the_file_and_must_agree(tmp_path, fields):
    model = trained("lora", tmp_path, tie=True, r=2, **fields)
    fresh = tiny_llama(tie_word_embeddings=True)
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS)) and trainable(fresh).keys() == trainable(model).keys()
    head = next(key for key in load_file(tmp_path / WEIGHTS) if "lm_head" in key)
    rewrite(tmp_path, lambda t, _: t[head].add_(1))
    with pytest.raises(ValueError, match="is not what the other tensors make it"):
        minift.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path)


def test_a_start_that_is_taken_off_is_a_lora_of_twice_the_rank_on_the_original_base(tmp_path):
    for init in ("pissa", "olora"):
        for fields in ({"rslora": True}, {"alpha": 7.0, "rank_pattern": {"v_proj": 2}}):
            folder = tmp_path / f"{init}{len(fields)}"
            model = trained("lora", folder, r=3, init=init, **fields)
            fresh = tiny_llama()
            minift.load_adapter(fresh, folder)
            method = fresh.adapters["default"].method
            assert method.r == 6 and method.init == "kaiming" and not method.rslora
            # the same products in fp32, of scalings that agree to a rounding of fp64
            assert (fresh(IDS) - model(IDS)).abs().max() <= 2**-20 * model(IDS).abs().max()


def test_the_template_is_kept_as_a_hash_and_another_one_is_refused(tmp_path):
    model = trained("lora", tmp_path / "open", r=2)
    minift.load_adapter(tiny_llama(), tmp_path / "open", template="anything")
    for template in ("none", "{{ messages }}"):
        minift.save_adapter(model, tmp_path / "a", template=template)
        assert metadata(tmp_path / "a")["minift.template"] == template_hash(template)
        for asked in (None, template):
            minift.load_adapter(tiny_llama(), tmp_path / "a", template=asked)
        fresh = tiny_llama()
        with pytest.raises(ValueError, match="chat template .*do not check .template=None"):
            minift.load_adapter(fresh, tmp_path / "a", template="{{ other }}")
        assert not fresh.adapters
    assert template_hash("none") == "none" and len(template_hash("x")) == 64


def test_the_ledger_holds_every_layers_scaling_and_patterns_that_disagree_are_noticed(tmp_path):
    model = trained(
        "lora", tmp_path, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"1.self_attn.v_proj": 3}
    )
    ledger = json.loads(metadata(tmp_path)["minift.scaling"])
    assert ledger == {s.path: s.scaling for s in model.adapters["default"].plan.sites}
    assert set(ledger.values()) == {16 / 2, 16 / 4, 3 / 4}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {}}))
    with pytest.raises(ValueError, match=r"says scaling 4.0 for model.layers.1.self_attn.v_proj, .* 0.75"):
        minift.load_adapter(tiny_llama(), tmp_path)


def test_layouts_of_our_own_are_documented_keys(tmp_path):
    trained("bottleneck", tmp_path, bottleneck_dim=3, placement="houlsby", layers_to_transform=[1])
    keys = load_file(tmp_path / WEIGHTS)
    path = "base_model.model.model.layers.1."
    assert {k: tuple(t.shape) for k, t in keys.items()} == {
        f"{path}{site}.adapter_{part}": shape
        for site in ("self_attn.o_proj", "mlp.down_proj")
        for part, shape in (
            ("down.weight", (3, 32)),
            ("down.bias", (3,)),
            ("up.weight", (32, 3)),
            ("up.bias", (32,)),
        )
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK" and config["bottleneck_dim"] == 3
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        minift.load_adapter(tiny_llama(), tmp_path)


def test_an_embedding_that_peft_saved_beside_its_branch_must_be_the_bases(tmp_path):
    model = trained("lora", tmp_path, r=2, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    rewrite(tmp_path, lambda t, _: t.update({key: model.embed_weight.detach().clone()}))
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))
    rewrite(tmp_path, lambda t, _: t[key].mul_(2))
    with pytest.raises(
        ValueError, match="holds a base weight for model.embed_tokens that is not this model's"
    ):
        minift.load_adapter(tiny_llama(), tmp_path)
    rewrite(tmp_path, lambda t, _: t.update({"base_model.model.nowhere.base_layer.weight": t.pop(key)}))
    with pytest.raises(ValueError, match="nowhere.base_layer.weight belongs to no layer"):
        minift.load_adapter(tiny_llama(), tmp_path)


def test_the_fields_that_peft_has_no_place_for_come_back(tmp_path):
    model = trained("lora", tmp_path, r=2, target_modules=("q_proj", "v_proj"), lr_ratio=16.0, tied="untie")
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert fresh.adapters["default"].method == model.adapters["default"].method
