"""Every method that PEFT has: our files in theirs and their files in ours give the same numbers.

Tensors must be equal to the bit; logits to 1e-5 of their size, since the two programs add the terms of their
matrix products and of their attention in another order.
"""

import json

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

import minift
from minift.methods import METHODS
from minift.methods.base import trainable

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
IDS = torch.arange(18).view(2, 9)

# name -> (our method, its fields, a tied model)
OURS = {
    "lora": ("lora", {"r": 3}, False),
    "patterns": (
        "lora",
        {
            "target_modules": ["all-linear"],
            "rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 3},
        },
        False,
    ),
    "rslora patterns": ("lora", {"rslora": True, "r": 3, "rank_pattern": {"1.self_attn.q_proj": 6}}, False),
    "modules_to_save": ("lora", {"r": 2, "modules_to_save": ["lm_head", "input_layernorm"]}, False),
    "embedding": ("lora", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}, False),
    "head": ("lora", {"r": 3, "target_modules": ["lm_head"]}, False),
    "one block and the head": (
        "lora",
        {"r": 3, "target_modules": ["*.1.self_attn.q_proj", "lm_head"]},
        False,
    ),
    "tied, a branch on both": ("lora", {"r": 3, "target_modules": ["embed_tokens"], "tied": "both"}, True),
    "tied, a branch on the head": ("lora", {"r": 3, "target_modules": ["lm_head"], "tied": "untie"}, True),
    "tied, both trained": ("lora", {"r": 2, "modules_to_save": ["embed_tokens"], "tied": "both"}, True),
    "pissa": ("lora", {"r": 3, "init": "pissa"}, False),
    "pissa, rslora": (
        "lora",
        {"r": 3, "init": "pissa", "rslora": True, "rank_pattern": {"q_proj": 5}},
        False,
    ),
    "olora": ("lora", {"r": 2, "init": "olora", "alpha_pattern": {"v_proj": 5}}, False),
    "dora": ("dora", {"r": 3, "target_modules": ["all-linear"]}, False),
    "dora, rslora": ("dora", {"r": 3, "rslora": True, "rank_pattern": {"q_proj": 2}}, False),
    "adalora": ("adalora", {"r": 4, "target_r": 2}, False),
    "ia3": ("ia3", {}, False),
    "ia3, no feed-forward": ("ia3", {"target_modules": ["q_proj"], "feedforward_modules": ["none"]}, False),
    "ln_tuning": ("ln_tuning", {}, False),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 4}, False),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 4, "encoder_hidden_size": 12}, False),
    "p_tuning, lstm": ("p_tuning", {"num_virtual_tokens": 3, "encoder": "lstm"}, False),
    "prefix_tuning": ("prefix_tuning", {"num_virtual_tokens": 4}, False),
    "prefix_tuning, projected": (
        "prefix_tuning",
        {"num_virtual_tokens": 4, "prefix_projection": True},
        False,
    ),
}


def bases(folder, tied=False):
    ours = tiny_llama(tie_word_embeddings=tied)
    minift.save_model(ours, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def randomize(parameters):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))


def their_logits(wrapped):
    """Without the virtual positions that prompt tuning returns as well."""
    with torch.no_grad():
        return wrapped.eval()(IDS).logits[:, -IDS.shape[1] :]


def check_logits(ours, wrapped):
    a, b = ours(IDS), their_logits(wrapped)
    assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


@pytest.mark.parametrize("name, fields, tied", OURS.values(), ids=OURS)
def test_peft_loads_what_we_save(tmp_path, name, fields, tied):
    ours, theirs = bases(tmp_path / "base", tied)
    before = ours(IDS)
    minift.apply(ours, METHODS[name](**fields))
    randomize(trainable(ours).values())
    assert (ours(IDS) - before).abs().max() > 1e-2  # the adapter does something
    minift.save_adapter(ours, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    check_logits(ours, wrapped)
    wrapped.save_pretrained(tmp_path / "again")
    stored, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again"))
    again = {key: t for key, t in again.items() if not key.endswith("base_layer.weight")}
    assert stored.keys() == again.keys() and all(torch.equal(stored[key], again[key]) for key in stored)


THEIRS = {
    "lora": (peft.LoraConfig, {"r": 4, "target_modules": ["q_proj", "v_proj"]}, False),
    "patterns": (
        peft.LoraConfig,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 5},
            "alpha_pattern": {"v_proj": 5},
        },
        False,
    ),
    "modules_to_save": (
        peft.LoraConfig,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "post_attention_layernorm"]},
        False,
    ),
    "embedding": (peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, False),
    "tied, a branch on both": (
        peft.LoraConfig,
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        True,
    ),
    "tied, a branch on the embedding": (peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens"]}, True),
    "tied, both trained": (
        peft.LoraConfig,
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        True,
    ),
    "dora": (peft.LoraConfig, {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True}, False),
    "dora, rslora": (
        peft.LoraConfig,
        {"r": 4, "target_modules": ["q_proj"], "use_dora": True, "use_rslora": True},
        False,
    ),
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"]},
        False,
    ),
    "ia3": (peft.IA3Config, {}, False),
    "ia3, no feed-forward": (
        peft.IA3Config,
        {"target_modules": ["k_proj"], "feedforward_modules": []},
        False,
    ),
    "ln_tuning": (peft.LNTuningConfig, {}, False),
    "prompt_tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}, False),
    "prompt_tuning, text": (
        peft.PromptTuningConfig,
        {"num_virtual_tokens": 4, "prompt_tuning_init": "RANDOM"},
        False,
    ),
    "p_tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 8}, False),
    "p_tuning, lstm": (
        peft.PromptEncoderConfig,
        {"num_virtual_tokens": 4, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
        False,
    ),
    "prefix_tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}, False),
    "prefix_tuning, projected": (
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
        False,
    ),
}


@pytest.mark.parametrize("config, options, tied", THEIRS.values(), ids=THEIRS)
def test_we_load_what_peft_saves(tmp_path, config, options, tied):
    ours, theirs = bases(tmp_path / "base", tied)
    wrapped = peft.get_peft_model(theirs, config(task_type="CAUSAL_LM", **options))
    randomize([p for p in wrapped.parameters() if p.requires_grad])
    wrapped.save_pretrained(tmp_path / "adapter")
    minift.load_adapter(ours, tmp_path / "adapter")
    check_logits(ours, wrapped)
    assert trainable(ours)  # and can be trained on
    minift.save_adapter(ours, tmp_path / "again")
    stored, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again"))
    stored = {key: t for key, t in stored.items() if not key.endswith("base_layer.weight")}
    assert stored.keys() == again.keys() and all(torch.equal(stored[key], again[key]) for key in stored)


def test_pruned_adalora_files_load(tmp_path):
    ours, theirs = bases(tmp_path / "base")
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        total_step=20,
        tinit=1,
        tfinal=1,
        target_modules=["q_proj"],
    )
    wrapped = peft.get_peft_model(theirs, config)
    randomize([p for p in wrapped.parameters() if p.requires_grad])
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    for step in range(20):
        wrapped(IDS, labels=IDS).loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "adapter")
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    kept = {path: sum(booleans) for path, booleans in pattern.items()}
    assert sum(kept.values()) < 8  # of 2 layers with 4 triplets each
    minift.load_adapter(ours, tmp_path / "adapter")
    check_logits(ours, peft.PeftModel.from_pretrained(bases(tmp_path / "base")[1], tmp_path / "adapter"))
    for path, part in ours.adapters["default"].modules.items():
        assert int((part.lora_E != 0).sum()) == kept[f"{path}.lora_E"]


@pytest.mark.parametrize("name", ["bottleneck", "selective"])
def test_what_peft_does_not_have_is_refused_there(tmp_path, name):
    ours, theirs = bases(tmp_path / "base")
    minift.apply(ours, METHODS[name]())
    minift.save_adapter(ours, tmp_path / "adapter")
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")


@pytest.mark.parametrize(
    "options, field",
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_we_do_not_support_is_refused_by_name(tmp_path, options, field):
    ours, theirs = bases(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=field):
        minift.load_adapter(ours, tmp_path / "adapter")
