"""Adapter files beside peft: ours loaded by theirs and theirs by ours give equal logits."""

import pytest
import torch
from conftest import tiny_llama

import minift
from minift.methods.base import trainable

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
IDS = torch.arange(18).view(2, 9)

CASES = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3.0},
    "all linear layers": {"target_modules": ["all-linear"]},
    "one block": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "globs": {"target_modules": ["*.0.self_attn.q_proj", "*.1.mlp.down_proj"]},
    "excludes": {"target_modules": ["all-linear"], "exclude_modules": ["*.mlp.*"]},
}


def bases(folder, tied=False):
    ours = tiny_llama(tie_word_embeddings=tied)
    minift.save_model(ours, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_peft_loads_what_we_save(tmp_path, fields):
    ours, theirs = bases(tmp_path / "base")
    minift.apply(ours, minift.LoRA(r=3, **fields))
    with torch.no_grad():
        for p in trainable(ours).values():
            p.normal_(std=0.2)
    minift.save_adapter(ours, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    adapted = {n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(ours.adapters["default"].modules)
    a, b = ours(IDS), loaded(IDS).logits
    assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["k_proj"], "layers_to_transform": [0], "use_rslora": True, "lora_alpha": 7},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["0.self_attn.o_proj"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_we_load_what_peft_saves(tmp_path, options, tied):
    ours, theirs = bases(tmp_path / "base", tied)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    minift.load_adapter(ours, tmp_path / "adapter")
    a, b = ours(IDS), wrapped(IDS).logits
    assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())
    assert sum(p.numel() for p in trainable(ours).values()) == wrapped.get_nb_trainable_parameters()[0]


def test_merging_gives_what_peft_merges(tmp_path):
    ours, theirs = bases(tmp_path / "base")
    minift.apply(ours, minift.LoRA(r=3))
    with torch.no_grad():
        for p in trainable(ours).values():
            p.normal_(std=0.2)
    minift.save_adapter(ours, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    minift.merge(ours)
    weights = dict(merged.named_parameters())
    for name, p in ours.named_parameters():
        assert (p - weights[name]).abs().max() <= 1e-6
