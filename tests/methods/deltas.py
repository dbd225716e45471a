"""Adapters of every kind of scaling, their dense deltas, and what the tests of both compare with."""

import torch
from conftest import tiny_llama

import minift
from minift.methods.factors import Factors
from minift.methods.lora import LoRA
from minift.models.wrappers import base_parameters

# fp64: an entry of a delta is a sum of at most 16 products, each rounded a few times, and is below 100
CLOSE = {"rtol": 1e-12, "atol": 1e-11}

# what the adapters of these tests cover, and how: all the ways in which scalings and ranks differ
KINDS = {
    "a": LoRA(r=3, alpha=5.0, target_modules=["q_proj", "v_proj"]),
    "b": LoRA(r=2, alpha=3.0, rslora=True, target_modules=["v_proj", "up_proj"]),
    "c": LoRA(
        r=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 1},
        alpha_pattern={"layers.0.self_attn.q_proj": 7.0},
    ),
    "d": LoRA(r=3, alpha=2.0, init="pissa", target_modules=["q_proj"], layers_to_transform=["1"]),
}


def with_adapters(*names, dtype=torch.float64, **config):
    """A tiny model with some of KINDS on it, moved away from their start."""
    model = tiny_llama(dtype, **config)
    for name in names:
        minift.apply(model, KINDS[name], name=name)
        for part in model.adapters[name].parts:
            part.to(dtype)
            with torch.no_grad():
                for p in part.parameters(recurse=False):
                    p.add_(0.3 * torch.randn_like(p))
    return model


def deltas(model, name):
    """Path -> dense delta in fp64, from the wrappers' own `fold` on a weight of zeros."""
    found = {}
    for path, part in model.adapters[name].modules.items():
        shape = next(s.shape for s in model.adapters[name].plan.sites if s.path == path)
        found[path] = part.fold({"weight": torch.zeros(shape, dtype=torch.float64)})["weight"].detach()
    return found


def dense_sum(model, weights):
    total = {}
    for name, w in weights.items():
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, 0) + w * delta
    return total


def some(out=7, fan_in=9, r=4, scaling=1.5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Factors(torch.randn(r, fan_in, dtype=dtype), torch.randn(out, r, dtype=dtype), scaling)


def nearest_of_its_rank(got, error, dense, r):
    S = torch.linalg.svdvals(dense)
    # singular values and the product of the factors are exact to a few units of S[0] times 2^-53; the 16
    # products that make up an entry of `dense` may cancel: 1e-13 covers both, with numbers below 100
    slack = 1e-13 * (100 + S[0].item())
    assert abs(error - S[r:].norm()) <= slack
    assert abs((got - dense).norm() - S[r:].norm()) <= slack
    assert torch.linalg.matrix_rank(got, atol=slack, rtol=0.0) <= r


def snapshot(model):
    """Everything that an error must leave as it was."""
    tensors = {f"base {name}": p for name, p in base_parameters(model).items()}
    for name, adapter in model.adapters.items():
        for path, part in adapter.modules.items():
            tensors |= {f"{name} {path} {n}": p for n, p in part.named_parameters(recurse=False)}
    kept = {name: (p.detach().clone(), p.requires_grad) for name, p in tensors.items()}
    return kept, model.adapters.active(), dict(model.adapters)


def unchanged(model, before):
    tensors, *rest = snapshot(model)
    assert rest == list(before[1:]) and tensors.keys() == before[0].keys()
    for name, (tensor, grad) in tensors.items():
        assert torch.equal(tensor, before[0][name][0]) and grad == before[0][name][1]
