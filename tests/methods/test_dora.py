"""DoRA against its dense definition, y = m (V x) / ||V|| + bias with V = W + scaling B A."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn

import minift
from minift.methods import dora
from minift.methods.base import trainable
from minift.methods.dora import DoRA, DoRALinear
from minift.methods.lora import LoRA
from minift.models.interface import dense_weight
from minift.models.llama import Llama, LlamaConfig
from minift.models.skeleton import shapes_only
from minift.models.wrappers import innermost

IDS = torch.arange(20).view(2, 10) % 97


def layer(fan_in=7, fan_out=5, r=3, dtype=torch.float64, p=0.0, bias=True, kind=DoRALinear, start=False):
    base = nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype).requires_grad_(False)
    made = kind(base, r, 1.5, p).to(torch.promote_types(dtype, torch.float32))
    made.base.to(dtype)
    A, B = torch.randn(r, fan_in), torch.randn(fan_out, r)
    made.start_at(A, B if start else None)
    with torch.no_grad():
        made.lora_A.add_(0.1 * torch.randn(A.shape))
        made.lora_B.add_(0.5 * torch.randn(B.shape))
        made.magnitude.mul_(1 + 0.2 * torch.randn(fan_out))
    return made


def dense(made, x, dropped=None):
    """y with the whole matrix, the norm detached; differentiable."""
    W, s, A, B = made.base.weight, made.scaling, made.lora_A, made.lora_B
    delta = s * (B @ A) if made.start_A is None else s * (B @ A - made.start_B @ made.start_A)
    g = made.magnitude / (W + delta).detach().norm(dim=1)
    if dropped is None:
        return F.linear(x, g[:, None] * (W + delta), made.base.bias)
    return made.base(x) + (g - 1) * F.linear(dropped, W) + g * F.linear(dropped, delta)


def same(got, want):
    """fp64, sums of at most 21 terms of numbers below 10: a few hundred roundings of 2^-53."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())


EPS = torch.finfo(torch.float32).eps


def norm_bound(made):
    """(||V||, bound on the error of the norm), fp64, by the docstring of `norm`.

    A sum of squares that is off by E has a root that is off by at most E / ||V||, and by sqrt(E). The root
    and the rounding of it add 2 eps, the maximum sqrt(eps) ||W|| where the sum is all error.
    """
    W, s, (A, B) = made.base.weight.double(), made.scaling, (t.detach().double() for t in made.factors())
    n, norm = W.shape[1] + 2 * len(A) + 4, (W + s * B @ A).norm(dim=1)
    cross = (B.abs() * (W.abs() @ A.abs().t())).sum(1)
    gram = (B.abs() * (B.abs() @ (A.abs() @ A.abs().t()))).sum(1)
    sums = W.square().sum(1) + 2 * s * cross + s * s * gram
    low = 2.0**-6 * (1 + 2.0**-8) * s * cross if made.base.weight.dtype == torch.bfloat16 else 0
    error = n * EPS / 2 * (1 + n * EPS) * sums + low
    return norm, torch.minimum(error / norm, error.sqrt() + EPS**0.5 * W.norm(dim=1)) + 2 * EPS * norm


def check(module):
    """Outputs, gradients and the folded weight, with and without bias, dropout and a start taken off."""
    for shape, bias, p, start in (
        ((4, 7), True, 0.0, False),
        ((2, 3, 7), False, 0.0, True),
        ((2, 3, 7), True, 0.4, False),
        ((4, 7), False, 0.4, True),
    ):
        made = layer(bias=bias, p=p, kind=module.DoRALinear, start=start)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        leaves = x, made.lora_A, made.lora_B, made.magnitude
        torch.manual_seed(1)
        y = made(x)
        torch.manual_seed(1)
        want = dense(made, x, F.dropout(x, p) if p else None)
        dy = torch.randn_like(y)
        same((y, *torch.autograd.grad(y, leaves, dy)), (want, *torch.autograd.grad(want, leaves, dy)))
        folded = made.fold(dict(made.base.named_parameters()))
        same([F.linear(x, folded["weight"], folded.get("bias"))], [dense(made, x)])
        assert list(made.state()) == ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    fresh = module.DoRALinear(made.base, 3, 1.5)
    same([fresh.magnitude.double()], [made.base.weight.norm(dim=1).float().double()])
    check_rounding(module)
    check_cancellation(module)


def check_rounding(module):
    """In bf16 g is not rounded (it would become 1), and y is rounded once: half a unit in its last place."""
    made = layer(8, 500, dtype=torch.bfloat16, kind=module.DoRALinear, bias=False)
    made.lora_B.data.zero_()
    g = 1 + 0.9 * 2.0**-8
    made.magnitude.data = g * made.norm()
    x = torch.randn(1, 8, dtype=torch.bfloat16)
    want = made.base(x).double() * g
    _, exponent = torch.frexp(want)
    half = torch.ldexp(torch.ones_like(want), exponent - 9)  # 8 bits, and half of the last
    assert ((made(x) - want).abs() <= half + 2.0**-20 * want.abs()).all()


def check_cancellation(module):
    """A delta that takes W away leaves a norm that is positive, and within the bound."""
    for noise in (0, 1e-5):
        made = layer(33, 12, 3, torch.float32)
        made.base.weight.copy_(-made.delta() * (1 + noise * torch.randn(12, 1)))
        fresh = module.DoRALinear(made.base, 3, 1.5)
        fresh.load_state_dict({**made.state_dict(), "squares": fresh.squares})
        norm, bound = norm_bound(fresh)
        assert ((fresh.norm().double() - norm).abs() <= bound).all()
        assert (fresh.norm() >= 0.99 * EPS**0.5 * fresh.squares.sqrt()).all()


def test_outputs_and_gradients_are_those_of_the_dense_definition():
    check(dora)


@pytest.mark.parametrize(
    "old, new",
    [
        ("g = self.magnitude / self.norm()", "g = self.magnitude / self.squares.sqrt()"),
        ("    @torch.no_grad()\n", ""),
        ("u - self.base.bias.to(g.dtype)", "u"),
        ("self.scaling * (B * inner)", "(B * inner)"),
        ("B @ (A @ A.t())", "B * (A * A).sum(1)"),
        ("g - 1, v)", "g, v)"),
        ("g - 1, v)", "g.to(u.dtype) - 1, v)"),
        ("torch.addcmul(u, g", "torch.addcmul(plain, g"),
        ("torch.maximum(squares, least)", "squares"),
        ("self.product(dropped)", "self.product(x)"),
        ("LowRank.apply(dropped, plain", "LowRank.apply(x, plain"),
        (" / norm)[:, None] * V", ")[:, None] * V"),
        ("dtype=wide).square()", "dtype=wide)"),
        ('"magnitude": "lora_magnitude_vector"', '"magnitude": "lora_magnitude"'),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, dora, old, new)


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans(), st.integers(0, 30))
def test_the_start_is_the_base_to_the_bit(dtype, bias, seed):
    torch.manual_seed(seed)
    base = nn.Linear(9, 6, bias=bias, dtype=dtype).requires_grad_(False)
    base.weight[2] = 0  # a row without a direction
    for init in ("kaiming", "pissa", "olora"):
        made = DoRALinear(base, 2, 0.7, dropout=0.3)
        made.start_at(*LoRA.inits[init](base, 2, 0.7, torch.Generator().manual_seed(seed)))
        x = torch.randn(4, 9, dtype=dtype)
        for mode in (True, False):
            assert torch.equal(made.train(mode)(x), base(x))


def test_a_row_of_zeros_learns():
    base = nn.Linear(9, 6, bias=False).requires_grad_(False)
    base.weight[2] = 0
    made = DoRALinear(base, 2, 1.0)
    made.start_at(torch.randn(2, 9), None)
    made(torch.randn(4, 9)).sum().backward()
    assert made.lora_B.grad[2].abs().max() > 0 and torch.isfinite(made.magnitude.grad).all()
    made.lora_B.data -= 0.1 * made.lora_B.grad
    made(torch.randn(4, 9)).sum().backward()
    assert torch.isfinite(made.magnitude.grad).all() and made.magnitude.grad[2] != 0


DTYPES, SIZES = st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-3, 0.1, 3.0])


@given(DTYPES, SIZES, st.integers(1, 9), st.integers(0, 100))
def test_the_norm_keeps_its_bound(dtype, size, r, seed):
    torch.manual_seed(seed)
    made = layer(33, 12, r, dtype)
    made.lora_B.data *= size
    norm, bound = norm_bound(made)
    assert ((made.norm().double() - norm).abs() <= bound).all()


def adapted():
    """A model with a DoRA that has moved; in fp64 throughout."""
    model = tiny_llama(torch.float64)
    minift.apply(model, DoRA(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    model.double()
    for p in trainable(model).values():
        p.data += 0.1 * torch.randn_like(p)
    return model


# 2 blocks of 7 products in a row, sums of at most 97 terms, each rounded to 2^-53, against the largest logit;
# the norms add sums of as many terms before each of them
FP64 = 4 * 7 * 97 * 2.0**-53


def test_lora_around_dora_adds_and_dora_merges_first():
    model = adapted()
    minift.apply(model, LoRA(r=2, target_modules=["q_proj"]), name="outer")
    for made in model.adapters["outer"].parts:
        nn.init.normal_(made.double().lora_B)
    x = torch.randn(3, 32, dtype=torch.float64)
    same([made(x)], [made.base(x) + x @ made.delta(torch.float64).t()])
    want = model(IDS)
    with pytest.raises(ValueError, match="wrapped around default, and the two do not commute"):
        minift.merge(model, "outer")
    assert len(minift.merge(model, "default", keep=True)) == 6
    torch.testing.assert_close(model(IDS), want, rtol=0, atol=FP64 * want.abs().max().item())
    minift.unmerge(model, "default")
    assert torch.equal(model(IDS), want)


def test_inactive_it_is_the_base_and_each_text_may_have_its_own():
    model = adapted()
    with_adapter = model(IDS)
    with model.adapters.disable():
        without = model(IDS)
    assert torch.equal(without, tiny_llama(torch.float64)(IDS)) and not torch.equal(with_adapter, without)
    limit = FP64 * without.abs().max().item()
    with model.adapters.rows(["default", None]):
        torch.testing.assert_close(model(IDS)[0], with_adapter[0], rtol=0, atol=limit)
        torch.testing.assert_close(model(IDS)[1], without[1], rtol=0, atol=limit)
        for part in model.train().adapters["default"].parts:
            part.dropout = 0.3
        torch.testing.assert_close(model(IDS)[1], without[1], rtol=0, atol=limit)


@pytest.mark.parametrize("format, dropout", [("nf4", 0.0), ("int8", 0.0), ("nf4", 0.4), ("int8", 0.4)])
def test_on_a_quantized_base_it_is_dora_on_the_dequantized_weight(format, dropout):
    model = tiny_llama(hidden_size=64, head_dim=16)
    minift.quantize_model(model, format)
    minift.apply(model, DoRA(r=4, target_modules=["q_proj"], dropout=dropout))
    made = model.adapters["default"].modules["model.layers.1.self_attn.q_proj"]
    for p in trainable(made).values():
        p.data += 0.1 * torch.randn_like(p)
    like = DoRALinear(nn.Linear(64, 64, bias=False), 4, made.scaling)
    like.base.weight.data = dense_weight(innermost(made))
    like.base.requires_grad_(False)
    like.load_state_dict(like.state_dict() | {n: t for n, t in made.state_dict().items() if "base" not in n})
    norm, bound = norm_bound(like)
    assert ((made.norm().double() - norm).abs() <= bound).all()
    like.double()
    x = torch.randn(5, 64, requires_grad=True)
    torch.manual_seed(1)
    y = made.train()(x)
    torch.manual_seed(1)
    want = dense(like, x.double(), F.dropout(x, dropout).double() if dropout else None)
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, made.lora_A, made.lora_B, made.magnitude), dy))
    leaves = (x, like.lora_A, like.lora_B, like.magnitude)
    # chains of three products of at most 64 terms in fp32, against the largest number: 3 * 64 * 2^-24 < 2^-16
    for a, b in zip(got, (want, *torch.autograd.grad(want, leaves, dy.double())), strict=True):
        assert (a - b).abs().max() <= 2.0**-16 * b.abs().max()


def test_llama_3_8b_trains_43_319_296():
    with shapes_only():
        model = Llama(LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128))
    plan = minift.apply(model, DoRA(r=16, target_modules=["all-linear"]))
    assert plan.trainable == 43_319_296 == sum(p.numel() for p in trainable(model).values())
    assert all(t.is_meta for part in model.adapters["default"].parts for t in part.state_dict().values())


def test_patterns_saved_modules_and_the_ratio_of_learning_rates():
    model = tiny_llama()
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6.0}}
    plan = minift.apply(model, DoRA(r=4, lr_ratio=4.0, modules_to_save=["lm_head"], **patterns))
    by_layer = 4 * (32 + 32) + 32 + 2 * (32 + 16) + 16
    assert plan.trainable == 2 * by_layer + 97 * 32 == sum(p.numel() for p in trainable(model).values())
    v = model.adapters["default"].modules["model.layers.0.self_attn.v_proj"]
    assert (v.r, v.scaling) == (2, 3.0)
    first, second = plan.method.param_groups(trainable(model))
    assert second["lr_ratio"] == 4 and {p.shape[1] for p in second["params"]} == {4, 2}
    assert sum(p.ndim == 1 for p in first["params"]) == 4  # the magnitudes


def test_what_it_cannot_wrap_is_refused_by_name():
    model = tiny_llama()
    with pytest.raises(ValueError, match="dora is for linear layers, and model.embed_tokens is none"):
        DoRA(target_modules=["lm_head"], tied="both").plan(tiny_llama(tie_word_embeddings=True))
    minift.apply(model, DoRA(r=2, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.v_proj carries an adapter \(DoRALinear\)"):
        minift.apply(model, DoRA(r=2), name="second")
    assert list(model.adapters) == ["default"]
    minift.apply(model, LoRA(r=2, target_modules=["k_proj"]), name="third")
    with pytest.raises(ValueError, match=r"self_attn.k_proj carries an adapter \(LoRALinear\)"):
        minift.apply(model, DoRA(r=2, target_modules=["k_proj"]), name="second")


def test_who_listens_to_the_base_does_not_hear_of_the_norm():
    made, heard = layer(dtype=torch.float32), []
    made.base.register_forward_hook(lambda _, inputs, __: heard.append(inputs[0].shape))
    made(torch.randn(4, 7))
    assert heard == [(4, 7)]
