"""Where A and B start: PiSSA, OLoRA, Gaussian, Kaiming; a start that is taken off leaves the base alone."""

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
from minift.methods import low_rank, olora, pissa
from minift.methods.base import trainable
from minift.methods.lora import INITS, LoRA
from minift.models.interface import dense_weight
from minift.models.llama import Llama
from minift.models.wrappers import base_layers, innermost

IDS = torch.arange(24).view(2, 12) % 97
TAKEN_OFF = ["pissa", "olora"]
SHAPES = [(6, 6), (5, 9), (9, 5)]  # (out, in): square, wide, tall
ALL = ("all-linear", "lm_head")


def linear(shape, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    return layer


# an exact decomposition of at most 9 x 9 numbers in fp64: a few n u of the largest value
DECOMPOSED = 8 * 9 * 2.0**-53


def near(got, want, size):
    assert got.shape == want.shape and (got - want).abs().max() <= DECOMPOSED * size


def check_pissa(module):
    """s B A is the best approximation of rank r (Eckart and Young): the other singular values are left."""
    for shape in SHAPES:
        for r, s in ((1, 1.0), (3, 0.25), (4, 4.0)):
            layer = linear(shape)
            A, B = module.pissa(layer, r, s, None)
            assert A.shape == (r, shape[1]) and B.shape == (shape[0], r) and A.dtype == torch.float64
            values, left = (torch.linalg.svdvals(W) for W in (layer.weight, layer.weight - s * B @ A))
            near(left, torch.cat((values[r:], torch.zeros(r))), values[0])
            near(A @ A.T, torch.diag(values[:r] / s), values[0] / s)  # both factors take their root
            near(B.T @ B, torch.diag(values[:r] / s), values[0] / s)


def check_olora(module):
    """B has orthonormal columns, which span the first r of W; B A is W's part in them."""
    for shape in SHAPES:
        for r in (1, 3, 5):
            layer = linear(shape)
            W = layer.weight.detach()
            A, B = module.olora(layer, r, 0.25, None)
            assert A.shape == (r, shape[1]) and B.shape == (shape[0], r) and A.dtype == torch.float64
            near(B.T @ B, torch.eye(r, dtype=torch.float64), 1)
            near(B.T @ W, A, W.norm())
            near((B @ A)[:, :r], W[:, :r], W.norm())


def check_taken_off(module):
    """Value, gradients, delta, fold and state are those of LoRA on the residual base W - s B0 A0, in fp64."""
    for shape in SHAPES:
        base, r, s = linear(shape), 3, 1.5
        W, (A0, B0) = base.weight.detach(), pissa.pissa(base, r, s, None)
        layer = module.LoRALinear(base, r, s).double()
        layer.start_at(A0, B0)
        assert torch.equal(layer.lora_A, A0) and torch.equal(layer.lora_B, B0)
        x = torch.randn(7, shape[1], dtype=torch.float64, requires_grad=True)
        assert torch.equal(layer(x), base(x)) and not layer.delta(torch.float64).any()
        with torch.no_grad():
            layer.lora_A += 0.3 * torch.randn_like(A0)
            layer.lora_B += 0.3 * torch.randn_like(B0)
        A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
        dense = W - s * B0 @ A0 + s * B @ A
        y, want = layer(x), F.linear(x, dense)
        dy = torch.randn_like(want)
        got = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)
        wanted = torch.autograd.grad(want, (x, A, B), dy, retain_graph=True)
        state = layer.state()
        assert state["lora_A.weight"].shape == (2 * r, shape[1])
        change = s * state["lora_B.weight"] @ state["lora_A.weight"]
        pairs = [(y, want), *zip(got, wanted, strict=True), (change, dense - W)]
        pairs += [(layer.delta(torch.float64), dense - W), (layer.fold({"weight": W})["weight"], dense)]
        for g, w in pairs:  # fp64 sums of at most 9 + 4 r terms
            assert g.shape == w.shape and (g - w).abs().max() <= 1e-13 * (1 + w.abs().max())
        assert torch.equal(base.weight, W)


CHECKS = [(check_pissa, pissa), (check_olora, olora), (check_taken_off, low_rank)]


@pytest.mark.parametrize("check, module", CHECKS)
def test_a_start_is_what_its_paper_says(check, module):
    check(module)


@pytest.mark.parametrize(
    "check, module, old, new",
    [
        (check_pissa, pissa, "(S[:r] / scaling).sqrt()", "S[:r].sqrt()"),
        (check_pissa, pissa, "(S[:r] / scaling).sqrt()", "S[:r] / scaling"),
        (check_pissa, pissa, "(S[:r] / scaling).sqrt()", "(S[-r:] / scaling).sqrt()"),
        (check_pissa, pissa, "root[:, None] * Vh[:r]", "Vh[:r]"),
        (
            check_pissa,
            pissa,
            "root[:, None] * Vh[:r], U[:, :r] * root",
            "root[:, None] ** 2 * Vh[:r], U[:, :r]",
        ),
        (check_pissa, pissa, "U[:, :r] * root", "-U[:, :r] * root"),
        (check_pissa, pissa, "U[:, :r] * root", "U[:, -r:] * root"),
        (check_pissa, pissa, "W.detach().to(", "W.detach().bfloat16().to("),
        (check_olora, olora, "R[:r], Q[:, :r]", "R[:r] / scaling, Q[:, :r]"),
        (check_olora, olora, "R[:r], Q[:, :r]", "R[:r], 2 * Q[:, :r]"),
        (check_olora, olora, "R[:r], Q[:, :r]", "R[-r:], Q[:, -r:]"),
        (check_olora, olora, "R[:r], Q[:, :r]", "R[:r].abs(), Q[:, :r]"),
        (check_taken_off, low_rank, "(A, A - self.start_A)", "(A, self.start_A - A)"),
        (check_taken_off, low_rank, "(A, A - self.start_A)", "(self.start_A, A - self.start_A)"),
        (check_taken_off, low_rank, "(B - self.start_B, self.start_B)", "(B, -self.start_B)"),
        (check_taken_off, low_rank, "(B - self.start_B, self.start_B)", "(B - self.start_B, B)"),
        (check_taken_off, low_rank, "(B - self.start_B, self.start_B)", "(self.start_B - B, self.start_B)"),
        (check_taken_off, low_rank, "if self.start_A is None:", "if True:"),
        (check_taken_off, low_rank, "self.lora_B.data.copy_(B)", "self.lora_B.data.copy_(-B)"),
        (check_taken_off, low_rank, "return self.scaling * (B.to(dtype)", "return (B.to(dtype)"),
        (check_taken_off, low_rank, "if self.start_A is not None:", "if False:"),
    ],
)
def test_mutants_are_noticed(check, module, old, new):
    assert not survives(check, module, old, new)


@given(
    st.sampled_from(list(INITS)),
    st.sampled_from([torch.float32, torch.bfloat16, "nf4"]),
    st.integers(1, 8),  # the file of a start that is taken off has rank 2r, and v_proj 16 rows
    st.sampled_from([0.5, 16.0]),
    st.booleans(),
)
def test_every_start_is_the_base_to_the_bit_and_leaves_its_bits(init, dtype, r, alpha, rslora):
    model = tiny_llama(torch.float32 if dtype == "nf4" else dtype)
    if dtype == "nf4":
        minift.quantize_model(model)
    before, want = copy.deepcopy(model.state_dict()), model(IDS)
    method = LoRA(r=r, alpha=alpha, rslora=rslora, init=init, target_modules=ALL)
    minift.apply(model, method)
    assert method.identity_at_init == "bitwise" and torch.equal(model(IDS), want)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    for layer in model.adapters["default"].modules.values():
        A, B = layer.lora_A, layer.lora_B
        assert A.any() and B.any() == (init in TAKEN_OFF)
        W = dense_weight(innermost(layer)).float()  # dequantized where it is quantized
        if init == "pissa":
            best = torch.linalg.svdvals(W)[r:].square().sum().sqrt()
            # in fp32: a few n u |W|, n the larger side, at most 97
            assert (W - layer.scaling * B @ A).norm() <= best + 4 * 97 * 2.0**-24 * W.norm()
        if init == "olora":
            assert (B.T @ W - A).norm() <= 4 * 97 * 2.0**-24 * W.norm()
    minift.merge(model, mode="dequantized")  # a zero delta merges into the very bits
    for name, p in model.state_dict().items():
        assert name not in before or torch.equal(p, before[name])  # a quantized layer has become dense


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_small_changes_are_not_lost_beside_a_large_start(init):
    torch.manual_seed(0)
    layer = low_rank.LoRALinear(nn.Linear(32, 24, bias=False, dtype=torch.bfloat16), 4, 2.0)
    A, B = INITS[init](linear((24, 32)), 4, 2.0, None)
    layer.start_at(A, B)
    nn.init.zeros_(layer.base.weight)
    with torch.no_grad():
        layer.lora_B += 2.0**-14 * torch.randn_like(layer.lora_B)  # far below bf16's spacing around B
    x = torch.randn(5, 32).bfloat16()
    change, A = layer.lora_B.double() - layer.start_B.double(), layer.lora_A.double()
    exact = 2 * x.double() @ A.T @ change.T
    # roundings to bf16 (2^-8): of A, of x A^T, of the change, of y; what is fp32 is far finer
    bound = 4.1 * 2.0**-8 * 2 * x.double().abs() @ A.abs().T @ change.abs().T
    assert ((layer(x).double() - exact).abs() <= bound).all() and exact.abs().max() > 100 * bound.min()


@pytest.mark.parametrize("init", TAKEN_OFF)
@pytest.mark.parametrize("quantized", [False, True])
def test_merging_folds_the_whole_change_in_and_unmerging_brings_the_bits_back(init, quantized):
    model = tiny_llama()
    if quantized:
        minift.quantize_model(model)
    minift.apply(model, LoRA(r=3, init=init, target_modules="all-linear"))
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.05 * torch.randn_like(p)
    before, exact, bound = model(IDS), {}, {}
    for path, m in model.adapters["default"].modules.items():
        W, (A, B, A0, B0) = (
            dense_weight(m.base).double(),
            (t.double() for t in (m.lora_A, m.lora_B, m.start_A, m.start_B)),
        )
        exact[path] = W + m.scaling * (B @ A - B0 @ A0)
        # fp32: two differences, 2 r products and their sums, one sum with W
        terms = (B - B0).abs() @ A.abs() + B0.abs() @ (A - A0).abs()
        bound[path] = (2 * 3 + 4) * 2.0**-24 * (W.abs() + m.scaling * terms)
    minift.merge(model, keep=True)
    for path, layer in base_layers(model).items():
        if path in exact:
            assert ((layer.weight.double() - exact[path]).abs() <= bound[path]).all()
    minift.unmerge(model, "default")
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_a_start_goes_around_another_adapter_and_the_seed_does_not_matter(init):
    model = tiny_llama()
    minift.apply(model, LoRA(r=2), name="inner")
    with torch.no_grad():
        for p in trainable(model).values():
            p += 0.1 * torch.randn_like(p)
    want, starts = model(IDS), []
    for seed in (0, 1):
        minift.apply(model, LoRA(r=3, init=init), name=f"outer{seed}", seed=seed)
        starts.append([m.lora_A.detach() for m in model.adapters[f"outer{seed}"].modules.values()])
        assert torch.equal(model(IDS), want)
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_gaussian_is_normal_with_one_over_r():
    model = tiny_llama(hidden_size=256, head_dim=64)
    minift.apply(model, LoRA(r=8, init="gaussian", target_modules=["q_proj"]))
    drawn = torch.cat([m.lora_A.detach().flatten() for m in model.adapters["default"].modules.values()])
    # 4096 draws: the deviation is known to 1/sqrt(2 n), five standard errors
    assert abs(drawn.std() * 8 - 1) < 5 / (2 * drawn.numel()) ** 0.5 and drawn.abs().max() * 8 > 3


@pytest.mark.parametrize("init", INITS)
def test_nothing_is_drawn_on_the_meta_device(init, monkeypatch):
    with torch.device("meta"):
        model = Llama(tiny_llama().config)
    method = LoRA(init=init, target_modules="all-linear")
    monkeypatch.setattr(LoRA, "inits", {init: None})  # calling it would fail
    plan = minift.apply(model, method)
    assert plan == method.plan(tiny_llama()) and all(p.is_meta for p in trainable(model).values())


@pytest.mark.parametrize("init", TAKEN_OFF)
def test_a_start_whose_file_would_have_too_high_a_rank_is_refused(init):
    model = tiny_llama()
    with pytest.raises(
        ValueError, match=f"r is 9 with init '{init}', whose file is a LoRA of rank 18, .* use at most 8"
    ):
        minift.apply(model, LoRA(r=9, init=init))
    assert not model.adapters
