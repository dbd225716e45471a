"""Combining adapters in a model: what comes of the sources, files, patterns, tied ends, refusals."""

import pytest
import torch
from conftest import tiny_llama
from deltas import CLOSE, deltas, dense_sum, snapshot, unchanged, with_adapters
from torch import nn

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.methods.lora import LoRA

IDS = torch.arange(20).view(2, 10) % 97


def limit(logits):
    """2 blocks of 7 products in a row, sums of at most 97 terms, each rounded, against the largest logit."""
    return 2 * 7 * 97 * torch.finfo(logits.dtype).eps * logits.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_computes_what_the_active_sources_did(dtype):
    """With weight 1 and the sources on, the combination gives the same logits, up to the order of sums."""
    model = with_adapters(*"ab", dtype=dtype)
    want = model(IDS)
    minift.combine(model, {"a": 1, "b": 1}, "sum")
    torch.testing.assert_close(model(IDS), want, rtol=0, atol=limit(want))


def test_the_sources_keep_everything_and_the_new_one_is_an_ordinary_adapter(tmp_path):
    model = with_adapters(*"ab", dtype=torch.float32)
    before, with_both = snapshot(model)[0], model(IDS)
    with model.adapters.disable():
        base = model(IDS)
    minift.combine(model, {"a": 0.5, "b": 2.0}, "sum")
    after = snapshot(model)[0]
    for name, (tensor, _) in before.items():
        assert torch.equal(tensor, after[name][0])
    assert {name for name, (_, grad) in after.items() if grad} == after.keys() - before.keys()
    combined = model(IDS)
    model.adapters.switch("a", "b")
    assert torch.equal(model(IDS), with_both)
    model.adapters.switch()
    assert torch.equal(model(IDS), base)
    minift.save_adapter(model, tmp_path, "sum")
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), combined)
    minift.merge(fresh)
    # merged weights are rounded once more than the branch, with sums in another order: as above, in fp32
    torch.testing.assert_close(fresh(IDS), combined, rtol=0, atol=limit(combined))


def test_patterns_say_where_layers_differ_and_plan_the_same_on_a_fresh_model():
    model = with_adapters(*"abc", dtype=torch.float32)
    minift.combine(model, {"a": 1, "b": 1, "c": 1}, "sum")
    adapter = model.adapters["sum"]
    again = adapter.method.plan(tiny_llama())
    assert again.sites == adapter.plan.sites and len({site.r for site in again.sites}) == 3
    for site in again.sites:
        part = adapter.modules[site.path]
        assert (site.r, site.scaling) == (part.r, part.scaling) == (len(part.lora_A), site.scaling)
    assert adapter.plan.trainable == sum(p.numel() for p in trainable(model).values())


def test_adalora_combines_by_its_delta():
    model = tiny_llama(torch.float64)
    minift.apply(model, METHODS["adalora"](r=4, target_r=2, target_modules=["q_proj"]), name="ada")
    for part in model.adapters["ada"].parts:
        part.double()
        nn.init.normal_(part.lora_E)
    minift.combine(model, {"ada": -2.0}, "plain")
    want, got = dense_sum(model, {"ada": -2.0}), deltas(model, "plain")
    for path in want:
        torch.testing.assert_close(got[path], want[path], **CLOSE)


@pytest.mark.parametrize("tied", ["both", "untie"])
def test_embeddings_and_tied_heads_combine(tied):
    model = tiny_llama(torch.float64, tie_word_embeddings=True)
    for name, r in (("a", 2), ("b", 3)):
        minift.apply(model, LoRA(r=r, target_modules=["embed_tokens", "q_proj"], tied=tied), name=name)
        for part in model.adapters[name].parts:
            part.double()
            for p in part.parameters(recurse=False):
                nn.init.normal_(p, std=0.1)
    weights = {"a": 1.5, "b": -0.5}
    want = dense_sum(model, weights)
    for how in ({}, {"how": "svd", "r": 5}):
        minift.combine(model, weights, how.get("how", "cat"), **how)
        got = deltas(model, how.get("how", "cat"))
        assert got.keys() == want.keys() and len(want) == 3 + (tied == "both")
        for path in want:
            torch.testing.assert_close(got[path], want[path], **CLOSE)
    minift.apply(
        model,
        LoRA(r=2, target_modules=["embed_tokens"], tied={"both": "untie", "untie": "both"}[tied]),
        name="c",
    )
    with pytest.raises(ValueError, match="do not combine: one adapts embedding and head as one weight"):
        minift.combine(model, {"a": 1, "c": 1}, "mixed")


REASONS = {
    "dora": "'x' is dora and has no low-rank delta to combine: what it adds to a weight is no product B A",
    "ia3": "'x' is ia3 and has no low-rank delta to combine: what it adds to a weight is no product B A",
    "prompt_tuning": "virtual tokens change no weight",
    "prefix_tuning": "virtual tokens change no weight",
    "bottleneck": "its branch is not linear",
    "selective": "it trains whole parameters",
    "ln_tuning": "it trains whole parameters",
    "full": "changed the base weights themselves",
}


@pytest.mark.parametrize("kind", REASONS)
def test_adapters_without_a_low_rank_delta_are_refused_by_name(kind):
    model = tiny_llama()
    minift.apply(model, METHODS[kind](), name="x")
    minift.apply(model, LoRA(), name="y")
    before = snapshot(model)
    with pytest.raises(ValueError, match=REASONS[kind]):
        minift.combine(model, {"y": 1.0, "x": 1.0}, "z")
    unchanged(model, before)


def test_modules_to_save_are_refused():
    model = tiny_llama()
    minift.apply(model, LoRA(modules_to_save=["lm_head"]), name="x")
    with pytest.raises(ValueError, match="'x' is lora .* it trains whole parameters"):
        minift.combine(model, {"x": 1.0}, "z")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": {}}, r"weights is \{\}; it is a dict"),
        ({"weights": ["a"]}, r"weights is \['a'\]"),
        ({"weights": {"x": 1.0}}, "no adapter named 'x'; resident: \\['a', 'b'\\]"),
        ({"weights": {"a": float("nan")}}, "the weight of 'a' is nan"),
        ({"weights": {"a": True}}, "the weight of 'a' is True"),
        ({"name": "b"}, "named 'b' is resident already"),
        ({"name": "a.b"}, "may hold letters"),
        ({"name": "lora"}, "is the key of a method"),
        ({"how": "mean"}, "how is 'mean'; it is one of cat, svd, ties, dare"),
        ({"how": "svd"}, "combining by svd needs r"),
        ({"how": "ties", "density": 0.2}, "combining by ties needs r and density; r is missing"),
        ({"how": "ties", "r": 2}, "combining by ties needs r and density; density is missing"),
        ({"how": "dare", "r": 2}, "combining by dare needs r and p; p is missing"),
        ({"r": 2}, "combining by cat uses no r"),
        ({"how": "svd", "r": 2, "p": 0.5}, "combining by svd uses no p"),
        ({"how": "svd", "r": 0}, "r is 0"),
        ({"how": "svd", "r": 2.0}, "r is 2.0"),
        ({"how": "ties", "r": 2, "density": 0.0}, "density is 0.0"),
        ({"how": "dare", "r": 2, "p": 1.0}, "p is 1.0"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(changes, message):
    model = with_adapters(*"ab", dtype=torch.float32)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        minift.combine(**{"model": model, "weights": {"a": 1.0, "b": 1.0}, "name": "z", **changes})
    unchanged(model, before)


def test_ranks_that_add_up_too_high_and_numbers_that_are_not_finite_are_refused():
    model = tiny_llama()
    for name in ("x", "y"):
        minift.apply(model, LoRA(r=9, target_modules=["v_proj"]), name=name)
    with pytest.raises(ValueError, match=r"v_proj add up to 18, above its smaller side \(16 x 32\)"):
        minift.combine(model, {"x": 1.0, "y": 1.0}, "z")
    errors = minift.combine(model, {"x": 1.0, "y": 1.0}, "z", how="svd", r=16)
    assert max(errors.values()) <= 1e-12
    next(iter(model.adapters["x"].parts)).lora_B.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="v_proj is not finite; nothing was changed"):
        minift.combine(model, {"x": 1.0}, "w")
    assert list(model.adapters) == ["x", "y", "z"]
