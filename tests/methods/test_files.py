"""Adapter files: bitwise there and back, strict both ways."""

import json

import pytest
import torch
from conftest import tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minift
from minift.methods.base import trainable
from minift.methods.fingerprint import fingerprint
from minift.methods.peft_format import from_config

METHOD = minift.LoRA(r=3, alpha=5.0, rslora=True, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def saved(tmp_path):
    model = tiny_llama()
    minift.apply(model, METHOD)
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_()
    minift.save_adapter(model, tmp_path)
    return model, tmp_path


def change_config(folder, **values):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_save_and_load_are_bitwise(saved):
    model, folder = saved
    fresh = tiny_llama()
    minift.load_adapter(fresh, folder)
    ids = torch.arange(10)[None]
    assert torch.equal(fresh(ids), model(ids))
    ours, theirs = trainable(model), trainable(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert fresh.adapters["default"].method.scaling == METHOD.scaling == 5.0 / 3**0.5


def test_the_layout_is_that_of_peft(saved):
    _, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (3, 48)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (32, 3)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (
        config["peft_type"] == "LORA"
        and config["use_rslora"]
        and config["target_modules"] == ["down_proj", "q_proj"]
    )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as f:
        facts = f.metadata()
    assert facts["format"] == "pt" and json.loads(facts["minift.scaling"]) == {
        f"model.layers.{i}.{name}": METHOD.scaling
        for i in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert oct((folder / "adapter_model.safetensors").stat().st_mode & 0o777) in (
        "0o644",
        "0o664",
        "0o600",
        "0o666",
    )


@pytest.mark.parametrize(
    "fields, targets, layers",
    [
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "lm_head"]},
            ["lm_head", "model.layers.0.self_attn.q_proj"],
            None,
        ),
        (
            {"target_modules": ["all-linear"]},
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
            None,
        ),
        ({"target_modules": ["v_proj"], "layers_to_transform": [1]}, ["v_proj"], [1]),
        (
            {"target_modules": ["*.0.self_attn.q_proj", "*.1.mlp.up_proj"]},
            ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
            None,
        ),
    ],
)
def test_target_modules_on_disk_mean_exactly_the_adapted_layers(tmp_path, fields, targets, layers):
    model = tiny_llama()
    minift.apply(model, minift.LoRA(r=2, **fields))
    minift.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == targets and config["layers_to_transform"] == layers
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert trainable(fresh).keys() == trainable(model).keys()


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q), "lacks 1 tensor.*q_proj.lora_A"),
        (
            lambda t: t.update({Q.replace("q_proj", "k_proj"): t[Q].clone()}),
            "unexpected 1 tensor.*k_proj.lora_A",
        ),
        (lambda t: t.update({Q: torch.zeros(2, 32)}), r"expected floating-point \(3, 32\)"),
        (lambda t: t.update({Q: torch.zeros(3, 32, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({Q: torch.full((3, 32), float("inf"))}), "not finite"),
        (
            lambda t: t.update({"somewhere.lora_A.weight": torch.zeros(1)}),
            "unexpected 1 tensor.*first somewhere",
        ),
        (
            lambda t: t.update({Q.replace("lora_A", "lora_magnitude_vector"): torch.zeros(1)}),
            "unexpected 1 tensor.*lora_magnitude",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_touch_nothing(saved, change, message):
    _, folder = saved
    change_tensors(folder, change)
    fresh = tiny_llama()
    with pytest.raises(ValueError, match=message):
        minift.load_adapter(fresh, folder)
    assert not fresh.adapters and "lora_A" not in " ".join(dict(fresh.named_parameters()))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use_dora": True}, "lacks 4 tensor.*lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 4}}, r"expected floating-point \(4, 32\)"),
        ({"alpha_pattern": {"q_proj": 4}}, "says scaling .* belong to different adapters"),
        ({"alpha_pattern": {"^q_proj": 4}}, "alpha_pattern '.q_proj' is a regular expression"),
        ({"modules_to_save": ["lm_head"]}, "lacks 1 tensor.*lm_head.weight"),
        ({"modules_to_save": ["nothing"]}, r"modules_to_save \['nothing'\] match no module"),
        ({"lora_bias": True}, "lora_bias"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"peft_type": "VERA"}, "peft_type 'VERA' is not supported; supported: LORA"),
        ({"peft_type": ["LORA"]}, "peft_type .'LORA'. is not supported"),
        ({"target_modules": ".*q_proj"}, "regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"r": 0}, "r is 0"),
        ({"r": 10**9}, "above the smaller side"),
        ({"target_modules": ["nope"]}, "match no linear"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"velora_config": {"x": 1}}, "velora_config"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config"),
        ({"arrow_config": {"x": 1}}, "arrow_config"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_a_config_field_that_would_change_the_forward_is_refused_by_name(saved, values, message):
    _, folder = saved
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        minift.load_adapter(tiny_llama(), folder)


def test_what_peft_leaves_out_or_adds_without_meaning_is_accepted(saved):
    minimal = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    plain = minift.LoRA(r=8, alpha=8, target_modules=["q_proj"], tied="untie")
    assert from_config(minimal, "x") == plain
    method = from_config(
        {
            **minimal,
            "peft_version": "0.21.2",
            "lora_bias": False,
            "megatron_core": "megatron.core",
            "task_type": None,
            "layers_to_transform": 3,
            "init_lora_weights": "gaussian",
        },
        "x",
    )
    assert method.layers_to_transform == ("3",)


def test_names_with_an_adapter_name_inside_load(saved):
    model, folder = saved
    change_tensors(
        folder, lambda t: [t.update({k.replace(".weight", ".default.weight"): t.pop(k)}) for k in list(t)]
    )
    fresh = tiny_llama()
    minift.load_adapter(fresh, folder)
    assert all(
        torch.equal(a, b) for a, b in zip(trainable(fresh).values(), trainable(model).values(), strict=True)
    )


def test_another_base_is_refused_unless_asked_for(saved):
    model, folder = saved
    other = tiny_llama(seed=1)
    with pytest.raises(ValueError, match="another base than this one"):
        minift.load_adapter(other, folder)
    minift.load_adapter(other, folder, check_base=False)
    assert fingerprint(model) == fingerprint(tiny_llama()) == fingerprint(tiny_llama(torch.bfloat16))
    minift.apply(model, minift.LoRA(r=2), name="second")
    assert fingerprint(model) == fingerprint(tiny_llama())


def test_missing_and_broken_files_and_bad_values(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        minift.load_adapter(tiny_llama(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no adapter named 'x'; resident"):
        minift.save_adapter(model, folder, "x")
    before = (folder / "adapter_model.safetensors").read_bytes()
    model.adapters["default"].modules["model.layers.0.self_attn.q_proj"].lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite; the adapter was not saved"):
        minift.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    (folder / "adapter_model.safetensors").write_bytes(before[:-7])
    with pytest.raises(ValueError, match="damaged or truncated"):
        minift.load_adapter(tiny_llama(), folder)


def test_a_config_of_another_adapter_beside_the_weights_is_noticed(saved):
    _, folder = saved
    change_config(folder, lora_alpha=7.0)
    with pytest.raises(ValueError, match="belong to different adapters"):
        minift.load_adapter(tiny_llama(), folder)


@pytest.mark.parametrize(
    "values", [{"lora_alpha": "8"}, {"use_rslora": "false"}, {"lora_dropout": [0]}, {"r": "8"}]
)
def test_values_of_another_type_are_refused(saved, values):
    _, folder = saved
    change_config(folder, **values)
    with pytest.raises(ValueError, match="alpha|rslora|dropout|r is"):
        minift.load_adapter(tiny_llama(), folder)


def test_a_second_adapter_on_the_head():
    model = tiny_llama()
    minift.apply(model, minift.LoRA(r=2, target_modules=["lm_head"]), name="first")
    assert minift.apply(model, minift.LoRA(r=2, target_modules=["lm_head"]), name="second").trainable == 2 * (
        32 + 97
    )
