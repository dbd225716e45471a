"""merge and unmerge: the exact bits come back, partial merges keep the rest, errors are measured."""

import copy

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn

import minift
from minift.methods import merging
from minift.methods.base import trainable
from minift.models.interface import dense_weight
from minift.models.wrappers import Wrapper, bare_modules, base_parameters, chain, get_module, innermost

IDS = torch.arange(24).view(3, 8) % 97
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(names="ab", dtype=torch.bfloat16, quantize=None, **fields):
    model = tiny_llama(dtype)
    if quantize:
        minift.quantize_model(model, quantize)
    for i, name in enumerate(names):
        minift.apply(model, minift.LoRA(r=2 + i, target_modules=TARGETS, **fields), name=name)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in trainable(model).values():
                p.copy_(0.2 * torch.randn_like(p))
    return model


def bits(model):
    return {name: p.detach().clone() for name, p in base_parameters(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def order(model, name):
    """The names of the adapters at q_proj, outermost first."""
    wrappers = chain(get_module(model, "model.layers.0.self_attn.q_proj"))
    return [n for w in wrappers for n, a in model.adapters.items() if w in a.parts]


@given(
    st.permutations("abc"),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([None, "nf4", "int8"]),
)
def test_unmerge_restores_the_exact_bits_and_the_order_of_wrappers(names, dtype, quantize):
    model = adapted("abc", dtype, quantize)
    before, logits, wrapped = bits(model), model(IDS), order(model, "a")
    for name in names:
        minift.merge(model, name, keep=True)
        assert name in model.adapters.merged()
    assert not any(isinstance(m, Wrapper) for m in model.modules())
    for name in reversed(names):
        minift.unmerge(model, name)
    assert same(bits(model), before) and torch.equal(model(IDS), logits) and order(model, "a") == wrapped
    assert not model.kept and len(model.quantization) == (1 if quantize else 0)


def check(module):
    """Partial merges in both orders and their undoing, in fp64."""
    for first, second in ("ab", "ba"):
        model = adapted(dtype=torch.float64)
        before, logits = bits(model), model(IDS)
        errors = module.merge(model, first, keep=True)
        assert list(model.adapters) == [second] and set(errors) == set(model.kept[first].layers)
        # fp64 sums of at most 48 products in another order, values of order 10
        assert (model(IDS) - logits).abs().max() <= 1e-11
        module.unmerge(model, first)
        assert same(bits(model), before) and torch.equal(model(IDS), logits)
    model = adapted("abc", torch.float64, dropout=0.5)
    wrapped, logits = order(model, "a"), model(IDS)
    model.train()
    module.merge(model, "b", keep=True)
    model.eval()
    module.unmerge(model, "b")
    assert order(model, "a") == wrapped == ["c", "b", "a"] and list(model.adapters) == ["a", "b", "c"]
    assert torch.equal(model(IDS), logits)
    assert all(n.endswith(("lora_A", "lora_B")) for n in trainable(model))
    assert {id(p) for p in trainable(model).values()} == {
        id(p) for part in model.adapters["c"].parts for p in part.parameters(recurse=False)
    }
    model = adapted(dtype=torch.float32)
    layer = innermost(get_module(model, "model.layers.0.self_attn.q_proj"))
    layer.bias = nn.Parameter(torch.ones(32))  # merged without an error of its own
    exact = {}
    for path, part in model.adapters["a"].modules.items():
        exact[path] = (
            dense_weight(innermost(part)).double()
            + part.scaling * part.lora_B.double() @ part.lora_A.double()
        )
    errors = module.merge(model, "a")
    for path, error in errors.items():
        got = innermost(get_module(model, path)).weight.double()
        # one rounding of fp32 for the product's r = 2 terms, scaling and sum each
        assert error == (got - exact[path]).abs().max().item() <= 5 * 2**-24 * exact[path].abs().max()
        assert error > 0
    with pytest.raises(ValueError, match="no merged adapter 'a' is kept"):
        module.unmerge(model, "a")
    check_ties(module)


def check_ties(module):
    """What is merged into the ends of a tied model, and its undoing."""
    tied = tiny_llama(torch.float32, tie_word_embeddings=True)
    for how in ("both", "untie"):
        model = copy.deepcopy(tied)
        minift.apply(model, minift.Selective(tied=how))
        with torch.no_grad():
            for p in trainable(model).values():
                p.mul_(1.5)
        logits = model(IDS)
        module.merge(model, keep=True)
        assert torch.equal(model(IDS), logits)
        assert model.config.tie_word_embeddings == (how == "both") == model.tied
        module.unmerge(model, "default")
        assert torch.equal(model(IDS), logits) and model.config == tied.config
        model.adapters.remove("default")
        assert model.tied and torch.equal(model(IDS), tied(IDS))


def test_partial_merges_keep_the_rest_and_report_their_rounding():
    check(merging)


@pytest.mark.parametrize(
    "old, new",
    [
        ("exact = wrapper.fold({n: t.double()", "exact = wrapper.fold({n: t.float()"),
        ("given = {n: t.to(wide)", "given = {n: t.bfloat16()"),
        ("        unwrap(model, path, wrapper)\n", ""),
        ("        replace_base(model, path, layer)\n", ""),
        ("        replace_base(model, path, old)\n", ""),
        ("    _tie(model)\n    kept.rows", "    kept.rows"),
        ("    _tie(model)\n    recipes", "    recipes"),
        ("tie_word_embeddings=model.tied)", "tie_word_embeddings=True)"),
        ("        model.tie_weights()\n", "        pass\n"),
        ("around[outside] if outside < len(around) else old", "old"),
        ("    if model.config.tie_word_embeddings != model.tied:", "    if False:"),
        ("requires_grad_(not model.adapters)", "requires_grad_(True)"),
        ("resident.insert(kept.position,", "resident.insert(9,"),
        ("wrapper.train(model.training)", "wrapper.train()"),
        ("return layer, max(errors)", "return layer, min(errors)"),
        ("    del model.kept[name]\n", "    model.kept.clear()\n    model.adapters.clear()\n"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, merging, old, new)


def test_unmerging_under_a_later_merge_is_refused():
    model = adapted()
    minift.merge(model, "a", keep=True)
    minift.merge(model, "b", keep=True)
    before = bits(model)
    with pytest.raises(ValueError, match=r"was changed after 'a' was merged; unmerge b first"):
        minift.unmerge(model, "a")
    assert same(bits(model), before)


def test_the_name_of_a_kept_adapter_is_taken():
    model = adapted("a")
    minift.merge(model, "a", keep=True)
    with pytest.raises(ValueError, match="'a' is merged into the weights and kept"):
        minift.apply(model, minift.LoRA(r=2), name="a")


def test_without_keep_nothing_of_the_old_layers_is_held():
    model = adapted("a", torch.float32)
    old = innermost(get_module(model, "model.layers.0.self_attn.q_proj"))
    minift.merge(model, "a")
    assert not model.kept and all(m is not old for m in model.modules())


def test_a_number_that_is_not_finite_is_refused_and_nothing_changes():
    model = adapted("a", torch.float16)
    model.adapters["a"].modules["model.layers.1.mlp.down_proj"].lora_B.data.fill_(1e6)
    before = bits(model)
    with pytest.raises(
        ValueError, match="'a' into model.layers.1.mlp.down_proj gives a weight that is not finite"
    ):
        minift.merge(model)
    assert same(bits(model), before) and "a" in model.adapters
    assert len([m for m in model.modules() if isinstance(m, Wrapper)]) == 6


class Doubling(Wrapper):
    """y = 2 base(x): not additive."""

    def forward(self, x):
        return 2 * self.base(x) if self.active else self.base(x)

    def fold(self, tensors):
        return {name: 2 * t for name, t in tensors.items()}


def test_wrappers_that_do_not_commute_are_merged_from_the_inside():
    model = tiny_llama(torch.float64)
    minift.apply(model, minift.LoRA(r=2, target_modules=["q_proj"]), name="inner")
    for path, module in list(bare_modules(model).items()):
        if path.endswith("q_proj"):
            model.adapters["inner"].modules[path] = outer = Doubling(module.base)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, outer)
    minift.apply(model, minift.LoRA(r=2, target_modules=["q_proj"]), name="outer")
    with torch.no_grad():
        for p in trainable(model).values():
            nn.init.normal_(p)
    logits = model(IDS)
    with pytest.raises(
        ValueError, match="'outer' at model.layers.0.self_attn.q_proj is wrapped around inner"
    ):
        minift.merge(model, "outer")
    assert torch.equal(model(IDS), logits)
    minift.merge(model, "inner")
    minift.merge(model, "outer")
    # fp64 sums of at most 48 products in another order, values of order 10
    assert (model(IDS) - logits).abs().max() <= 1e-11


def test_what_happened_since_must_be_undone_before_unmerging():
    def after(change, message):
        model = adapted("ab", torch.float32)
        minift.merge(model, "a", keep=True)
        change(model)
        logits = model(IDS)
        with pytest.raises(ValueError, match=message):
            minift.unmerge(model, "a")
        assert torch.equal(model(IDS), logits) and "a" in model.kept

    q = "model.layers.0.self_attn.q_proj was changed after 'a' was merged; undo that first"
    after(lambda m: minift.apply(m, minift.LoRA(r=2), name="late"), q)
    after(lambda m: m.adapters.remove("b"), q)
    after(lambda m: (minift.merge(m, "b"), minift.quantize_model(m, only=["q_proj"])), q)
    model = adapted("a", torch.float32)
    minift.merge(model, "a", keep=True)
    with pytest.raises(ValueError, match=r"\['a'\] are merged and kept, .*unmerge them"):
        minift.apply(model, minift.Full())


def test_kept_merges_of_a_tied_model_come_back_in_any_order():
    for first, second in (("a", "h"), ("h", "a")):
        model = tiny_llama(tie_word_embeddings=True)
        minift.apply(model, minift.LoRA(r=2, target_modules=["q_proj"]), name="a")
        minift.apply(model, minift.LoRA(r=2, target_modules=["lm_head"], tied="untie"), name="h")
        for part in (*model.adapters["a"].parts, *model.adapters["h"].parts):
            nn.init.normal_(part.lora_B, std=0.2)
        before = model(IDS)
        minift.merge(model, "h", keep=True)
        assert not model.config.tie_word_embeddings
        minift.merge(model, "a", keep=True)
        minift.unmerge(model, first)
        assert model.tied == model.config.tie_word_embeddings == (first == "h")
        minift.unmerge(model, second)
        assert torch.equal(model(IDS), before) and model.config.tie_word_embeddings


def test_on_the_original_weights_two_adapters_add_up():
    original = tiny_llama(hidden_size=64, intermediate_size=96)
    model = copy.deepcopy(original)
    minift.quantize_model(model, only=["q_proj", "v_proj"])
    want = {}
    for name in "ab":
        minift.apply(model, minift.LoRA(r=2, target_modules=["q_proj"]), name=name)
        for path, part in model.adapters[name].modules.items():
            nn.init.normal_(part.lora_B, std=0.2)
            want[path] = want.get(path, 0) + part.delta()
    for name in "ab":
        minift.merge(model, name, mode="original", original=original)
    for path, delta in want.items():
        exact = get_module(original, path).weight + delta
        # two sums of fp32, each rounded once
        assert (get_module(model, path).weight - exact).abs().max() <= 3 * 2**-24 * exact.abs().max()


def test_an_adapter_that_rests_is_not_merged():
    model = adapted()
    model.adapters.switch("a")
    logits = model(IDS)
    with pytest.raises(ValueError, match="'b' is switched off, or works for some rows"):
        minift.merge(model, "b")
    with model.adapters.rows(["a", None, "a"]), pytest.raises(ValueError, match="works for some rows"):
        minift.merge(model, "a")
    assert torch.equal(model(IDS), logits)
