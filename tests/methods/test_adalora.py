"""AdaLoRA against a dense fp64 reference of the paper's algorithm 1, written with loops."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn

import minift
from minift.methods import adalora
from minift.methods.adalora import AdaLoRA, SVDLinear, triplets
from minift.methods.lora import LoRA

IDS = torch.arange(20).view(2, 10) % 97
SHAPES = ((7, 5), (6, 5), (7, 8))  # (in, out)


def layers_of(module, method, dropout=0.0, dtype=torch.float64):
    """Three wrapped layers with random triplets, and what stands for the model they are in."""
    made = []
    for fan_in, fan_out in SHAPES:
        base = nn.Linear(fan_in, fan_out, bias=False, dtype=dtype).requires_grad_(False)
        layer = module.SVDLinear(base, method.r, method.scaling, dropout).to(dtype)
        layer.start_at(torch.randn(method.r, fan_in), torch.randn(fan_out, method.r))
        nn.init.normal_(layer.lora_E)
        made.append(layer)
    return made, SimpleNamespace(adapters={"a": SimpleNamespace(parts=[nn.Identity(), *made])})


def same(got, want):
    """fp64, chains of a few hundred roundings of 2^-53 over the steps, none of which is amplified."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-12 * (1 + b.abs().max())


def check_layer(module):
    """Outputs, gradients and the folded weight of one layer, with and without dropout."""
    method = module.AdaLoRA(r=3, target_r=2)
    assert method.scaling == 16.0 / 3.00001
    for p in (0.0, 0.4):
        layer = layers_of(module, method, p)[0][0]
        A, B, E = layer.lora_A, layer.lora_B, layer.lora_E
        x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        y = layer(x)
        torch.manual_seed(1)
        delta = method.scaling * B @ torch.diag(E[:, 0]) @ A
        want = layer.base(x) + F.dropout(x, p) @ delta.t()
        dy = torch.randn_like(y)
        leaves = x, A, B, E
        same((y, *torch.autograd.grad(y, leaves, dy)), (want, *torch.autograd.grad(want, leaves, dy)))
        same([layer.fold({"weight": layer.base.weight})["weight"]], [layer.base.weight + delta])
        shapes = {key: tuple(t.shape) for key, t in layer.state().items()}
        assert shapes == {"lora_A": (3, 7), "lora_B": (5, 3), "lora_E": (3, 1)}


def reference(weights, x, targets, start, method, total, lr):
    """Algorithm 1 with plain gradient descent, on dense deltas.

    After each step: A, B and E of all layers, their averages, the scores, and which triplets are kept.
    """
    w = {at: t.clone().requires_grad_() for at, t in start.items()}
    smooth, unsure = ({at: torch.zeros_like(t) for at, t in start.items()} for _ in range(2))
    everything = [(k, i) for k in range(len(weights)) for i in range(method.r)]
    kept, last = everything, total - method.tfinal
    for t in range(1, total + 1):
        loss = 0
        for k, W in enumerate(weights):
            A, B, E = (w[k, n] for n in "ABE")
            delta = method.alpha / (method.r + 1e-5) * B @ torch.diag(E[:, 0]) @ A
            loss = loss + (x[k] @ (W + delta).t() - targets[k]).square().mean()
            for off in (B.t() @ B - torch.eye(method.r), A @ A.t() - torch.eye(method.r)):
                loss = loss + method.orth_reg_weight * torch.linalg.matrix_norm(off) ** 2
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        for at in w:
            if t <= last:
                now = (w[at] * grads[at]).abs().detach()
                smooth[at] = method.beta1 * smooth[at] + (1 - method.beta1) * now
                unsure[at] = method.beta2 * unsure[at] + (1 - method.beta2) * (now - smooth[at]).abs()
            w[at].data -= lr * grads[at]
        s, scores = {at: smooth[at] * unsure[at] for at in w}, {}
        for k, i in everything:
            P, Q = s[k, "B"][:, i], s[k, "A"][i]
            scores[k, i] = (s[k, "E"][i, 0] + P.sum() / len(P) + Q.sum() / len(Q)).item()
        due = t == last or (method.tinit < t < last and t % method.deltaT == 0)
        if due:
            kept = sorted(scores, key=lambda at: -scores[at])[: closed_form(method, t, total, len(weights))]
        for k, i in everything:
            if (due or t > last) and (k, i) not in kept:
                w[k, "E"].data[i] = 0
        scores = torch.tensor(list(scores.values()), dtype=torch.float64)
        yield [*w.values(), *smooth.values(), *unsure.values(), scores], [at in kept for at in everything]


def closed_form(method, t, total, layers):
    """b(t) in exact arithmetic, rounded down."""
    first, final = method.r * layers, method.target_r * layers
    if t < method.tinit:
        return first
    if t >= total - method.tfinal:
        return final
    done = Fraction(t - method.tinit, total - method.tfinal - method.tinit)
    return int(final + (first - final) * (1 - done) ** 3)


def check(module):
    """The whole course of parameters and averages, and the budget on every step."""
    check_layer(module)
    total, lr = 14, 1e-3
    method = module.AdaLoRA(r=4, target_r=1, tinit=3, tfinal=4, deltaT=2, beta1=0.7, beta2=0.9)
    layers, model = layers_of(module, method)
    x = [torch.randn(9, fan_in, dtype=torch.float64) for fan_in, _ in SHAPES]
    targets = [torch.randn(9, fan_out, dtype=torch.float64) for _, fan_out in SHAPES]
    w = {(k, n): getattr(layer, f"lora_{n}") for k, layer in enumerate(layers) for n in "ABE"}
    optimizer = torch.optim.SGD(w.values(), lr=lr)
    start = {at: t.detach().clone() for at, t in w.items()}
    course = reference([f.base.weight for f in layers], x, targets, start, method, total, lr)
    for step, (numbers, kept) in enumerate(course):
        optimizer.zero_grad()
        loss = sum((f(x[k]) - targets[k]).square().mean() for k, f in enumerate(layers))
        (loss + method.extra_loss(model, "a")).backward()
        method.take_step(model, "a", optimizer, step, total)
        got = [getattr(layers[k], f"{a}_{n}") for a in ("lora", "sensitivity", "uncertainty") for k, n in w]
        same([*got, torch.cat([layer.scores() for layer in layers])], numbers)
        assert torch.cat([layer.kept for layer in layers]).tolist() == kept
        assert method.budget(step + 1, total, 3) == closed_form(method, step + 1, total, 3)


def test_the_course_of_training_is_that_of_algorithm_1():
    check(adalora)


OBSERVE = """        if done <= last:
            for layer in layers:
                layer.observe(self.beta1, self.beta2)
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("self.lora_E * self.lora_A", "self.lora_A"),
        ("return alpha / (r + 1e-5)", "return alpha / r"),
        ("(w * w.grad).abs()", "w.grad.abs()"),
        ("(w * w.grad).abs()", "(w * w.grad)"),
        ("lerp_(now, 1 - beta1)", "lerp_(now, beta1)"),
        ("1 - beta2", "1 - beta1"),
        ("(now - sensitivity).abs(), ", "now, "),
        ("E[:, 0] + B", "B"),
        ("B.mean(dim=0)", "B.sum(dim=0)"),
        (" + A.mean(dim=1)", ""),
        ("descending=True", "descending=False"),
        ("[:budget]", "[: budget - 1]"),
        ("~self.kept[:, None]", "self.kept[:, None]"),
        ("(P.t() @ P - eye).square().sum()", "(P.t() @ P - eye).norm()"),
        (" + (Q @ Q.t() - eye).square().sum()", ""),
        ("return self.orth_reg_weight * sum", "return sum"),
        ("step + 1, total", "step, total"),
        ("done == last or (", "("),
        ("done % self.deltaT == 0", "True"),
        ("if allocates or done > last", "if allocates"),
        ("if done <= last", "if True"),
        (OBSERVE + "        optimizer.step()\n", "        optimizer.step()\n" + OBSERVE),
        ("max(left, 0) ** 3 // span**3", "max(left, 0) // span"),
        ("max(done, self.tinit)", "done"),
        ("- self.tfinal - self.tinit\n", "- self.tinit\n"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, adalora, old, new)


STEPS, RANKS = st.integers(0, 40), st.integers(1, 16)


@given(st.integers(1, 40), STEPS, STEPS, RANKS, RANKS, st.integers(1, 9))
def test_the_budget_is_its_closed_form_and_only_shrinks(span, tinit, tfinal, r, target_r, layers):
    method = AdaLoRA(r=max(r, target_r), target_r=min(r, target_r), tinit=tinit, tfinal=tfinal)
    total = tinit + span + tfinal
    curve = [method.budget(done, total, layers) for done in range(total + 1)]
    assert curve == [closed_form(method, t, total, layers) for t in range(total + 1)]
    assert curve == sorted(curve, reverse=True)
    assert {method.r * layers} == set(curve[: tinit + 1])
    assert {method.target_r * layers} == set(curve[total - tfinal :])


def test_of_equal_scores_the_first_are_kept_and_the_number_is_exact():
    method = AdaLoRA(r=4, target_r=1)
    layers, _ = layers_of(adalora, method)
    adalora.allocate(layers, 6)
    assert [layer.kept.tolist() for layer in layers] == [[True] * 4, [True] * 2 + [False] * 2, [False] * 4]


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(0, 20))
def test_the_start_is_the_base_to_the_bit(dtype, bias, seed):
    torch.manual_seed(seed)
    base = nn.Linear(9, 6, bias=bias, dtype=dtype).requires_grad_(False)
    made = SVDLinear(base, 2, 0.7, dropout=0.3)
    made.start_at(*AdaLoRA.inits["normal"](base, 2, 0.7, torch.Generator().manual_seed(seed)))
    x = torch.randn(4, 9, dtype=dtype)
    for mode in (True, False):
        assert torch.equal(made.train(mode)(x), base(x))


def test_the_start_is_normal_and_depends_on_seed_and_path():
    def start(seed):
        model = tiny_llama(hidden_size=256, head_dim=64)
        minift.apply(model, AdaLoRA(r=16), seed=seed)
        return triplets(model, "default")

    for layer in start(0):
        for p in (layer.lora_A, layer.lora_B):
            # 16 * 128 numbers or more: the deviation is within 5 standard errors, 1 / sqrt(2 n) of it
            assert abs(p.std() / 0.02 - 1) < 5 / (2 * p.numel()) ** 0.5
            assert abs(p.mean()) < 5 * 0.02 / p.numel() ** 0.5
        assert (layer.lora_E == 0).all()
    first, again, other = start(0), start(0), start(1)
    assert torch.equal(first[0].lora_B, again[0].lora_B)
    assert not torch.equal(first[0].lora_B, other[0].lora_B)
    assert not torch.equal(first[0].lora_B, first[2].lora_B)


# 2 blocks of 7 products in a row, sums of at most 97 terms, each rounded to 2^-53, against the largest logit
FP64 = 2 * 7 * 97 * 2.0**-53


def test_a_merged_model_computes_what_the_adapter_did_also_inside_a_lora():
    model = tiny_llama(torch.float64)
    minift.apply(model, AdaLoRA(r=3, target_r=2))
    minift.apply(model, LoRA(r=2), name="outer")
    model.double()
    with torch.no_grad():
        for name in ("default", "outer"):
            for part in model.adapters[name].parts:
                for p in part.state().values():
                    p.normal_(std=0.3)
    want = model(IDS)
    limit = FP64 * want.abs().max().item()
    for name in ("default", "outer"):
        minift.merge(model, name)
        torch.testing.assert_close(model(IDS), want, rtol=0, atol=limit)
    assert not torch.allclose(want, tiny_llama(torch.float64)(IDS))


def test_inactive_it_is_the_base():
    model = tiny_llama()
    want = model(IDS)
    minift.apply(model, AdaLoRA(r=3, target_r=2))
    for part in model.adapters["default"].parts:
        nn.init.normal_(part.lora_E)
    assert not torch.equal(model(IDS), want)
    with model.adapters.disable():
        assert torch.equal(model(IDS), want)
