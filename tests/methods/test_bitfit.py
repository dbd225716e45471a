"""BitFit against a dense model with the trained biases."""

import copy

import laws
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from laws import BASES, IDS, base_model, leaves, moved
from mutants import survives
from torch import nn
from torch.func import functional_call

import minift
from minift.methods import bitfit
from minift.methods.base import trainable
from minift.methods.bitfit import BitFit
from minift.methods.trained import Trained
from minift.models.interface import dense_weight, parameter_count

LENGTHS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48}
BLOCK = sum(LENGTHS.values()) + 32  # and down_proj
CASES = [((), 2 * BLOCK + 97), (("q_proj", "up_proj"), 2 * (32 + 48)), ("*.1.mlp.*", 48 + 48 + 32)]


def check(module):
    for rules, count in CASES:
        fresh = base_model(biases=True)
        model = moved(base_model(biases=True), module.BitFit(target_modules=rules))
        plan = model.adapters["default"].plan
        laws.assert_counts(model, count)
        assert plan.total == plan.base_parameters == parameter_count(fresh)
        assert all(name.endswith(".bias") for name in trainable(model))
        laws.assert_dense(model, fresh, leaves(model))
        laws.assert_base_kept(model, fresh)
        assert module.BitFit().refuses(fresh) is None and module.BitFit().refuses(base_model())
        for made in model.adapters["default"].modules.values():
            assert list(made.state()) == ["bias"] and made.state()["bias"] is made.bias


def test_outputs_gradients_and_counts_are_those_of_the_dense_model():
    check(bitfit)


@pytest.mark.parametrize(
    "old, new",
    [
        ('only=("bias",)', 'only=("weight",)'),
        ('only=("bias",)', "only=()"),
        ('only=("bias",)', 'only=("bias", "weight")'),
        ('self.target_modules or ("*",)', '("*",)'),
        ('self.target_modules or ("*",)', 'self.target_modules or ("*.self_attn.*",)'),
        ('self.target_modules or ("*",)', 'self.target_modules or ("*.layers.*",)'),
        ("sum(site.shape[0] for", "sum(site.shape[0] - 1 for"),
        ("for site in plan.sites)", "for site in plan.sites[1:])"),
        ("inject_trained(model, plan.sites, name)", "inject_trained(model, plan.sites[:-1], name)"),
        ("inject_trained(model, plan.sites, name)", 'inject_trained(model, plan.sites, name, "bias.")'),
        ('_parameters.get("bias") is not None', '_parameters.get("bias") is None'),
        ('_parameters.get("bias") is not None', '_parameters.get("weight") is not None'),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, bitfit, old, new)


@pytest.mark.parametrize("base", BASES)
def test_starts_as_the_base_keeps_its_bits_and_rows_and_merges(base):
    fresh, model = base_model(base, biases=True), base_model(base, biases=True)
    plan = minift.apply(model, BitFit())
    assert plan.trainable == CASES[0][1]
    laws.assert_starts_as_the_base_and_trains(model, fresh, base)
    # merging NF4 makes the layers dense: 2 blocks of 7 products, sums of at most 97 terms in another order
    laws.assert_merges_and_comes_back(model, fresh, 2 * 7 * 97 * 2.0**-24 if base == "nf4" else None)


@given(st.sampled_from(BASES), st.integers(1, 40), st.integers(0, 99))
def test_a_layer_and_its_gradient_are_within_the_bound_of_fp64(base, n, seed):
    """y: roundings u of the product, of the sum and of b'; db sums n rows in fp32 and is rounded once."""
    torch.manual_seed(seed)
    layer = laws.frozen_linear(base, 64, 24)
    made = Trained(layer, ["bias"])
    with torch.no_grad():
        made.bias.add_(torch.randn_like(made.bias))
    dtype = layer.bias.dtype
    x, dy = torch.randn(n, 64).to(dtype).requires_grad_(), torch.randn(n, 24).to(dtype)
    y = made(x)
    y.backward(dy)
    u = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    W, b = dense_weight(layer).double(), made.bias.detach().double()
    product, size = x.detach().double() @ W.T, x.detach().double().abs() @ W.T.abs()
    limit = 2 * 70 * 2.0**-24 * (size + b.abs()) + 2 * u * (product.abs() + 2 * b.abs())
    assert ((y.detach().double() - product - b).abs() <= limit).all()
    want, spread = dy.double().sum(0), dy.double().abs().sum(0)
    assert ((made.bias.grad.double() - want).abs() <= 2 * n * 2.0**-24 * spread + u * want.abs()).all()
    assert (layer.bias.requires_grad, layer.bias.grad, made.bias.dtype) == (False, None, torch.float32)
    assert torch.equal(x.grad, torch.autograd.grad(layer(x), x, dy)[0])  # dx does not depend on the bias


def test_the_bias_of_a_layer_norm_trains_too():
    fresh = tiny_llama(torch.float64)
    fresh.model.norm = nn.LayerNorm(32, dtype=torch.float64)
    model = moved(copy.deepcopy(fresh), BitFit())
    assert list(trainable(model)) == ["model.norm.bias"] and model.adapters["default"].plan.trainable == 32
    laws.assert_dense(model, fresh, leaves(model))


def test_lora_around_it_adds_to_it_and_the_other_order_is_refused():
    model = moved(base_model(biases=True), BitFit())
    bare, weights = base_model(biases=True), leaves(model)
    moved(model, minift.LoRA(r=2, target_modules=("q_proj", "down_proj")), name="low")
    for path, made in model.adapters["low"].modules.items():
        weights[f"{path}.weight"] = bare.get_submodule(path).weight.detach() + made.delta(torch.float64)
    laws.assert_close(model(IDS), functional_call(bare, weights, (IDS,)))
    laws.assert_merge_in_order(model, "default", "low")
    model = base_model("float32", biases=True)
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match=r"q_proj, which carries an adapter \(LoRALinear\)"):
        minift.apply(model, BitFit(), name="other")
    rest = minift.apply(model, BitFit(target_modules="mlp"), name="other")
    assert rest.trainable == 2 * (48 + 48 + 32)


def test_a_model_without_biases_is_refused_with_the_reason():
    model = tiny_llama()
    assert "it has no bias terms" in BitFit().refuses(model)
    for refused in (minift.apply, lambda model, method: method.plan(model)):
        with pytest.raises(ValueError, match="bitfit cannot run on this model: it has no bias terms"):
            refused(model, BitFit())
    assert not model.adapters and all(p.requires_grad for p in model.parameters())
    model.lm_head.bias = nn.Parameter(torch.zeros(97))
    assert BitFit().plan(model).trainable == 97
    with pytest.raises(ValueError, match=r"target_modules \['q_proj'\] mean modules without bias"):
        BitFit(target_modules=["lm_head", "q_proj"]).plan(model)
    with pytest.raises(
        ValueError, match=r"target_modules \['lm_haed'\] match no module; nearest: \['lm_head"
    ):
        BitFit(target_modules="lm_haed").plan(model)


def test_the_plan_is_the_same_on_the_meta_device():
    laws.assert_plans_on_meta(BitFit(), base_model("float32", biases=True))
