"""IA3 against dense weights with rescaled rows and columns."""

import json

import laws
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from laws import BASES, IDS, base_model, leaves, moved
from mutants import survives
from torch import nn

import minift
from minift.methods import ia3
from minift.methods.base import trainable
from minift.methods.ia3 import IA3, IA3Linear
from minift.models.interface import dense_weight
from minift.models.llama import Llama, LlamaConfig
from minift.models.skeleton import shapes_only

KV, FF = 16, 48
K = ["self_attn.k_proj", "self_attn.v_proj"]
# fields, names in a block and the shape of l on disk
CASES = [
    ({}, {**dict.fromkeys(K, (KV, 1)), "mlp.down_proj": (1, FF)}),
    ({"target_modules": ("k_proj", "down_proj")}, {K[0]: (KV, 1), "mlp.down_proj": (1, FF)}),
    ({"feedforward_modules": "none"}, {**dict.fromkeys(K, (KV, 1)), "mlp.down_proj": (32, 1)}),
    ({"target_modules": K, "feedforward_modules": ("v_proj",)}, {K[0]: (KV, 1), K[1]: (1, 32)}),
]


def rescaled(bare):
    """leaves -> dense weights diag(l) W or W diag(l), and l * bias; low-rank leaves are added to them."""

    def build(leaves):
        weights, low = {}, {}
        for name, l in leaves.items():  # noqa: E741
            *path, last = name.replace(".base", "").split(".")
            path = ".".join(path)
            if last != "ia3_l":
                low.setdefault(path, {})[last] = l
                continue
            layer, outside = bare.get_submodule(path), torch.diag(l.flatten())
            W = layer.weight
            weights[f"{path}.weight"] = W @ outside if len(l) == 1 else outside @ W
            if layer.bias is not None:
                weights[f"{path}.bias"] = layer.bias if len(l) == 1 else l.flatten() * layer.bias
        for path, ab in low.items():
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + 8 * ab["lora_B"] @ ab["lora_A"]
        return weights

    return build


def check(module):
    for fields, shapes in CASES:
        fresh = base_model(biases=True)
        model = moved(base_model(biases=True), module.IA3(**fields))
        adapter, count = model.adapters["default"], 2 * sum(max(shape) for shape in shapes.values())
        found = {path: tuple(made.state()["ia3_l"].shape) for path, made in adapter.modules.items()}
        assert found == {f"model.layers.{i}.{path}": shapes[path] for i in (0, 1) for path in shapes}
        laws.assert_counts(model, count)
        assert adapter.plan.added == count
        laws.assert_dense(model, fresh, leaves(model), rescaled(fresh))
        laws.assert_base_kept(model, fresh)
        laws.assert_rows(model)
        laws.assert_merges_and_comes_back(model, fresh, 1e-12)
        start = base_model(biases=True)
        minift.apply(start, module.IA3(**fields))
        assert torch.equal(start(IDS), fresh(IDS))


def test_outputs_gradients_counts_and_merges_are_those_of_the_dense_model():
    check(ia3)


@pytest.mark.parametrize(
    "old, new",
    [
        ("(x * scale).to(x.dtype), x", "x, x"),
        ("(x * scale).to(x.dtype), x", "(x + scale - 1).to(x.dtype), x"),
        ("(y * scale).to(y.dtype), y", "y, (y * scale).to(y.dtype)"),
        ("(y * scale).to(y.dtype), y", "(y * scale.float()).to(y.dtype), y"),
        ("torch.ones(shape", "torch.zeros(shape"),
        ("self.in_features) if feedforward", "self.in_features) if not feedforward"),
        ('tensors["weight"] * scale}', 'tensors["weight"] * scale.flatten()[0]}'),
        ('tensors["weight"] * scale}', 'tensors["weight"] / scale}'),
        ('if "bias" in tensors and not self.feedforward', "if False"),
        ('tensors["bias"] * scale.flatten()', 'tensors["bias"] + scale.flatten() - 1'),
        ("max(site.shape) for", "min(site.shape) for"),
        ("max(site.shape) for", "site.shape[0] for"),
        ("max(shape), str(", "min(shape), str("),
        ('or model.sites["ffn_out"]', 'or model.sites["ffn_in"]'),
        ('*roles["v"], ', ""),
        ("if not self.active:", "if False:"),
        ("site.path in feedforward, next", "site.shape[0] == 1, next"),
        ("site.path in feedforward, next", "site.path not in feedforward, next"),
    ],
)
def test_mutants_are_noticed(old, new):
    same = (
        new == "site.shape[0] == 1, next"
    )  # a mutant that changes nothing survives: the check is not red by chance
    assert survives(check, ia3, old, new) == same


@pytest.mark.parametrize("base", BASES)
def test_starts_as_the_base_keeps_its_bits_and_rows_and_merges(base):
    fresh, model = base_model(base, biases=True), base_model(base, biases=True)
    minift.apply(model, IA3())
    laws.assert_starts_as_the_base_and_trains(model, fresh, base)
    # first order: 2 blocks of 7 products, weight and result of each rounded; in fp32 also 97 terms of its sum
    u = 2 * 2.0**-8 if base == "bfloat16" else 2 * 97 * 2.0**-24
    laws.assert_merges_and_comes_back(model, fresh, 2 * 7 * u)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_zeros_in_l_merge_and_come_back(base):
    """Unmerging by dividing would not bring these rows back."""
    fresh, model = base_model(base, biases=True), base_model(base, biases=True)
    minift.apply(model, IA3())
    with torch.no_grad():
        for p in trainable(model).values():
            p.flatten()[::2] = 0.0
    before = model(IDS)
    minift.merge(model, keep=True)
    down, keys = (model.get_submodule(f"model.layers.1.{path}") for path in ("mlp.down_proj", K[0]))
    assert (down.weight[:, ::2] == 0).all() and (down.weight[:, 1::2] != 0).any()
    assert (keys.weight[::2] == 0).all() and (keys.bias[::2] == 0).all() and (keys.bias[1::2] != 0).all()
    minift.unmerge(model, "default")
    assert torch.equal(model(IDS), before)
    laws.assert_base_kept(model, fresh)


@given(st.sampled_from(BASES), st.booleans(), st.integers(1, 40), st.integers(0, 99))
def test_a_layer_and_its_gradient_are_within_the_bound_of_fp64(base, feedforward, n, seed):
    """Given the base's own product, each number is rounded to fp32 and to the dtype, u; dl sums n rows."""
    torch.manual_seed(seed)
    layer = laws.frozen_linear(base, 64, 24)
    made = IA3Linear(layer, feedforward)
    with torch.no_grad():
        made.ia3_l.add_(0.5 * torch.randn_like(made.ia3_l))
    dtype = layer.bias.dtype
    x, dy = torch.randn(n, 64).to(dtype).requires_grad_(), torch.randn(n, 24).to(dtype)
    y, l = made(x), made.ia3_l.detach().double().flatten()  # noqa: E741
    y.backward(dy)
    u, u32 = 2.0**-8 if dtype == torch.bfloat16 else 0.0, 2.0**-24
    if feedforward:
        inner = (x.detach().double() * l).to(dtype).requires_grad_()  # one rounding where the layer has two
        product = layer(inner)
        [scaled] = torch.autograd.grad(product, inner, dy)
        off = ((u + 2 * u32) * inner.abs().double()) @ dense_weight(layer).double().abs().T
        sums = 2 * 65 * u32 * (inner.abs().double() @ dense_weight(layer).double().abs().T + 1)
        assert ((y - product).abs() <= 2 * (off + sums + u * product.abs())).all()
        terms = scaled.double() * x.detach().double()
        assert torch.equal(x.grad, (scaled * made.ia3_l.flatten()).to(dtype))
    else:
        product = layer(x.detach())
        error = (y.detach().double() - l * product.double()).abs()
        assert (error <= 1.01 * (u + u32) * (l * product.double()).abs()).all()
        terms = dy.double() * product.double()
        scaled = (dy * made.ia3_l.flatten()).to(dtype)
        assert torch.equal(x.grad, torch.autograd.grad(layer(x), x, scaled)[0])
    limit = (2 * n + 2) * u32 * terms.abs().sum(0)
    assert made.ia3_l.grad.dtype == torch.float32
    assert ((made.ia3_l.grad.flatten().double() - terms.sum(0)).abs() <= limit).all()


@pytest.mark.parametrize("feedforward", [False, True])
def test_an_l_near_one_is_not_rounded_to_bf16(feedforward):
    layer = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    nn.init.eye_(layer.weight)
    made, x = IA3Linear(layer, feedforward), torch.linspace(1, 2, 32).to(torch.bfloat16)
    with torch.no_grad():
        made.ia3_l.fill_(1 + 0.45 * 2**-7)  # in bf16: 1
    assert made.ia3_l.to(torch.bfloat16).eq(1).all()
    assert (made(x) > x).sum() > 16


@pytest.mark.parametrize("fields", [{}, {"feedforward_modules": "none"}], ids=["in", "out"])
def test_nested_with_lora_outside_and_inside(fields):
    """Outside: diag(l) W + BA. Inside: diag(l) (W + BA), or with l on the columns."""
    targets = ("k_proj", "down_proj")
    low = minift.LoRA(r=2, alpha=16, target_modules=targets)
    model, bare = moved(base_model(), IA3(target_modules=targets, **fields)), base_model()
    moved(model, low, name="low")
    for made in model.adapters["default"].parts:
        made.ia3_l.requires_grad_()
    laws.assert_dense(model, bare, leaves(model), rescaled(bare))
    laws.assert_merge_in_order(model, "default", "low")

    model, bare = moved(base_model(), low, name="low"), base_model()
    for path, made in model.adapters["low"].modules.items():
        W = bare.get_submodule(path).weight
        W.data = W.data + made.delta(torch.float64)
    moved(model, IA3(target_modules=targets, **fields))
    mine = {name.replace(".base", ""): p for name, p in leaves(model).items()}
    assert mine.keys() == trainable(model).keys()
    laws.assert_dense(model, bare, mine, rescaled(bare))
    laws.assert_rows(model)
    laws.assert_checkpointing_changes_nothing(model)
    laws.assert_merge_in_order(model, "low", "default")


@pytest.mark.parametrize(
    "values, count",
    [((32000, 4096, 11008, 32, 32, 32, 128), 614_400), ((128256, 4096, 14336, 32, 32, 8, 128), 524_288)],
    ids=["Llama-2-7B", "Llama-3-8B"],
)
def test_counts_of_published_models(values, count):
    """Measured with PEFT 0.21; L (2 kv_dim + d_ff)."""
    _, _, d_ff, L, _, kv_heads, head_dim = values
    assert L * (2 * kv_heads * head_dim + d_ff) == count
    with shapes_only():
        shapes = Llama(LlamaConfig(*values))
    assert IA3().plan(shapes).trainable == count
    minift.apply(shapes, IA3())
    assert sum(p.numel() for p in trainable(shapes).values()) == count


def test_the_plan_is_the_same_on_the_meta_device_and_fields_come_from_json():
    model = tiny_llama()
    method = IA3(**json.loads('{"target_modules": ["k_proj"], "feedforward_modules": []}'))
    assert method == IA3(target_modules="k_proj")
    laws.assert_plans_on_meta(method, model)
    assert [site.formula for site in IA3().plan(model).sites[:3]] == ["16", "16", "48"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"target_modules": "k_proj", "feedforward_modules": "down_proj"},
            "feedforward_modules mean model.layers.0.mlp.down_proj, which target_modules do not; name it in",
        ),
        (
            {"target_modules": "*.0.mlp.down_proj", "feedforward_modules": "down_proj"},
            "feedforward_modules mean model.layers.1.mlp.down_proj",
        ),
        ({"feedforward_modules": "dwn_proj"}, r"feedforward_modules \['dwn_proj'\] match no linear layer"),
        (
            {"target_modules": "kproj"},
            r"target_modules \['kproj'\] match no linear layer; nearest: \['k_proj'",
        ),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IA3(**fields).plan(tiny_llama())
