"""QLoRA is LoRA on the dequantized base; merging into a quantized base in its three modes."""

import copy

import pytest
import torch
from conftest import tiny_llama

import minift
from minift.methods.base import trainable
from minift.methods.lora import INITS
from minift.models.interface import dense_weight, is_quantized, set_weight
from minift.models.wrappers import base_layers

IDS = torch.arange(24).view(2, 12) % 97


def trained(method, dtype=torch.float32, quantize=True):
    """A quantized base with an adapter whose B is not zero, and the dense model with the same weights."""
    model = tiny_llama(dtype)
    original = copy.deepcopy(model)
    if quantize:
        minift.quantize_model(model, "nf4")
    minift.apply(model, method)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in trainable(model).items():
            if name.endswith("lora_B"):
                p.copy_(0.1 * torch.randn_like(p))
    return model, original


def test_gradients_equal_loras_on_the_dequantized_base_in_fp64():
    method = minift.LoRA(r=4, target_modules=("all-linear",))
    quantized, dense = tiny_llama(torch.float32), tiny_llama(torch.float32)
    minift.quantize_model(quantized, "nf4")
    for path, layer in base_layers(quantized).items():
        if is_quantized(layer):
            set_weight(base_layers(dense)[path], layer.dequantize())
            layer.compute_dtype = torch.float64  # fp32 values, computed in fp64
    grads = []
    for model in (quantized, dense):
        minift.apply(model, method, seed=3)
        for p in model.parameters():
            if p.is_floating_point():
                p.data = p.data.double()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in trainable(model).items():
                if name.endswith("lora_B"):
                    p.copy_(0.1 * torch.randn_like(p))
        model(IDS).square().mean().backward()
        grads.append({name: p.grad for name, p in trainable(model).items()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        # fp64 sums of at most 97 * 24 terms, 2 blocks there and back, against the largest entry
        limit = 4 * 97 * 24 * 2.0**-53 * grads[1][name].abs().max().item()
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=limit)


def test_the_recipe_quantizes_a_dense_model_and_leaves_a_quantized_one():
    for model in (tiny_llama(), tiny_llama()):
        plan = minift.apply(model, minift.QLoRA(r=2))
        assert sum(is_quantized(m) for m in model.modules()) == 14 and not is_quantized(model.lm_head)
        assert plan.trainable == sum(2 * (s.shape[0] + s.shape[1]) for s in plan.sites)
    one = tiny_llama()
    minift.quantize_model(one, "nf4", skip=["down_proj"])
    minift.apply(one, minift.QLoRA(r=2))
    assert sum(is_quantized(m) for m in one.modules()) == 12


@pytest.mark.parametrize("init", INITS)
def test_every_start_of_lora_is_the_quantized_model_to_the_bit(init):
    model, quantized = tiny_llama(), tiny_llama()
    minift.quantize_model(quantized)
    minift.apply(model, minift.QLoRA(r=4, init=init))
    assert torch.equal(model(IDS), quantized(IDS))


def test_a_base_in_another_format_or_no_format_is_refused():
    model = tiny_llama()
    minift.quantize_model(model, "int8")
    with pytest.raises(
        ValueError, match=r"q_proj is quantized with .*'int8', 64, True.* the method says .*'nf4'"
    ):
        minift.apply(model, minift.QLoRA())
    minift.apply(model, minift.LoRA(target_modules=("all-linear",)))  # LoRA takes any base
    with pytest.raises(ValueError, match="format 'int4' is not known"):
        minift.QLoRA(format="int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_merges_into_what_was_trained_against(dtype):
    model, _ = trained(minift.QLoRA(r=4), dtype)
    before = model(IDS).float()
    errors = minift.merge(model)
    assert not any(is_quantized(m) for m in model.modules()) and len(errors) == 14
    unit = 2**-23 if dtype == torch.float32 else 2**-8  # one rounding of weights below 2 in size
    assert max(errors.values()) <= 2 * unit
    scale = before.abs().max().item()
    torch.testing.assert_close(
        model(IDS).float(), before, rtol=0, atol=(2e-5 if dtype == torch.float32 else 0.1) * scale
    )


def test_requantized_keeps_the_format_and_says_what_it_costs():
    model, _ = trained(minift.QLoRA(r=4, format="nf4"))
    exact = {
        p: (dense_weight(m.base) + m.delta()).detach() for p, m in model.adapters["default"].modules.items()
    }
    errors = minift.merge(model, mode="requantized")
    for path, weight in exact.items():
        layer = model.get_submodule(path)
        again = minift.quantize_weight(weight, "nf4").dequantize()
        assert torch.equal(layer.dequantize(), again)
        assert (
            errors[path] == pytest.approx((again - weight).abs().max().item(), rel=1e-4)
            and errors[path] > 1e-3
        )


def test_original_adds_the_delta_to_the_dense_weights():
    model, original = trained(minift.QLoRA(r=4))
    deltas = {p: m.delta().detach() for p, m in model.adapters["default"].modules.items()}
    errors = minift.merge(model, mode="original", original=original)
    for path, delta in deltas.items():
        assert torch.equal(model.get_submodule(path).weight, base_layers(original)[path].weight + delta)
        assert errors[path] > 1e-3  # against what was trained against: the quantization error


def test_two_adapters_merge_one_after_the_other():
    model, _ = trained(minift.QLoRA(r=2))
    minift.apply(model, minift.LoRA(r=2, target_modules=("q_proj",)), name="second")
    before = model(IDS)
    minift.merge(model, "default")
    minift.merge(model, "second")
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=2e-5 * before.abs().max().item())


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            {"mode": "exact"},
            "merge mode 'exact' is not known; known modes: dequantized, requantized, original",
        ),
        ({"mode": "original"}, "mode 'original' needs original"),
        ({"original": tiny_llama()}, "mode 'original' needs original"),
        ({"mode": "original", "original": tiny_llama(num_hidden_layers=1)}, "original has "),
        ({"mode": "original", "original": tiny_llama(intermediate_size=64)}, "original has "),
    ],
)
def test_bad_merges_touch_nothing(arguments, sentence):
    model, _ = trained(minift.QLoRA(r=2))
    before = model(IDS)
    with pytest.raises(ValueError, match=sentence):
        minift.merge(model, **arguments)
    assert torch.equal(model(IDS), before) and "default" in model.adapters


def test_requantizing_a_dense_model_is_refused_and_a_quantized_original_too():
    model, _ = trained(minift.LoRA(r=2), quantize=False)
    with pytest.raises(ValueError, match="no layer of this one is quantized"):
        minift.merge(model, mode="requantized")
    model, original = trained(minift.QLoRA(r=2))
    minift.quantize_model(original)
    with pytest.raises(ValueError, match="original has "):
        minift.merge(model, mode="original", original=original)


def test_an_adapter_file_belongs_to_its_quantized_base(tmp_path):
    model, original = trained(minift.QLoRA(r=2))
    minift.save_adapter(model, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"nf4 in blocks of 64, double, not on a model made in Python in float32, not quantized",
    ):
        minift.load_adapter(original, tmp_path)
    fresh = tiny_llama()
    minift.quantize_model(fresh, "nf4")
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))
    minift.load_adapter(original, tmp_path, check_base=False)


def test_a_recipe_that_cannot_quantize_leaves_the_model_as_it_was():
    wrapped, broken = tiny_llama(), tiny_llama()
    minift.apply(wrapped, minift.LoRA(r=2), name="first")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    for model, sentence, names in ((wrapped, "carries an adapter", ["first"]), (broken, "not finite", [])):
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=sentence):
            minift.apply(model, minift.QLoRA(r=2))
        assert list(model.adapters) == names and not model.quantization
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_the_record_of_quantization_follows_a_merge():
    model, _ = trained(minift.QLoRA(r=2))
    minift.merge(model)
    assert model.quantization == () and len(model.quantization_table) == 0
    model, _ = trained(minift.LoRA(r=2))
    minift.merge(model)  # q and v of both blocks become dense
    assert len(model.quantization_table) == 10 and len(model.quantization) == 1


def test_an_original_with_an_adapter_or_other_weights_is_refused():
    model, original = trained(minift.QLoRA(r=2))
    minift.apply(original, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="original has LoRALinear .* where a dense layer"):
        minift.merge(model, mode="original", original=original)
    with pytest.raises(ValueError, match="original has other embeddings"):
        minift.merge(model, mode="original", original=tiny_llama(seed=5))
