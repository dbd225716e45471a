"""BitFit against a dense model with the trained biases; and laws for the methods beside it."""

import copy

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn
from torch.func import functional_call

import minift
from minift.methods import bitfit
from minift.methods.base import trainable
from minift.methods.bitfit import BitFit
from minift.methods.selective import Trained
from minift.models.interface import dense_weight, is_quantized, parameter_count
from minift.models.wrappers import base_layers, base_parameters, innermost, replace_base
from minift.quant import quantize_weight
from minift.quant.linear import QuantizedLinear

IDS = (torch.arange(20) * 7 % 23).view(2, 10)  # some tokens twice
BASES = ["float32", "bfloat16", "nf4"]


def base_model(base="float64", **config):
    """The tiny model on one of BASES, or in fp64."""
    if base != "nf4":
        return tiny_llama(getattr(torch, base), **config)
    model = tiny_llama(**config)
    minift.quantize_model(model, "nf4")
    return model


def biased(model, seed=1):
    """The model with a bias in each of its linear layers, the head too."""
    random = torch.Generator().manual_seed(seed)
    for layer in base_layers(model).values():
        bias = 0.2 * torch.randn(layer.out_features, generator=random)
        layer.bias = nn.Parameter(bias.to(model.dtype), requires_grad=not is_quantized(layer))
    return model


def move(model, std=0.1):
    """Move every number that trains, as steps would."""
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(std * torch.randn_like(p))
    return model


def moved(model, method, name="default", std=0.1):
    """The model with a method applied and moved; what trains is fp64 on an fp64 base."""
    minift.apply(model, method, name=name)
    for p in trainable(model).values():
        p.data = p.data.double() if model.dtype == torch.float64 else p.data
    return move(model, std)


def loss(logits):
    """A sum with other weights at each place, so that no gradient is zero by symmetry."""
    return (logits.double() * torch.arange(logits.numel()).double().cos().view(logits.shape)).sum()


def gradients(model):
    parameters = trainable(model)
    return dict(zip(parameters, torch.autograd.grad(loss(model(IDS)), parameters.values()), strict=True))


def assert_close(got, want):
    """Two blocks in fp64: some thousand roundings of 2^-53, against the largest number."""
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float64
    assert (got - want).abs().max() <= 1e-12 * (1 + want.abs().max())


def assert_dense(model, bare, leaves, build=dict):
    """Logits and gradients of an fp64 model are those of `bare` with the weights that `build` makes."""
    want = functional_call(bare, build(leaves), (IDS,))
    assert_close(model(IDS), want)
    wanted = dict(zip(leaves, torch.autograd.grad(loss(want), leaves.values()), strict=True))
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name in got:
        assert_close(got[name], wanted[name])


def assert_gradients_near_fp64(model):
    """Those of the same model in fp64 with dense weights: 2 blocks of 7 products, forward and backward, sums
    of at most 97 terms rounded to 2^-24, against the largest gradient of the parameter."""
    exact = copy.deepcopy(model)
    for path, layer in base_layers(exact).items():
        if is_quantized(innermost(layer)):
            replace_base(exact, path, innermost(layer).dense(innermost(layer).dequantize()))
    got, want = gradients(model), gradients(exact.double())
    for name, exactly in want.items():
        assert (got[name] - exactly).abs().max() <= 2 * 2 * 7 * 97 * 2.0**-24 * exactly.abs().max()


def leaves(model):
    return {name: p.detach().clone().requires_grad_() for name, p in trainable(model).items()}


def assert_rows(model):
    """A mixed batch is each text with its own adapters: to the bit in batches of one shape, or by itself."""
    adapted = model(IDS)
    with model.adapters.disable():
        plain = model(IDS)
    with model.adapters.rows([model.adapters.active(), None]):
        mixed = model(IDS)
    assert torch.equal(mixed[0], adapted[0]) and torch.equal(mixed[1], plain[1])
    assert not torch.equal(plain[0], adapted[0])
    if model.dtype == torch.float64:
        assert_close(mixed[:1], model(IDS[:1]))


def assert_base_kept(model, fresh):
    """Switched off, the model is its base to the bit; and the base's numbers are as they were."""
    with model.adapters.disable():
        assert torch.equal(model(IDS), fresh(IDS))
    mine, theirs = base_parameters(model), base_parameters(fresh)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any(p.requires_grad for p in mine.values())


def assert_checkpointing_changes_nothing(model):
    plain = gradients(model)
    model.gradient_checkpointing = True
    again = gradients(model)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def assert_merges_and_comes_back(model, fresh, limit=None):
    """Merged: the same logits, to the bit without a limit. Unmerged: the adapter and the base again."""
    want = model(IDS)
    minift.merge(model, keep=True)
    assert not model.adapters and not trainable(model)
    if limit is None:
        assert torch.equal(model(IDS), want)
    else:
        assert (model(IDS) - want).abs().max() <= limit * want.abs().max()
    minift.unmerge(model, "default")
    assert torch.equal(model(IDS), want)
    assert_base_kept(model, fresh)


LENGTHS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 48, "up_proj": 48}
BLOCK = sum(LENGTHS.values()) + 32  # and down_proj
CASES = [((), 2 * BLOCK + 97), (("q_proj", "up_proj"), 2 * (32 + 48)), ("*.1.mlp.*", 48 + 48 + 32)]


def check(module):
    for rules, count in CASES:
        fresh = biased(base_model())
        model = moved(biased(base_model()), module.BitFit(target_modules=rules))
        plan = model.adapters["default"].plan
        assert plan.trainable == count == sum(p.numel() for p in trainable(model).values())
        assert count == sum(site.parameters for site in plan.sites)
        assert plan.total == plan.base_parameters == parameter_count(model) == parameter_count(fresh)
        assert all(name.endswith(".bias") for name in trainable(model))
        assert_dense(model, fresh, leaves(model))
        assert_base_kept(model, fresh)
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


def on(base):
    """The tiny model with biases on one of BASES."""
    if base != "nf4":
        return biased(base_model(base))
    model = biased(tiny_llama())
    minift.quantize_model(model, "nf4")
    return model


@pytest.mark.parametrize("base", BASES)
def test_starts_as_the_base_keeps_its_bits_and_rows_and_merges(base):
    fresh, model = on(base), on(base)
    plan = minift.apply(model, BitFit())
    assert plan.trainable == CASES[0][1] and torch.equal(model(IDS), fresh(IDS))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    move(model)
    assert_base_kept(model, fresh)
    assert_rows(model)
    assert_checkpointing_changes_nothing(model)
    if base != "bfloat16":
        assert_gradients_near_fp64(model)
    # merging NF4 makes the layers dense: 2 blocks of 7 products, sums of at most 97 terms in another order
    assert_merges_and_comes_back(model, fresh, 2 * 7 * 97 * 2.0**-24 if base == "nf4" else None)


@given(st.sampled_from(BASES), st.integers(1, 40), st.integers(0, 99))
def test_a_layer_and_its_gradient_are_within_the_bound_of_fp64(base, n, seed):
    """y: roundings u of the product, of the sum and of b'; db sums n rows in fp32 and is rounded once."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if base == "bfloat16" else torch.float32
    layer = nn.Linear(64, 24).to(dtype).requires_grad_(False)
    if base == "nf4":
        layer = QuantizedLinear.from_weight(quantize_weight(layer.weight, "nf4"), dtype, layer.bias)
    made = Trained(layer, ["bias"])
    with torch.no_grad():
        made.bias.add_(torch.randn_like(made.bias))
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
    assert_dense(model, fresh, leaves(model))


def test_lora_around_it_adds_to_it_and_the_other_order_is_refused():
    model = moved(biased(base_model()), BitFit())
    bare, weights = biased(base_model()), leaves(model)
    moved(model, minift.LoRA(r=2, target_modules=("q_proj", "down_proj")), name="low")
    for path, made in model.adapters["low"].modules.items():
        weights[f"{path}.weight"] = bare.get_submodule(path).weight.detach() + made.delta(torch.float64)
    want = model(IDS)
    assert_close(want, functional_call(bare, weights, (IDS,)))
    with pytest.raises(ValueError, match="merge 'default' first"):
        minift.merge(model, "low")
    for name in ("default", "low"):
        minift.merge(model, name)
    assert_close(model(IDS), want)
    model = biased(tiny_llama())
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
    model = biased(tiny_llama())
    shapes = copy.deepcopy(model).to("meta")
    assert BitFit().plan(shapes) == BitFit().plan(model)
    minift.apply(shapes, BitFit())
    assert all(p.is_meta for p in trainable(shapes).values())
