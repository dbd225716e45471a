"""The plan: nothing is touched before it stands, and what it prints."""

import pytest
from conftest import tiny_llama

import minift


def test_a_plan_that_fails_touches_nothing():
    model = tiny_llama()
    with pytest.raises(ValueError):
        minift.apply(model, minift.LoRA(target_modules=["nothing"]))
    assert not model.adapters and all(p.requires_grad for p in model.parameters())


def test_the_plan_prints_the_table_and_the_known_line():
    plan = minift.LoRA(r=4, alpha=8, layers_to_transform=["0"]).plan(tiny_llama())
    assert "model.layers.0.self_attn.q_proj" in str(plan)
    assert "model.layers.{0-1}.self_attn.v_proj" in str(minift.LoRA(r=4).plan(tiny_llama()))
    assert len(plan.table().split("\n")) == 3
    trained = 4 * (32 + 32) + 4 * (32 + 16)
    share = 100 * trained / plan.total
    assert (
        plan.totals()
        == f"trainable params: {trained} || all params: {plan.total:,} || trainable%: {share:.4f}"
    )
