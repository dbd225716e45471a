"""Adapter arithmetic against dense sums of the deltas in fp64."""

import math

import pytest
import torch
from deltas import CLOSE, deltas, dense_sum, nearest_of_its_rank, with_adapters
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

import minift
from minift.methods import algebra
from minift.methods.factors import Factors
from minift.methods.lora import LoRA

IDS = torch.arange(20).view(2, 10) % 97


@pytest.fixture(scope="module")
def many():
    """All of KINDS on one model; a test takes away what it adds."""
    return with_adapters(*"abcd")


def combined(model, weights, name="made", **options):
    """(deltas, errors) of a combination that is taken away again."""
    errors = minift.combine(model, weights, name, **options)
    got = deltas(model, name)
    model.adapters.remove(name)
    return got, errors


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_adapter_with_weight_1_is_itself_to_the_bit(name, dtype):
    model = with_adapters(name, dtype=dtype)
    want = model(IDS)
    assert set(minift.combine(model, {name: 1}, "one").values()) == {0.0}
    assert model.adapters.active() == ["one"] and type(model.adapters["one"].method) is LoRA
    assert torch.equal(model(IDS), want)
    for path, part in model.adapters["one"].modules.items():
        A, B = model.adapters[name].modules[path].factors()
        assert torch.equal(part.lora_A, A) and torch.equal(part.lora_B, B)
        assert part.scaling == model.adapters[name].modules[path].scaling


weight = st.floats(-2, 2).map(lambda x: round(x, 3))


@given(st.dictionaries(st.sampled_from("abcd"), weight, min_size=1))
def test_cat_is_the_weighted_sum_of_the_deltas(many, weights):
    want = dense_sum(many, weights)
    got, errors = combined(many, weights)
    assert got.keys() == want.keys() == errors.keys() and not any(errors.values())
    for path in want:
        torch.testing.assert_close(got[path], want[path], **CLOSE)


@given(weight, weight, weight)
def test_combining_is_linear_in_the_deltas(many, x, y, z):
    """x (y a + z b) + z c = xy a + xz b + z c."""
    minift.combine(many, {"a": y, "b": z}, "inner")
    got, _ = combined(many, {"inner": x, "c": z})
    many.adapters.remove("inner")
    want = dense_sum(many, {"a": x * y, "b": x * z, "c": z})
    for path in want:
        torch.testing.assert_close(got[path], want[path], **CLOSE)


@pytest.mark.parametrize("how", [{}, {"how": "svd", "r": 3}, *({"how": h} for h in ("ties", "dare"))])
def test_order_does_not_matter(how):
    more = {"ties": {"r": 3, "density": 0.3}, "dare": {"r": 3, "p": 0.4, "seed": 5}}.get(how.get("how"), {})
    model = with_adapters(*"abcd")
    weights = {"a": 0.5, "b": -1.5, "c": 2.0, "d": 1.0}
    first = minift.combine(model, weights, "first", **how, **more)
    second = minift.combine(model, dict(reversed(weights.items())), "second", **how, **more)
    assert first == pytest.approx(second, rel=1e-9, abs=1e-11)  # near ties of singular values are none here
    one, other = deltas(model, "first"), deltas(model, "second")
    for path in one:
        # fp64: four terms in another order, then an SVD, whose error grows with 1 / the gap at the cut
        torch.testing.assert_close(one[path], other[path], rtol=0, atol=1e-11)


@given(st.integers(1, 12), st.dictionaries(st.sampled_from("abcd"), weight, min_size=1))
def test_svd_is_the_nearest_of_its_rank_and_its_error_the_tail(many, r, weights):
    want = dense_sum(many, weights)
    got, errors = combined(many, weights, how="svd", r=r)
    for path, dense in want.items():
        nearest_of_its_rank(got[path], errors[path], dense, r)


def dense_ties(deltas, weights, density):
    """Trim, elect, disjoint mean: entry by entry, as the paper's algorithm 1 says it."""
    trimmed = []
    for w, delta in zip(weights, deltas, strict=True):
        flat = delta.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: max(1, round(density * len(flat)))]
        trimmed.append([w * flat[i] if i in set(order) else 0.0 for i in range(len(flat))])
    merged = []
    for values in zip(*trimmed, strict=True):
        total = sum(values)
        elected = (total > 0) - (total < 0)
        agree = [v for v in values if v * elected > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(deltas[0])


def random_terms(count=3, out=6, fan_in=5, seed=0):
    torch.manual_seed(seed)
    weights = (1.0, -0.5, 2.0)[:count]
    return [
        (w, Factors(torch.randn(r, fan_in).double(), torch.randn(out, r).double(), s))
        for w, r, s in zip(weights, (2, 3, 1), (1.5, 0.25, 2.0), strict=False)
    ]


def check(module):
    """cat, ties and dare on factors equal their dense definitions."""
    terms = random_terms()
    dense = [f.scaling * f.B @ f.A for _, f in terms]
    weights = [w for w, _ in terms]
    whole = module.cat(terms)
    want = sum(w * d for w, d in zip(weights, dense, strict=True))
    assert whole.r == 6 and whole.scaling == 1.5
    torch.testing.assert_close(whole.scaling * whole.B @ whole.A, want, **CLOSE)
    for density in (0.01, 0.2, 0.5, 1.0):
        torch.testing.assert_close(module.ties(terms, density), dense_ties(dense, weights, density), **CLOSE)
        assert (module.trim(dense[0], density) != 0).sum() == max(1, round(density * 30))
    opposite = [terms[0], (-1.0, terms[0][1])]  # no sign wins
    assert (module.ties(opposite, 1.0) == 0).all()

    named = dict(zip("xyz", terms, strict=True))
    for p in (0.0, 0.3, 0.75):
        total, kept = torch.zeros(6, 5, dtype=torch.float64), 0
        for name, (w, f) in named.items():
            alone = module.dare({name: (w, f)}, p, 7, "path")
            delta = w * f.scaling * f.B @ f.A
            on = alone != 0
            torch.testing.assert_close(alone[on], delta[on] / (1 - p), **CLOSE)
            total, kept = total + alone, kept + on.sum().item()
        torch.testing.assert_close(module.dare(named, p, 7, "path"), total, **CLOSE)
        # binomial(90, 1 - p): five standard deviations
        assert abs(kept - 90 * (1 - p)) <= 5 * math.sqrt(90 * p * (1 - p))


def test_cat_ties_and_dare_equal_their_dense_definitions():
    check(algebra)


@pytest.mark.parametrize(
    "old, new",
    [
        ("(w * (f.scaling / scaling))", "(w * f.scaling)"),
        ("(w * (f.scaling / scaling))", "(f.scaling / scaling)"),
        ("torch.cat([f.A.double() for _, f in terms])", "torch.cat([f.A.double() for _, f in terms[::-1]])"),
        ("return Factors(A, B, scaling)", "return Factors(A, B, terms[-1][1].scaling)"),
        ("w * trim(f.delta(), density)", "trim(f.delta(), density)"),
        ("elected = trimmed.sum(0).sign()", "elected = trimmed.sign().sum(0).sign()"),
        ("agrees.sum(0).clamp(min=1)", "len(terms)"),
        ("trimmed.sign() == elected", "trimmed.sign() != -elected"),
        ("delta.abs().flatten().topk", "delta.flatten().topk"),
        ("max(1, round(density * delta.numel()))", "max(1, int(density * len(delta)))"),
        ("max(1, round(density * delta.numel()))", "round(density * delta.numel())"),
        (">= p", ">= 1 - p"),
        ("delta / (1 - p)", "delta"),
        ("delta / (1 - p)", "delta / p if p else delta"),
        ("total = total + w * torch.where", "total = total + torch.where"),
        ('f"dare:{source}:{path}"', 'f"dare:{len(terms)}:{path}"'),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, algebra, old, new)


def test_dare_depends_on_seed_adapter_and_path_alone():
    terms = dict(zip("xy", [random_terms()[0]] * 2, strict=True))  # the same delta under two names
    once = algebra.dare(terms, 0.5, 1, "path")
    assert torch.equal(once, algebra.dare(terms, 0.5, 1, "path"))
    for other in (algebra.dare(terms, 0.5, 2, "path"), algebra.dare(terms, 0.5, 1, "other")):
        assert not torch.equal(once, other)
    x, y = (algebra.dare({name: terms[name]}, 0.5, 1, "path") for name in "xy")
    assert not torch.equal(x, y)


@pytest.mark.parametrize("how, options", [("ties", {"density": 0.4}), ("dare", {"p": 0.5, "seed": 3})])
def test_ties_and_dare_in_a_model_are_their_dense_result_at_rank_r(how, options):
    model = with_adapters(*"ab")
    weights = {"a": 0.75, "b": 1.25}
    both = {name: deltas(model, name) for name in "ab"}
    errors = minift.combine(model, weights, "made", how=how, r=4, **options)
    got = deltas(model, "made")
    assert got.keys() == both["a"].keys() | both["b"].keys()
    for path in got:
        inside = {n: d[path] for n, d in both.items() if path in d}
        if how == "ties":
            dense = dense_ties(list(inside.values()), [weights[n] for n in inside], 0.4)
        else:
            dense = sum(
                weights[n] * d * (torch.rand(d.shape, generator=mask(3, n, path)) >= 0.5) / 0.5
                for n, d in inside.items()
            )
        nearest_of_its_rank(got[path], errors[path], dense, 4)


def mask(seed, name, path):
    return algebra.generator(seed, f"dare:{name}:{path}")


def test_ties_of_one_adapter_that_keeps_everything_is_that_adapter():
    model = with_adapters("a")
    errors = minift.combine(model, {"a": 1.0}, "same", how="ties", r=3, density=1.0)
    want, got = deltas(model, "a"), deltas(model, "same")
    for path in want:
        torch.testing.assert_close(got[path], want[path], **CLOSE)
        assert errors[path] <= 1e-12
