"""Selective fine-tuning against a dense model that holds the trained numbers."""

import copy

import laws
import pytest
import torch
from conftest import tiny_llama
from laws import BASES, IDS, base_model, leaves, moved
from mutants import survives
from torch import nn
from torch.func import functional_call

import minift
from minift.methods import selective, trained
from minift.methods.base import trainable
from minift.methods.selective import Selective
from minift.models.interface import parameter_count

D, V, Q, KV, FF = 32, 97, 32, 16, 48  # of the tiny model: 4 heads of 8, 2 of them for keys and values
BLOCK = D * Q + 2 * D * KV + Q * D + 3 * D * FF + 2 * D
HEAD = V * D


TIE = {"tie_word_embeddings": True}
# fields, config, the trained names by hand where they are few, their number
CASES = [
    ({}, {}, ["lm_head.weight"], HEAD),
    ({"last_blocks": 1, "head": False}, {}, None, BLOCK),
    ({"last_blocks": 2, "modules": ("model.norm", "embed_tokens")}, {}, None, 2 * BLOCK + 2 * HEAD + D),
    ({"modules": "*.0.mlp.*_proj", "head": False}, {}, None, 3 * D * FF),
    ({"tied": "both"}, TIE, ["model.embed_tokens.weight"], HEAD),
    ({"tied": "untie"}, TIE, ["lm_head.weight"], HEAD),
    ({"modules": "embed_tokens", "head": False, "tied": "untie"}, TIE, ["model.embed_tokens.weight"], HEAD),
    ({"modules": "embed_tokens", "tied": "untie"}, TIE, None, 2 * HEAD),
]


def check(module, cases=CASES):
    for fields, config, names, count in cases:
        fresh = base_model(**config)
        model = moved(base_model(**config), module.Selective(**fields))
        plan = model.adapters["default"].plan
        laws.assert_counts(model, count)
        assert names is None or list(trainable(model)) == names
        if fields.get("last_blocks") == 1:
            assert all(name.startswith("model.layers.1.") for name in trainable(model))
        bare, weights = fresh, leaves(model)
        if fields.get("tied") == "untie":  # the model of the same numbers with two matrices
            bare = base_model()
            bare.lm_head.weight.data.copy_(fresh.lm_head.weight)
            assert plan.total == parameter_count(bare)
        laws.assert_dense(model, bare, weights)
        laws.assert_base_kept(model, fresh)
        laws.assert_rows(model)
        if count == 2 * HEAD:
            continue  # its merge is a test of its own
        minift.merge(model)
        assert torch.equal(model(IDS), functional_call(bare, weights, (IDS,)))
        assert parameter_count(model) == plan.total
        tied = bool(config) and fields["tied"] == "both"
        assert model.tied == model.config.tie_word_embeddings == tied


def check_parts(module):
    """`check`, with the parts of another copy of trained.py."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plan_trained", "inject_trained"):
            patch.setattr(selective, name, getattr(module, name))
        check(selective)


def test_outputs_gradients_counts_and_merges_are_those_of_the_dense_model():
    check(selective)
    check_parts(trained)


def test_two_untied_ends_merge_into_two_weights():
    model = moved(base_model(**TIE), Selective(modules="embed_tokens", tied="untie"))
    want = model(IDS)
    minift.merge(model)
    assert torch.equal(model(IDS), want) and not model.tied and not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "old, new",
    [
        (".to(torch.float32, copy=True)", ""),
        ("if not self.active:", "if False:"),
        ("functional_call(innermost(self), self.own(), arguments)", "self.base(*arguments)"),
        ("(adapted, self.base(*arguments))", "(self.base(*arguments), adapted)"),
        ("adapted if self.rows is None else", "adapted if True else"),
        (".to(t) if name in self.names else t", ".to(t) * (1 + 2**-40) if name in self.names else t"),
        ("if name in self.names else t for", "if name not in self.names else t for"),
        ("for site in own if site.replaces)", "for site in own)"),
        ("replace(own[-1], replaces=False)", "own[-1]"),
        ("shared[name] if name in shared else nn", "nn"),
        ("(*rest, *own[:-1], ", "(*rest, "),
        ('path != root and not path.startswith(root + ".")', "path != root"),
        ("if site.tied_to\n", "if False\n"),
    ],
)
def test_mutants_of_the_parts_are_noticed(old, new):
    assert not survives(check_parts, trained, old, new)


@pytest.mark.parametrize(
    "old, new",
    [
        (" for site in plan.sites if not site.tied_to)", " for site in plan.sites)"),
        ("range(blocks - self.last_blocks, blocks)", "range(self.last_blocks)"),
        ("if self.head else []", "if not self.head else []"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, selective, old, new)


def test_the_gradient_of_a_tied_weight_is_the_sum_of_both_uses():
    tied = moved(base_model(**TIE), Selective(tied="both"))
    bare, weight = base_model(), tied.adapters["default"].modules["lm_head"].weight
    assert weight is tied.adapters["default"].modules["model.embed_tokens"].weight
    uses = {name: weight.detach().clone().requires_grad_() for name in ("model.embed_tokens", "lm_head")}
    logits = functional_call(bare, {f"{name}.weight": w for name, w in uses.items()}, (IDS,))
    as_input, as_head = torch.autograd.grad(laws.loss(logits), uses.values())
    assert as_input.abs().max() > 0.1 and as_head.abs().max() > 0.1
    laws.assert_close(laws.gradients(tied)["model.embed_tokens.weight"], as_input + as_head)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fields, config, names, count", [CASES[0], *CASES[2:7]], ids=lambda v: "")
def test_starts_as_the_base_keeps_its_bits_and_merges_exactly(base, fields, config, names, count):
    fresh, model = base_model(base, **config), base_model(base, **config)
    if base == "nf4" and ("last_blocks" in fields or "mlp" in str(fields.get("modules"))):
        with pytest.raises(ValueError, match="codes have no gradient"):
            minift.apply(model, Selective(**fields))
        return
    minift.apply(model, Selective(**fields))
    laws.assert_starts_as_the_base_and_trains(model, fresh, base)
    laws.assert_merges_and_comes_back(model, fresh)
    assert model.config.tie_word_embeddings == bool(config)  # unmerged: as before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_within_the_bound_of_fp64(dtype):
    """dW = dy^T x over n rows: 2 gamma_n |dy|^T |x| in fp32, and one rounding u to the base's dtype."""
    made, n = trained.Trained(nn.Linear(24, 16, dtype=dtype), ["weight", "bias"]), 40
    with torch.no_grad():
        made.weight.add_(0.1 * torch.randn_like(made.weight))
    x, dy = torch.randn(4, n // 4, 24).to(dtype), torch.randn(4, n // 4, 16).to(dtype)
    y = made(x)
    y.backward(dy)
    dense = copy.deepcopy(made.base)
    dense.weight.data.copy_(made.weight)  # rounded to the base's dtype
    assert torch.equal(y, dense(x)) and made.weight.grad.dtype == torch.float32
    rows, out = x.double().view(n, 24), dy.double().view(n, 16)
    u, gamma = 0.0 if dtype == torch.float32 else 2.0**-8, n * 2.0**-24
    ones = torch.ones(n, 1, dtype=torch.float64)
    for got, b in ((made.weight.grad, rows), (made.bias.grad[:, None], ones)):
        limit = 2 * gamma * (out.T.abs() @ b.abs()) + u * (out.T @ b).abs()
        assert ((got.double() - out.T @ b).abs() <= limit).all()


def test_a_step_too_small_for_bf16_is_kept_in_fp32():
    model = tiny_llama(torch.bfloat16)
    minift.apply(model, Selective())
    before, made = model(IDS), model.adapters["default"].modules["lm_head"]
    with torch.no_grad():
        for _ in range(64):
            made.weight.mul_(1 + 2**-12)
    assert not torch.equal(model(IDS), before)  # in bf16, each of the 64 products would have been rounded off


def test_lora_around_a_trained_layer_adds_to_it_and_is_merged_after_it():
    model = moved(base_model(), Selective(last_blocks=1))
    moved(model, minift.LoRA(r=2, target_modules=("q_proj", "lm_head")), name="low")
    bare, weights = base_model(), {}
    for path, made in model.adapters["default"].modules.items():
        weights |= {f"{path}.{name}": getattr(made, name).detach().clone() for name in made.names}
    for path, made in model.adapters["low"].modules.items():
        W = weights.get(f"{path}.weight", bare.get_submodule(path).weight.detach())
        weights[f"{path}.weight"] = W + made.delta(torch.float64)
    laws.assert_close(model(IDS), functional_call(bare, weights, (IDS,)))
    laws.assert_merge_in_order(model, "default", "low")


def test_a_layer_with_an_adapter_is_refused_and_its_neighbour_trains():
    model = tiny_llama()
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj, which carries an adapter \(LoRALinear\)"
    ):
        minift.apply(model, Selective(last_blocks=1), name="other")
    minift.apply(model, Selective(modules="mlp"), name="other")  # beside it is well
    model = tiny_llama(**TIE)
    minift.apply(model, minift.LoRA(r=2, target_modules=("embed_tokens",), tied="untie"))
    with pytest.raises(ValueError, match=r"embed_tokens, which carries an adapter \(LoRAEmbedding\)"):
        minift.apply(model, Selective(tied="both"), name="other")


def test_the_state_names_each_parameter_and_both_ends_of_a_tie_and_a_removed_adapter_leaves_the_bare_model():
    fresh = tiny_llama(**TIE)
    model = moved(copy.deepcopy(fresh), Selective(last_blocks=1, tied="both"))
    stored = [f"{p}.{k}" for p, made in model.adapters["default"].modules.items() for k in made.state()]
    assert sorted(stored) == sorted([*trainable(model), "lm_head.weight"])
    model.adapters.remove("default")
    assert torch.equal(model(IDS), fresh(IDS)) and list(model.state_dict()) == list(fresh.state_dict())


def test_quantized_layers_are_refused_by_path_and_the_dense_ones_train():
    model = base_model("nf4")
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.q_proj, whose nf4 codes have no gradient"
    ):
        minift.apply(model, Selective(last_blocks=1))
    assert not model.adapters
    assert Selective(modules=("*norm",)).plan(model).trainable == HEAD + 5 * D


def test_the_tied_model_asks_what_is_meant():
    model = tiny_llama(**TIE)
    with pytest.raises(ValueError, match="lm_head.weight and model.embed_tokens.weight are one weight"):
        minift.apply(model, Selective())
    assert Selective(last_blocks=1, head=False).plan(model).trainable == BLOCK


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"last_blocks": -1}, "last_blocks is -1; it is a whole number"),
        ({"last_blocks": True}, "last_blocks is True"),
        ({"last_blocks": 1.0}, "last_blocks is 1.0"),
        ({"tied": "maybe"}, "tied is 'maybe'; it is one of refuse, both, untie"),
        ({"head": "no"}, "head is 'no'; it is True or False"),
        ({"head": False}, "nothing would train"),
        ({"last_blocks": 3}, "last_blocks is 3; the model has 2 blocks"),
        ({"modules": ("q_porj",)}, r"\['q_porj'\] match no module; nearest: \['q_proj'"),
        ({"modules": ("slots",)}, r"\['slots'\] match no module"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Selective(**fields).plan(tiny_llama())


def test_a_module_without_parameters_is_refused():
    model = tiny_llama()
    model.model.layers[0].mlp.act = nn.SiLU()
    with pytest.raises(ValueError, match=r"\['act'\] mean modules without parameters"):
        Selective(modules=("act",)).plan(model)
