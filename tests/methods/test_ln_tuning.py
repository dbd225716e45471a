"""LayerNorm tuning against a dense model with the trained norms."""

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
from minift.methods import ln_tuning
from minift.methods.ln_tuning import LNTuning
from minift.methods.trained import Trained
from minift.models.interface import parameter_count
from minift.models.layers import RMSNorm
from minift.models.wrappers import bare_modules, replace_module

D = 32


def with_layer_norms(model):
    """The model with a LayerNorm, weight and bias, in the place of each RMSNorm."""
    random = torch.Generator().manual_seed(1)
    for path, norm in bare_modules(model).items():
        if isinstance(norm, RMSNorm):
            new = nn.LayerNorm(D, eps=norm.eps, dtype=model.dtype)
            new.weight.data.copy_(norm.weight)
            new.bias.data.copy_(0.1 * torch.randn(D, generator=random))
            replace_module(model, path, new)
    return model


# rules, LayerNorms in the place of RMSNorms, count: 2 norms in each of 2 blocks and the last one
CASES = [
    ((), False, 5 * D),
    ((), True, 2 * 5 * D),
    ("input_layernorm", False, 2 * D),
    (("*.1.*norm", "model.norm"), True, 2 * 3 * D),
]


def check(module):
    for rules, layer_norms, count in CASES:
        make = (lambda: with_layer_norms(base_model())) if layer_norms else base_model
        fresh, model = make(), moved(make(), module.LNTuning(target_modules=rules))
        plan = model.adapters["default"].plan
        laws.assert_counts(model, count)
        assert plan.total == parameter_count(fresh)
        laws.assert_dense(model, fresh, leaves(model))
        laws.assert_base_kept(model, fresh)
        names = ["weight", "bias"] if layer_norms else ["weight"]
        for made in model.adapters["default"].modules.values():
            assert list(made.state()) == [f"ln_tuning_layers.{name}" for name in names]  # as in PEFT's files
        laws.assert_merges_and_comes_back(model, fresh)


def test_outputs_gradients_and_counts_are_those_of_the_dense_model():
    check(ln_tuning)


@pytest.mark.parametrize(
    "old, new",
    [
        ('self.target_modules or model.sites["norms"], "t', 'model.sites["norms"], "t'),
        ('self.target_modules or model.sites["norms"], "t', 'self.target_modules or ("model.norm",), "t'),
        ('self.target_modules or model.sites["norms"], "t', 'self.target_modules or ("*_layernorm",), "t'),
        ('"target_modules")', '"target_modules", only=("weight",))'),
        ('"target_modules")', '"target_modules", layers=(0,))'),
        ('prefix="ln_tuning_layers."', 'prefix=""'),
        ('prefix="ln_tuning_layers."', 'prefix="ln_tuning_layers"'),
        ("inject_trained(model, plan.sites, name", "inject_trained(model, plan.sites[:-1], name"),
        ("sum(prod(site.shape) for", "sum(prod(site.shape) + 1 for"),
        ("sum(prod(site.shape) for site in plan.sites)", "sum(2 * site.shape[0] for site in plan.sites)"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, ln_tuning, old, new)


@pytest.mark.parametrize("base", BASES)
def test_starts_as_the_base_keeps_its_bits_and_rows_and_merges_exactly(base):
    fresh, model = base_model(base), base_model(base)
    plan = minift.apply(model, LNTuning())
    assert plan.trainable == 5 * D
    laws.assert_starts_as_the_base_and_trains(model, fresh, base)
    laws.assert_merges_and_comes_back(model, fresh)


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 40), st.integers(0, 99))
def test_a_norm_and_its_gradient_are_within_the_bound_of_fp64(dtype, n, seed):
    """x / rms in fp32: D + 8 roundings; y is rounded once more, u; dweight sums n rows, rounded once."""
    torch.manual_seed(seed)
    made = Trained(RMSNorm(D, 1e-6).to(dtype).requires_grad_(False), ["weight"])
    with torch.no_grad():
        made.weight.add_(0.5 * torch.randn(D))
    x, dy = torch.randn(n, D).to(dtype), torch.randn(n, D).to(dtype)
    y = made(x)
    y.backward(dy)
    u = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    normal = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    want = normal * made.weight.detach().to(dtype).double()
    assert ((y.detach().double() - want).abs() <= ((D + 8) * 2.0**-24 + u) * want.abs()).all()
    dw, spread = (dy.double() * normal).sum(0), (dy.double() * normal).abs().sum(0)
    limit = (2 * n + D + 8) * 2.0**-24 * spread + u * dw.abs()
    assert ((made.weight.grad.double() - dw).abs() <= 1.01 * limit).all()
    assert made.weight.grad.dtype == torch.float32 and made.base.weight.grad is None


@pytest.mark.parametrize("first", ["low", "default"])
def test_it_stands_beside_lora_in_either_order_and_merges_in_any(first):
    methods = {"low": minift.LoRA(r=2, target_modules=("all-linear",)), "default": LNTuning()}
    model, bare, weights = base_model(), base_model(), {}
    for name in sorted(methods, key=lambda name: name != first):
        moved(model, methods[name], name=name)
    for path, made in model.adapters["low"].modules.items():
        weights[f"{path}.weight"] = bare.get_submodule(path).weight.detach() + made.delta(torch.float64)
    for path, made in model.adapters["default"].modules.items():
        weights[f"{path}.weight"] = made.weight.detach().clone()
    want = model(IDS)
    laws.assert_close(want, functional_call(bare, weights, (IDS,)))
    laws.assert_checkpointing_changes_nothing(model)
    for name in (first, ({"low", "default"} - {first}).pop()):
        minift.merge(model, name)
        laws.assert_close(model(IDS), want)


def test_two_on_one_norm_and_modules_that_are_no_norm_are_refused():
    model = tiny_llama()
    minift.apply(model, LNTuning(target_modules="model.norm"))
    with pytest.raises(
        ValueError, match=r"model.norm, which carries an adapter \(Trained\); merge or remove"
    ):
        minift.apply(model, LNTuning(), name="other")
    minift.apply(model, LNTuning(target_modules="input_layernorm"), name="other")
    with pytest.raises(
        ValueError, match=r"q_proj.weight, which is no norm's; norms are input_layernorm, post"
    ):
        LNTuning(target_modules=["model.norm", "q_proj"]).plan(tiny_llama())
    with pytest.raises(
        ValueError, match=r"\['input_layrnorm'\] match no module; nearest: \['input_layernorm'"
    ):
        LNTuning(target_modules=["input_layrnorm"]).plan(tiny_llama())


def test_the_plan_is_the_same_on_the_meta_device():
    laws.assert_plans_on_meta(LNTuning(), tiny_llama())
