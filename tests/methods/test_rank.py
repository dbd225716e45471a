"""Rank editing against dense singular value decompositions in fp64."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from deltas import CLOSE, KINDS, deltas, nearest_of_its_rank, snapshot, some, unchanged, with_adapters
from mutants import survives

import minift
from minift.methods import METHODS, rank
from minift.methods.base import trainable
from minift.methods.factors import Factors
from minift.methods.lora import LoRA
from minift.training.checkpoint import load_checkpoint, save_checkpoint

IDS = torch.arange(20).view(2, 10) % 97
Q0 = "model.layers.0.self_attn.q_proj"


def check_editing(module):
    """edited and advised on path -> factors."""
    old = {"x.q": some(), "y.q": some(5, 6, 3, 0.5, seed=1), "y.v": some(8, 8, 2, seed=2)}
    new, ranks = module.edited(old, {"x.q": 2, "q": 5}, "name", 3)
    assert ranks.ranks == {"x.q": 2, "y.q": 5, "y.v": 2} and "afresh" in ranks.note
    for path, f in old.items():
        dense, error = f.scaling * f.B @ f.A, ranks.errors[path]
        got = new[path]
        assert got.scaling == f.scaling and got.r == ranks.ranks[path]
        nearest_of_its_rank(got.scaling * got.B @ got.A, error, dense, got.r)
        if got.r == f.r:
            assert got.A.equal(f.A) and got.B.equal(f.B)
        row = next(row for row in ranks.rows if row.path == path)
        torch.testing.assert_close(row.norm, dense.norm().item(), **CLOSE)
    assert torch.equal(new["y.q"].A[:3], old["y.q"].A) and torch.equal(new["y.q"].B[:, :3], old["y.q"].B)
    assert (new["y.q"].B[:, 3:] == 0).all() and ranks.errors["y.q"] == ranks.errors["y.v"] == 0
    rows = new["y.q"].A[3:]
    assert 0.5 * 6**-0.5 < rows.abs().max() <= 6**-0.5 and torch.linalg.matrix_rank(new["y.q"].A) == 5
    for name, seed in (("name", 4), ("other", 3)):
        assert not torch.equal(module.edited(old, 5, name, seed)[0]["y.q"].A[3:], rows)
    twice = module.edited(module.edited(old, {"y.v": 4})[0], {"y.v": 6})[0]["y.v"]
    assert torch.linalg.matrix_rank(twice.A) == 6  # grown in two steps, no row comes twice

    mixed = torch.randn(2, 4, dtype=torch.float64)
    old["x.v"] = replace(old["x.q"], B=old["x.q"].B[:, :2] @ mixed)  # of rank 2, up to rounding
    thin = torch.tensor([1.0, 0.01], dtype=torch.float64)
    old["y.o"] = Factors(torch.eye(2, 5).double(), torch.eye(6, 2).double() * thin, 2.0)
    for energy in (0.3, 0.9, 0.99, 1.0):
        advice = module.advised(old, energy)
        for row in advice.rows:
            f = old[row.path]
            squares = torch.linalg.svdvals(f.scaling * f.B @ f.A).square()
            kept = squares[: row.after].sum() / squares.sum()
            assert kept >= energy - 1e-12 and row.before == f.r  # fp64 sums
            assert row.after == 1 or squares[: row.after - 1].sum() / squares.sum() < energy
            torch.testing.assert_close(
                row.error, squares[row.after :].sum().sqrt().item(), rtol=0, atol=1e-11
            )
        assert energy < 1 or list(advice.ranks.values()) == [4, 3, 2, 2, 2]
    grown = module.edited(old, {"q": 5}, "name", 3)[0]
    assert module.advised(grown, 1.0).ranks["y.q"] == 3  # new columns are no energy
    zero = {"x": replace(old["x.q"], B=torch.zeros(7, 4, dtype=torch.float64))}
    assert module.advised(zero).rows[0].after == 1 and module.advised(zero).rows[0].error == 0
    assert module.edited(zero, 2)[0]["x"].A.norm(dim=1).min() > 0.99  # a zero delta can still learn


def test_ranks_and_errors_are_those_of_the_dense_deltas():
    check_editing(rank)


@pytest.mark.parametrize(
    "old, new",
    [
        ("if rank < now.r:", "if rank <= now.r:"),
        ('f"{name}:{path}:{now.r}"', 'f"{name}:{path}"'),
        ('f"{name}:{path}:{now.r}"', 'f"{path}:{now.r}"'),
        ("torch.cat((A, rows.to(A)))", "torch.cat((rows.to(A), A))"),
        ("B.new_zeros(len(B), more)", "B.new_ones(len(B), more)"),
        ("A.shape[1] ** -0.5", "A.shape[0] ** -0.5"),
        ("A.shape[1] ** -0.5", "0.0"),
        ("now.scaling * S.norm().item(), error)", "S.norm().item(), error)"),
        ("cut(U, S, Vh, now.scaling, rank)", "cut(U, S, Vh, 1.0, rank)"),
        ("int((lost > allowed).sum())", "int((lost >= allowed).sum())"),
        ("int((lost > allowed).sum())", "int((lost > allowed).sum()) + 1"),
        ("max(1, int((lost", "max(0, int((lost"),
        ("(8 * len(S) * 2.0**-53) ** 2", "0.0"),
        ("(8 * len(S) * 2.0**-53) ** 2", "1e-3"),
        ("lost = S.square().flip(0).cumsum(0).flip(0)", "lost = S.flip(0).cumsum(0).flip(0)"),
        ("rules.get(first_fit(rules, path), min(factors.r, most))", "rules.get(path, min(factors.r, most))"),
    ],
)
def test_mutants_of_the_editing_are_noticed(old, new):
    assert not survives(check_editing, rank, old, new)


def whole_numbers(model, name):
    """Give an adapter small whole factors, whose products and sums are exact in any order."""
    for part in model.adapters[name].parts:
        with torch.no_grad():
            for p in part.parameters(recurse=False):
                p.copy_(torch.randint(-3, 4, p.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_keeps_the_function_to_the_bit(dtype):
    """Zero columns add exact zeros; with whole numbers no order of the sums matters either."""
    model = tiny_llama(dtype)
    minift.apply(model, LoRA(r=2, alpha=4.0, target_modules=["v_proj"]), name="x")
    whole_numbers(model, "x")
    layer = model.adapters["x"].modules["model.layers.0.self_attn.v_proj"]
    x = torch.randint(-3, 4, (5, 32)).to(dtype)
    before, old = layer(x), {p: (m.lora_A, m.lora_B) for p, m in model.adapters["x"].modules.items()}
    ranks = minift.set_rank(model, "x", 5)
    assert torch.equal(layer(x), before) and not any(ranks.errors.values())
    for path, part in model.adapters["x"].modules.items():
        assert torch.equal(part.lora_A[:2], old[path][0]) and torch.equal(part.lora_B[:, :2], old[path][1])
        assert (part.lora_B[:, 2:] == 0).all() and part.scaling == 2.0
    assert model.adapters["x"].method.alpha == 10.0


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
@pytest.mark.parametrize("r", [1, 2, 5, {"q_proj": 6, "layers.1.self_attn.v_proj": 1}, {"*": 3}])
def test_a_model_with_another_rank_computes_the_nearest_deltas(name, r):
    model = with_adapters(name)
    if isinstance(r, dict) and name in "bd":
        r = {{"b": "v_proj", "d": "q_proj"}[name]: 6}
    old = deltas(model, name)
    ranks = minift.set_rank(model, name, r)
    got, adapter = deltas(model, name), model.adapters[name]
    for path, dense in old.items():
        nearest_of_its_rank(got[path], ranks.errors[path], dense, ranks.ranks[path])
        assert adapter.modules[path].lora_A.shape[0] == adapter.modules[path].r == ranks.ranks[path]
    fresh = adapter.method.plan(tiny_llama())
    assert fresh == replace(adapter.plan, base_parameters=fresh.base_parameters)
    assert adapter.plan.base_parameters == fresh.base_parameters
    assert adapter.plan.trainable == sum(p.numel() for p in trainable(model).values())
    assert type(adapter.method) is LoRA and adapter.method.rslora == KINDS[name].rslora
    for site in adapter.plan.sites:
        assert adapter.modules[site.path].scaling == site.scaling


def test_what_was_edited_can_be_saved_trained_switched_and_merged(tmp_path):
    model = with_adapters("c", dtype=torch.float32)
    with model.adapters.disable():
        base = model(IDS)
    minift.set_rank(model, "c", {"q_proj": 2, "layers.0.self_attn.v_proj": 4})
    want = model(IDS)
    minift.save_adapter(model, tmp_path, "c")
    fresh = tiny_llama()
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), want)
    model(IDS).square().mean().backward()
    assert all(p.grad is not None for p in trainable(model).values())
    model.adapters.switch()
    assert torch.equal(model(IDS), base)
    minift.merge(fresh)
    # 2 blocks of 7 products in a row, sums of at most 97 terms, each rounded, against the largest logit
    limit = 2 * 7 * 97 * 2.0**-23 * want.abs().max().item()
    torch.testing.assert_close(fresh(IDS), want, rtol=0, atol=limit)


def test_the_optimizer_starts_afresh_and_an_old_checkpoint_does_not_fit(tmp_path):
    model = with_adapters("a", dtype=torch.float32)
    optimizer = torch.optim.AdamW(trainable(model).values())
    model(IDS).square().mean().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, trainable(model), optimizer, {}, {})
    old = set(map(id, trainable(model).values()))
    said = str(minift.set_rank(model, "a", 2))
    assert "their optimizer starts afresh, and older checkpoints do not fit" in said
    assert not old & set(map(id, trainable(model).values()))
    optimizer = torch.optim.AdamW(trainable(model).values())
    with pytest.raises(ValueError, match=r"lora_[AB] has shape .*, the model's is"):
        load_checkpoint(tmp_path / "checkpoint-1", trainable(model), optimizer, {}, {})


def test_frozen_adapters_stay_frozen_and_resting_ones_rest():
    model = with_adapters(*"ab", dtype=torch.float32)
    model.adapters.switch("b")
    training = {name.replace(".base", "") for name in trainable(model)}
    minift.set_rank(model, "a", 2)
    assert {name.replace(".base", "") for name in trainable(model)} == training
    assert model.adapters.active() == ["b"] and list(model.adapters) == ["a", "b"]


@pytest.mark.parametrize("tied", ["both", "untie"])
def test_embeddings_tied_heads_and_modules_to_save(tied):
    model = tiny_llama(torch.float64, tie_word_embeddings=True)
    saved = LoRA(r=3, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"], tied=tied)
    minift.apply(model, saved, name="x")
    for part in model.adapters["x"].parts:
        part.double()
        with torch.no_grad():
            for p in part.parameters(recurse=False):
                p.add_(0.1 * torch.randn_like(p))
    norm = model.adapters["x"].modules["model.norm"].weight
    sites = [site for site in model.adapters["x"].plan.sites if site.r]
    dense = {
        s.path: model.adapters["x"].modules[s.path].fold({"weight": torch.zeros(s.shape).double()})
        for s in sites
    }
    ranks = minift.set_rank(model, "x", {"embed_tokens": 2, "q_proj": 4})
    for site in model.adapters["x"].plan.sites:
        if site.r:
            got = model.adapters["x"].modules[site.path].fold({"weight": torch.zeros(site.shape).double()})
            error = ranks.errors["model.embed_tokens" if site.path == "lm_head" else site.path]
            nearest_of_its_rank(got["weight"], error, dense[site.path]["weight"], site.r)
    assert model.adapters["x"].modules["model.norm"].weight is norm
    again = model.adapters["x"].method.plan(tiny_llama(tie_word_embeddings=True))
    assert again == model.adapters["x"].plan
    assert again.trainable == sum(p.numel() for p in trainable(model).values())


def test_advice_is_followed_and_printed():
    model = with_adapters("a")
    advice = minift.advise(model, "a", 0.8)
    ranks = minift.set_rank(model, "a", advice)
    assert ranks.ranks == advice.ranks and ranks.errors == advice.errors
    for row in advice.rows:
        assert row.error**2 <= 0.2 * row.norm**2
    lines = str(advice).split("\n")
    assert lines[0].split() == ["module", "r", "new", "r", "norm", "error", "error%"] and len(lines) == 6
    assert lines[1].startswith(Q0) and lines[1].split()[1:3] == ["3", str(advice.ranks[Q0])]
    before, after = (sum(getattr(x, n) * sum(x.shape) for x in advice.rows) for n in ("before", "after"))
    assert lines[-1].startswith(f"parameters: {before:,} -> {after:,} || norm: ")
    assert str(ranks) == f"{advice}\n{rank.AFRESH}"


@pytest.mark.parametrize(
    "r, message",
    [
        (0, "r of model.layers.0.self_attn.q_proj is 0; a rank is a whole number"),
        (True, "is True; a rank is a whole number"),
        ({"q_proj": 2.0}, "r of q_proj is 2.0"),
        (17, r"r is 17, above the smaller side of .*v_proj \(16 x 32\); use at most 16"),
        ({"up_proj": 2}, r"r \['up_proj'\] fits no layer of the adapter; nearest: \["),
        ({}, "r names no layer"),
    ],
)
def test_bad_ranks_are_named_and_change_nothing(r, message):
    model = with_adapters("a", dtype=torch.float32)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        minift.set_rank(model, "a", r)
    unchanged(model, before)


@pytest.mark.parametrize(
    "kind", ["dora", "adalora", "ia3", "prompt_tuning", "bottleneck", "selective", "full"]
)
def test_other_methods_are_refused_by_name(kind):
    model = tiny_llama()
    minift.apply(model, METHODS[kind](), name="x")
    for edit in (lambda: minift.set_rank(model, "x", 2), lambda: minift.advise(model, "x")):
        with pytest.raises(ValueError, match=f"'x' is {kind}, whose rank is not edited"):
            edit()


def test_unknown_names_wrong_energies_and_numbers_that_are_not_finite_are_refused():
    model = with_adapters("a", dtype=torch.float32)
    with pytest.raises(ValueError, match="no adapter named 'x'; resident: \\['a'\\]"):
        minift.set_rank(model, "x", 2)
    for energy in (0, 1.1, True, "much", float("nan")):
        with pytest.raises(ValueError, match=f"energy is {energy!r}; it is a share above 0 and at most 1"):
            minift.advise(model, "a", energy)
    model.adapters["a"].modules[Q0].lora_A.data[0, 0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"the adapter at {Q0} is not finite; nothing was changed"):
        minift.set_rank(model, "a", 2)
    after = list(model.parameters())
    assert all(torch.equal(p, q) or p.isnan().any() for p, q in zip(before, after, strict=True))
