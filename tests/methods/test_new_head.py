"""A head that the checkpoint did not have trains with every method, and the plan says so."""

import pytest
import torch
from bases import nudge
from conftest import tiny_llama

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.methods.trained import NEW_HEAD

IDS = torch.arange(24).view(2, 12) % 97


@pytest.fixture
def folder(tmp_path):
    minift.save_model(tiny_llama(tie_word_embeddings=True), tmp_path / "lm")
    return tmp_path / "lm"


def classifier(folder, seed=0):
    return minift.load_model(folder, head="sequence_classification", num_labels=3, seed=seed)


# selective means the head by its own rules, full means everything
BY_ITSELF = ("selective", "full")
METHOD_NAMES = [name for name in METHODS if name != "bitfit"]  # which refuses a model without biases


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_new_head_is_in_the_plan_of_every_method(name, folder):
    model = classifier(folder)
    plan = minift.apply(model, METHODS[name]())
    rows = [site for site in plan.head if site.rule == NEW_HEAD]
    assert [s.path for s in rows] == ([] if name in BY_ITSELF else ["score.weight"])
    assert plan.trainable == sum(p.numel() for p in trainable(model).values())
    if name not in BY_ITSELF:
        assert plan.trainable == plan.method.count(plan) + 3 * 32
        assert "score.weight" in plan.table() and NEW_HEAD in plan.table()
    assert all(p.dtype == torch.float32 for p in trainable(model).values())


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_new_head_gets_a_gradient_and_the_base_keeps_its_bits(name, folder):
    model = classifier(folder)
    with torch.no_grad():  # where no gradient is recorded, other code runs
        before = model(IDS)
    minift.apply(model, METHODS[name]())
    model(IDS).square().sum().backward()
    gradients = [p.grad for n, p in trainable(model).items() if "score" in n]
    assert len(gradients) == 1 and gradients[0].abs().max() > 0
    nudge(model)
    with torch.no_grad():
        assert not torch.equal(model(IDS), before)
    if name != "full":
        with model.adapters.disable(), torch.no_grad():
            if name != "qlora":
                assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("name", [n for n in METHOD_NAMES if n not in ("full", "qlora")])
def test_the_head_travels_in_the_adapter_file(name, folder, tmp_path):
    model = classifier(folder)
    minift.apply(model, METHODS[name]())
    nudge(model)
    minift.save_adapter(model, tmp_path / "a")
    fresh = classifier(folder, seed=5)  # another start of the head: the file has the trained one
    minift.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(IDS), model(IDS))
    minift.save_adapter(fresh, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_merging_folds_the_head_in_and_it_can_be_saved(folder, tmp_path):
    model = classifier(folder)
    minift.apply(model, minift.LoRA(target_modules=["q_proj"]))
    nudge(model)
    expected = model(IDS)
    minift.merge(model)
    # merged and apart differ by the rounding of W + B A: a few hundred roundings of fp32
    assert (model(IDS) - expected).abs().max() < 300 * 2.0**-24 * expected.abs().max()
    minift.save_model(model, tmp_path / "merged")
    assert torch.equal(minift.load_model(tmp_path / "merged")(IDS), model(IDS))


def test_quantizing_leaves_a_new_head_dense(folder):
    model = minift.load_model(folder, head="sequence_classification", num_labels=3, quantize="nf4")
    assert isinstance(model.head, torch.nn.Linear)
    assert minift.apply(model, minift.QLoRA()).head[0].path == "score.weight"


def test_an_adapter_without_the_head_is_refused(folder, tmp_path):
    plain = minift.load_model(folder, head="none")
    minift.apply(plain, minift.LoRA())
    minift.save_adapter(plain, tmp_path / "a")
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\), first base_model.model.score.weight"):
        minift.load_adapter(classifier(folder), tmp_path / "a", check_base=False)


def test_a_head_that_is_not_new_here_is_refused_by_methods_that_cannot_hold_it(folder, tmp_path):
    model = classifier(folder)
    minift.save_model(model, tmp_path / "whole")
    minift.apply(model, minift.IA3())
    minift.save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="trained score, a head that its base did not have"):
        minift.load_adapter(minift.load_model(tmp_path / "whole"), tmp_path / "a", check_base=False)


def test_rules_that_mean_a_new_head_are_refused(folder):
    with pytest.raises(ValueError, match="mean score, which is new and trains as a whole"):
        minift.apply(classifier(folder), minift.LoRA(r=2, target_modules=["q_proj", "score"]))


def test_of_two_adapters_each_has_its_own_head(folder):
    """What works is the head of the adapter that works, also in rows of a batch and for gradients."""
    model, alone = classifier(folder), {}
    for name in "ab":
        minift.apply(model, minift.LoRA(), name)
        nudge(model)
    for name in "ab":
        model.adapters.switch(name)
        part = model.adapters[name].modules["score"]
        with torch.no_grad():
            hidden = model.backbone(IDS)[:, -1]  # (B, D)
            alone[name] = model(IDS)
        torch.testing.assert_close(alone[name], hidden @ part.weight.T)
    assert not torch.equal(alone["a"], alone["b"])
    with torch.no_grad(), model.adapters.rows(["a", "b"]):
        mixed = model(IDS)
    # a row of a mixed batch is summed in another batch: a few hundred roundings of fp32
    for row, name in enumerate("ab"):
        assert (mixed[row] - alone[name][row]).abs().max() < 300 * 2.0**-24 * alone[name].abs().max()
    model.adapters.switch("b")
    model.adapters.train("b")
    model(IDS).square().sum().backward()
    assert model.adapters["b"].modules["score"].weight.grad.abs().max() > 0


def test_a_quantized_new_head_is_refused(folder):
    model = classifier(folder)
    minift.quantize_model(model, "nf4", 32, only=["score"])
    with pytest.raises(ValueError, match="score is new and trains, and it is quantized"):
        minift.apply(model, minift.LoRA())
