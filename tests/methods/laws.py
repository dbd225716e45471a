"""Laws of the methods that wrap modules of a frozen base, and the models that they are tested on."""

import copy

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.func import functional_call

import minift
from minift.methods.base import trainable
from minift.models.interface import is_quantized, parameter_count
from minift.models.wrappers import base_layers, base_parameters, innermost, replace_base
from minift.quant import quantize_weight
from minift.quant.linear import QuantizedLinear

IDS = (torch.arange(20) * 7 % 23).view(2, 10)  # some tokens twice
BASES = ["float32", "bfloat16", "nf4"]


def base_model(base="float64", biases=False, **config):
    """The tiny model on one of BASES, or in fp64; `biases`: with one in each linear layer, the head too."""
    model = tiny_llama(torch.float32 if base == "nf4" else getattr(torch, base), **config)
    random = torch.Generator().manual_seed(1)
    for layer in base_layers(model).values() if biases else ():
        bias = 0.2 * torch.randn(layer.out_features, generator=random)
        layer.bias = nn.Parameter(bias.to(model.dtype))
    if base == "nf4":
        minift.quantize_model(model, "nf4")
    return model


def frozen_linear(base, fan_in, fan_out):
    """A linear layer with a bias on one of BASES."""
    dtype = torch.bfloat16 if base == "bfloat16" else torch.float32
    layer = nn.Linear(fan_in, fan_out).to(dtype).requires_grad_(False)
    if base != "nf4":
        return layer
    return QuantizedLinear.from_weight(quantize_weight(layer.weight, "nf4"), dtype, layer.bias)


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


def assert_merge_in_order(model, inner, outer):
    """Of two adapters that do not commute the inner one goes first, and merging both changes no logit."""
    want = model(IDS)
    with pytest.raises(ValueError, match=f"merge '{inner}' first"):
        minift.merge(model, outer)
    for name in (inner, outer):
        minift.merge(model, name)
    assert_close(model(IDS), want)


def assert_counts(model, count):
    """The method's law, the formulas of its sites and the tensors give `count`; the total is the model's."""
    plan = model.adapters["default"].plan
    assert plan.trainable == count == sum(p.numel() for p in trainable(model).values())
    assert count == sum(site.parameters for site in plan.sites)
    assert plan.total == parameter_count(model)


def assert_starts_as_the_base_and_trains(model, fresh, base):
    """Just applied: the base's logits to the bit, and what trains is fp32. Moved: the laws above."""
    assert torch.equal(model(IDS), fresh(IDS))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    move(model)
    assert_base_kept(model, fresh)
    assert_rows(model)
    assert_checkpointing_changes_nothing(model)
    if base != "bfloat16":
        assert_gradients_near_fp64(model)


def assert_plans_on_meta(method, model):
    """The plan needs shapes alone, and on the meta device what is injected stays there."""
    shapes = copy.deepcopy(model).to("meta")
    assert method.plan(shapes) == method.plan(model)
    minift.apply(shapes, method)
    assert all(p.is_meta for p in trainable(shapes).values())
