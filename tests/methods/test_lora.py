"""LoRA against its dense reparameterization, W' = W + scaling B A."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn

import minift
from minift.methods import low_rank
from minift.methods.lora import LoRA
from minift.methods.low_rank import LoRALinear, LowRank

IDS = torch.arange(20).view(2, 10) % 97


def layer(fan_in=6, fan_out=5, r=3, scaling=1.5, dtype=torch.float64, dropout=0.0, seed=0, kind=LoRALinear):
    torch.manual_seed(seed)
    made = kind(nn.Linear(fan_in, fan_out, dtype=dtype), r, scaling, dropout).to(dtype)
    nn.init.normal_(made.lora_A)
    nn.init.normal_(made.lora_B)
    return made


def test_gradcheck_of_the_autograd_function():
    x, y = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    A, B = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for chosen in ((0, 1, 2, 3), (0,), (1,), (2,), (3,), (0, 3)):
        inputs = [t.clone().requires_grad_(i in chosen) for i, t in enumerate((x, y, A, B))]
        assert torch.autograd.gradcheck(lambda *t: LowRank.apply(*t, 1.5), inputs)


def check(module):
    """Outputs and gradients of a wrapped layer equal the dense reparameterization in fp64."""
    for shape in ((4, 6), (2, 3, 6), (1, 6)):
        made = layer(kind=module.LoRALinear)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        W = (made.base.weight + 1.5 * made.lora_B @ made.lora_A).detach().requires_grad_()
        dy = torch.randn(*shape[:-1], 5, dtype=torch.float64)
        y, dense = made(x), F.linear(x, W, made.base.bias)
        dx, dA, dB = torch.autograd.grad(y, (x, made.lora_A, made.lora_B), dy)
        dense_dx, dW = torch.autograd.grad(dense, (x, W), dy)
        for got, want in (
            (y, dense),
            (dx, dense_dx),
            (dA, 1.5 * made.lora_B.T @ dW),
            (dB, 1.5 * dW @ made.lora_A.T),
        ):
            assert got.shape == want.shape and (got - want).abs().max() <= 1e-12 * (1 + want.abs().max())


def test_gradients_equal_the_dense_reparameterization():
    check(low_rank)


@pytest.mark.parametrize(
    "old, new",
    [
        ("alpha=scaling).view", "alpha=1.0).view"),
        ("dh = (dy_rows @ B.to(dy.dtype)) * ctx.scaling", "dh = dy_rows @ B.to(dy.dtype)"),
        ("(dy_rows.t() @ h * ctx.scaling)", "(dy_rows.t() @ h)"),
        ("dA = (dh.t() @ rows)", "dA = (h.t() @ rows)"),
        ("return dx, dy, dA, dB, None", "return dx, dy, dA, dB * 0, None"),
        ("return dx, dy, dA, dB, None", "return None, dy, dA, dB, None"),
        ("dx = (dh @ A.to(dy.dtype))", "dx = (dh @ (A + 1e-9).to(dy.dtype))"),
        ("h = rows @ A.to(x.dtype).t()", "h = rows @ A.to(torch.float32).to(x.dtype).t()"),
        (
            "torch.addmm(y.reshape(-1, y.shape[-1]), h,",
            "torch.addmm(torch.zeros_like(y.reshape(-1, y.shape[-1])), h,",
        ),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, low_rank, old, new)


@given(st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 50))
def test_zero_B_is_the_identity_to_the_bit(r, dtype, seed):
    made = layer(r=r, dtype=dtype, dropout=0.3, seed=seed)
    nn.init.zeros_(made.lora_B)
    x = torch.randn(4, 6).to(dtype)
    for mode in (True, False):
        assert torch.equal(made.train(mode)(x), made.base(x))


def test_an_inactive_wrapper_is_its_base_to_the_bit():
    made, x = layer(), torch.randn(4, 6, dtype=torch.float64)
    assert not torch.equal(made(x), made.base(x))
    made.active = False
    assert torch.equal(made(x), made.base(x))


def test_two_adapters_add_up():
    inner = layer()
    outer = LoRALinear(inner, 2, 0.5, 0.0).double()
    nn.init.normal_(outer.lora_B)
    nn.init.normal_(outer.lora_A)
    x = torch.randn(4, 6, dtype=torch.float64)
    dense = inner.base(x) + x @ (inner.delta(torch.float64) + outer.delta(torch.float64)).T
    torch.testing.assert_close(outer(x), dense, rtol=0, atol=1e-12)


def test_several_adapters_are_resident_and_only_the_last_trains(tmp_path):
    model = tiny_llama()
    minift.apply(model, LoRA(r=2), name="first")
    plan = minift.apply(model, LoRA(r=3, target_modules=["q_proj"]), name="second")
    assert plan.sites[0].path == "model.layers.0.self_attn.q_proj"
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    assert training and all(".q_proj.lora_" in name for name in training)
    with pytest.raises(ValueError, match="merge which adapter"):
        minift.merge(model)
    minift.save_adapter(model, tmp_path, "first")  # files name the path without wrappers
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert list(fresh.adapters) == ["default"]


# 2 blocks of 7 products in a row, sums of at most 97 terms, each rounded to 2^-53, against the largest logit
FP64 = 2 * 7 * 97 * 2.0**-53


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_nested_adapters_merge_in_either_order(order):
    model = tiny_llama(torch.float64)
    for name, targets in (("first", ["q_proj", "v_proj"]), ("second", ["q_proj"])):
        minift.apply(model, LoRA(r=2, target_modules=targets), name=name)
        for made in model.adapters[name].modules.values():
            made.double()
            nn.init.normal_(made.lora_B, std=0.1)
    want = model(IDS)
    limit = FP64 * want.abs().max().item()
    minift.merge(model, order[0])
    torch.testing.assert_close(model(IDS), want, rtol=0, atol=limit)
    minift.merge(model, order[1])
    torch.testing.assert_close(model(IDS), want, rtol=0, atol=limit)
    assert not model.adapters and not any(isinstance(m, LoRALinear) for m in model.modules())


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 8), st.integers(0, 20))
def test_merged_weights_and_outputs_stay_within_the_bound(dtype, r, seed):
    """The merged weight: r products in fp32 (gamma_{r+3}) and one rounding u to W's dtype, componentwise."""
    model = tiny_llama(dtype, seed=seed)
    minift.apply(model, LoRA(r=r, alpha=4.0, target_modules=["all-linear"]))
    wrapped = dict(model.adapters["default"].modules)
    for made in wrapped.values():
        nn.init.normal_(made.lora_B, std=0.1)
    before, bounds = {}, {}
    u, g = torch.finfo(dtype).eps / 2, (r + 3) * 2.0**-24
    for path, made in wrapped.items():
        A, B, W = made.lora_A.double(), made.lora_B.double(), made.base.weight.double()
        before[path] = W + made.scaling * B @ A
        slack = g * (W.abs() + made.scaling * B.abs() @ A.abs())
        bounds[path] = slack + u * (before[path].abs() + slack)
    errors = minift.merge(model)
    for path, exact in before.items():
        difference = (model.get_submodule(path).weight.double() - exact).abs()
        assert (difference <= bounds[path]).all()
        assert abs(errors[path] - difference.max()) <= 1e-15  # fp64 sums in another order


def test_a_merged_model_computes_what_the_adapter_did():
    model = tiny_llama(torch.float64)
    minift.apply(model, LoRA(r=4))
    for made in model.adapters["default"].modules.values():
        made.double()
        nn.init.normal_(made.lora_B, std=0.1)
    want = model(IDS)
    minift.merge(model)
    torch.testing.assert_close(model(IDS), want, rtol=0, atol=FP64 * want.abs().max().item())


def test_a_merge_that_overflows_changes_nothing():
    model = tiny_llama()
    minift.apply(model, LoRA(r=2))
    list(model.adapters["default"].modules.values())[-1].lora_B.data.fill_(3e38)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="gives a weight that is not finite; nothing was changed"):
        minift.merge(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert "default" in model.adapters


def test_the_rank_of_a_change_is_at_most_r():
    made = layer(fan_in=20, fan_out=16, r=3)
    values = torch.linalg.svdvals(made.delta(torch.float64))
    assert values[3] <= 8 * 20 * 2.0**-52 * values[0] and values[2] > 1e-3 * values[0]


def test_dropout_drops_in_training_alone():
    made, x = layer(dropout=0.5), torch.ones(1, 6, dtype=torch.float64)
    draws = torch.stack([made.train()(x) for _ in range(4000)])
    exact = made.eval()(x)
    assert torch.equal(exact, made(x)) and draws.std() > 0.1
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)
    assert error.max() < 5  # five standard errors


def test_scaling_and_fields():
    assert LoRA(r=4, alpha=8).scaling == 2 and LoRA(r=4, alpha=8, rslora=True).scaling == 4
    assert LoRA(target_modules="q_proj").target_modules == ("q_proj",)
    bound = 32**-0.5
    model = tiny_llama()
    minift.apply(model, LoRA(r=8))
    for made in model.adapters["default"].modules.values():
        assert made.lora_A.abs().max() <= bound and made.lora_A.std() > 0.8 * bound / 3**0.5
        assert (made.lora_B == 0).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.0}, "r is 2.0"),
        ({"r": True}, "r is True"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


def test_a_rank_above_the_layer_and_a_tied_head_are_refused():
    with pytest.raises(ValueError, match=r"r is 17, above the smaller side of .*v_proj \(16 x 32\)"):
        LoRA(r=17, target_modules=["v_proj"]).plan(tiny_llama())
    with pytest.raises(ValueError, match=r"lm_head, and head and embedding are one weight \(tied\)"):
        LoRA(target_modules=["lm_head"]).plan(tiny_llama(tie_word_embeddings=True))
    assert LoRA(target_modules=["lm_head"]).plan(tiny_llama()).trainable == 8 * (32 + 97)


def test_a_base_that_is_listened_to_or_autocast_is_called_itself():
    base = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    layer, x, heard = LoRALinear(base, 2, 1.0, 0.0), torch.randn(3, 8, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    base.register_full_backward_hook(lambda *_: heard.append(1))
    layer(x).sum().backward()
    assert heard == [1]


def test_second_derivatives_are_an_error_and_not_lost():
    layer = LoRALinear(torch.nn.Linear(8, 8, bias=False).requires_grad_(False), 2, 1.0, 0.0)
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
