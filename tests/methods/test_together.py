"""Methods beside each other on one model."""

from dataclasses import replace

import pytest
import torch
from bases import CASES, IDS, base_model, method_for, nudge
from conftest import tiny_llama

import minift
from minift.methods.base import trainable


@pytest.fixture(params=[c for c in CASES if c[1] in ("float32", "nf4")], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    name, base = request.param
    return method_for(name, base), base_model(base, name)


def test_it_stands_beside_another_adapter_or_says_why_not(case):
    method, model = case
    if method.name == "qlora" and not model.quantization:
        pytest.skip("quantizes its base, which must be bare")
    minift.apply(model, minift.LoRA(r=2, target_modules=["q_proj", "down_proj"]), name="first")
    nudge(model)
    if method.name == "full":
        with pytest.raises(ValueError, match="merge them first"):
            minift.apply(model, method)
        return
    if method.name == "dora":
        with pytest.raises(ValueError, match="q_proj"):
            minift.apply(model, method)
        method = replace(method, target_modules=("v_proj",))
    if method.name == "bitfit":
        with pytest.raises(ValueError, match="carries an adapter"):
            minift.apply(model, method)
        return
    plan = minift.apply(model, method)
    nudge(model)
    both = model(IDS)
    assert sum(p.numel() for p in trainable(model).values()) == plan.trainable
    model.adapters.switch("first")
    first = model(IDS)
    model.adapters.switch("first", "default")
    assert torch.equal(model(IDS), both) and not torch.equal(both, first)
    model.adapters.remove("default")
    assert torch.equal(model(IDS), first)


def test_what_cannot_be_applied_or_merged_says_so():
    model = tiny_llama()
    with pytest.raises(ValueError, match="merge which adapter"):
        minift.merge(model)
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="'default' is resident"):
        minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="and no dot"):
        minift.apply(model, minift.LoRA(r=2), name="a.b")
    with pytest.raises(ValueError, match="merge them first"):
        minift.apply(model, minift.Full(), name="other")
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        minift.merge(model, "x")
