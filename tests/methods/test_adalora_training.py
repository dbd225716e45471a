"""AdaLoRA in a model: a run that spends its budget, its checkpoints, its plan and its refusals."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama

import minift
from minift.methods.adalora import AdaLoRA, triplets
from minift.methods.base import buffers, trainable
from minift.models.llama import Llama, LlamaConfig
from minift.models.skeleton import shapes_only
from minift.training.checkpoint import load_checkpoint, save_checkpoint

IDS = torch.arange(20).view(2, 10) % 97
METHOD = AdaLoRA(r=6, target_r=2, tinit=5, tfinal=8, deltaT=3, target_modules=["q_proj", "v_proj"])
TOTAL = 30


def session():
    model = tiny_llama()
    minift.apply(model, METHOD)
    parameters = trainable(model)
    return model, parameters, torch.optim.AdamW(parameters.values(), lr=0.02)


def steps(model, optimizer, first, last):
    """Yield after each step of training on one text; its loss."""
    for step in range(first, last):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        (loss + METHOD.extra_loss(model, "default")).backward()
        METHOD.take_step(model, "default", optimizer, step, TOTAL)
        yield step + 1, loss.item()


def test_training_spends_the_budget_and_what_is_pruned_last_stays_zero():
    model, _, optimizer = session()
    layers = triplets(model, "default")
    losses, dead = [], None
    for done, loss in steps(model, optimizer, 0, TOTAL):
        losses.append(loss)
        kept = sum(layer.kept.sum().item() for layer in layers)
        nonzero = sum((layer.lora_E != 0).sum().item() for layer in layers)
        if done <= 5:
            assert kept == nonzero == 24
        elif done % 3 == 0 or done >= 22:
            assert kept == nonzero == METHOD.budget(done, TOTAL, 4)
        else:
            assert kept == METHOD.budget(done // 3 * 3, TOTAL, 4) <= nonzero  # the pruned may come back
        if done == 22:
            dead = [layer.kept.clone() for layer in layers]
        if dead:
            assert all(torch.equal(layer.kept, mask) for layer, mask in zip(layers, dead, strict=True))
    assert kept == nonzero == 2 * 4 and losses[-1] < 0.7 * losses[0]
    assert len({layer.kept.sum().item() for layer in layers}) > 1  # the layers share it unevenly


def test_a_checkpoint_restores_the_averages_and_continues_to_the_bit(tmp_path):
    model, parameters, optimizer = session()
    list(steps(model, optimizer, 0, 13))
    saved = save_checkpoint(tmp_path, 13, parameters, optimizer, {}, buffers(model))
    fresh, fresh_parameters, fresh_optimizer = session()
    assert load_checkpoint(saved, fresh_parameters, fresh_optimizer, {}, buffers(fresh)) == 13
    assert {"kept", "sensitivity_E", "uncertainty_B"} <= {n.rpartition(".")[2] for n in buffers(fresh)}
    for last in (13, TOTAL):
        list(steps(model, optimizer, 13, last))
        list(steps(fresh, fresh_optimizer, 13, last))
        for state, again in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
            assert torch.equal(state, again)


def test_a_run_without_room_to_prune_says_so_before_it_changes_anything():
    model, parameters, optimizer = session()
    before = [p.detach().clone() for p in parameters.values()]
    model(IDS).square().mean().backward()
    with pytest.raises(ValueError, match="tinit is 5 and tfinal 8, which leaves none of 13 steps for"):
        METHOD.take_step(model, "default", optimizer, 0, 13)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))


def test_llama_3_8b_trains_5_112_576():
    with shapes_only():
        model = Llama(LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128))
    plan = minift.apply(model, AdaLoRA(r=12))
    assert plan.trainable == 5_112_576 == sum(p.numel() for p in trainable(model).values())
    assert all(t.is_meta for t in buffers(model).values())


def test_saved_modules_and_the_ratio_of_learning_rates():
    model = tiny_llama()
    method = AdaLoRA(r=4, target_r=2, lr_ratio=3.0, modules_to_save=["lm_head"], orth_reg_weight=0)
    plan = minift.apply(model, method)
    assert plan.trainable == 2 * 4 * (32 + 32 + 1 + 32 + 16 + 1) + 97 * 32
    assert plan.trainable == sum(p.numel() for p in trainable(model).values())
    first, second = method.param_groups(trainable(model))
    assert second["lr_ratio"] == 3 and len(second["params"]) == 4 and len(first["params"]) == 9
    assert method.extra_loss(model, "default") is None and len(triplets(model, "default")) == 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rslora": True}, "rslora is not for adalora: all layers start at r"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not for adalora"),
        ({"alpha_pattern": {"q_proj": 2.0}}, "alpha_pattern is not for adalora"),
        ({"init": "pissa"}, "init is 'pissa'; it is one of normal"),
        ({"target_r": 0}, "target_r is 0; it is a whole number of at least 1"),
        ({"target_r": 13}, "target_r is 13, above r, 12; the budget only shrinks"),
        ({"tinit": -1}, "tinit is -1; it is a whole number of at least 0"),
        ({"tfinal": 1.5}, "tfinal is 1.5; it is a whole number"),
        ({"deltaT": 0}, "deltaT is 0; it is a whole number of at least 1"),
        ({"beta1": 1.0}, "beta1 is 1.0; it is a number above 0 and below 1"),
        ({"beta2": 0}, "beta2 is 0; it is a number above 0 and below 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight is -0.1; it is a finite number of at least 0"),
        ({"orth_reg_weight": float("inf")}, "orth_reg_weight is inf"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**fields)


def test_an_embedding_is_refused_by_name():
    with pytest.raises(ValueError, match="adalora is for linear layers, and model.embed_tokens is none"):
        AdaLoRA(target_modules=["embed_tokens", "q_proj"]).plan(tiny_llama())
