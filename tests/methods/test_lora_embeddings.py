"""LoRA on embeddings, and on head and embedding where they are one weight, against dense fp64 models."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from torch import nn
from torch.func import functional_call

import minift
from minift.methods import low_rank
from minift.methods.base import trainable
from minift.methods.lora import LoRA
from minift.methods.low_rank import LoRAEmbedding, LoRALinear
from minift.methods.plan import Site
from minift.methods.trained import Trained

IDS = torch.arange(24).view(2, 12) % 97
HEAD, EMBED = "lm_head", "model.embed_tokens"
# fp64: 2 blocks of 7 products, there and back, sums of at most 97 terms, against the largest entry
FP64 = 4 * 7 * 97 * 2.0**-53


def adapted(method, tied):
    """A tiny fp64 model with an adapter away from its start, the plan, and path -> the weight there."""
    model = tiny_llama(torch.float64, tie_word_embeddings=tied)
    plan = minift.apply(model, method)
    model.double()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.2 * torch.randn_like(p))
    assert plan.trainable == sum(p.numel() for p in trainable(model).values())
    weights, s = {}, method.scaling
    for path, layer in model.adapters["default"].modules.items():
        if isinstance(layer, LoRALinear):
            weights[path] = layer.base.weight + s * layer.lora_B @ layer.lora_A
        elif isinstance(layer, LoRAEmbedding):
            weights[path] = layer.base.weight + s * (layer.lora_embedding_B @ layer.lora_embedding_A).T
        elif isinstance(layer, Trained):
            weights[path] = layer.weight
    return model, plan, {path: w.detach().clone() for path, w in weights.items()}


def dense(weights, tied=False):
    """Logits and d(loss)/d(weights) of a bare fp64 model with other weights; loss = sum of squares."""
    bare = tiny_llama(torch.float64, tie_word_embeddings=tied)
    weights = {f"{path}.weight": w.clone().requires_grad_() for path, w in weights.items()}
    logits = functional_call(bare, weights, (IDS,))  # of a tied weight, both uses
    gradients = torch.autograd.grad(logits.square().sum(), weights.values())
    return logits, dict(zip((n.removesuffix(".weight") for n in weights), gradients, strict=True))


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= FP64 * want.abs().max(), (got - want).abs().max() / want.abs().max()


@given(st.integers(1, 8), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 50))
def test_an_embedding_starts_as_the_base_to_the_bit(r, dtype, seed):
    table, site = nn.Embedding(11, 8).to(dtype), Site("", "", (11, 8), 0, r=r, scaling=1.5)
    layer = LoRA().wrap(table, site, torch.Generator().manual_seed(seed))
    assert layer.lora_embedding_A.shape == (r, 11) and (layer.lora_embedding_A == 0).all()
    assert layer.lora_embedding_B.shape == (8, r) and (layer.lora_embedding_B != 0).all()
    assert layer.lora_embedding_A.dtype == layer.lora_embedding_B.dtype == torch.float32
    ids = torch.randint(11, (3, 5))
    assert torch.equal(layer(ids), table(ids)) and layer(ids).dtype == dtype
    nn.init.normal_(layer.lora_embedding_A)
    layer.active = False
    assert torch.equal(layer(ids), table(ids))


def branch(module):
    """An embedding with a branch away from zero, and E + scaling (B A)^T, what it stands for."""
    torch.manual_seed(0)
    layer = module.LoRAEmbedding(nn.Embedding(11, 8, dtype=torch.float64), 3, 1.5).double()
    nn.init.normal_(layer.lora_embedding_A)
    nn.init.normal_(layer.lora_embedding_B)
    E = layer.base.weight + 1.5 * (layer.lora_embedding_B @ layer.lora_embedding_A).T
    return layer, E.detach().requires_grad_()


def compare(layer, E, y, want):
    """Values and gradients, dA = s B^T dE^T and dB = s dE^T A^T, to fp64 sums of at most 11 terms."""
    A, B, dy = layer.lora_embedding_A, layer.lora_embedding_B, torch.randn_like(y)
    dA, dB = torch.autograd.grad(y, (A, B), dy)
    [dE] = torch.autograd.grad(want, E, dy)  # (V, D)
    for got, wanted in ((y, want), (dA, 1.5 * B.T @ dE.T), (dB, 1.5 * dE.T @ A.T)):
        assert got.shape == wanted.shape and (got - wanted).abs().max() <= 1e-13 * (1 + wanted.abs().max())


def check_embedding(module):
    layer, E = branch(module)
    ids = torch.tensor([[3, 1, 3], [0, 10, 4]])
    y = layer(ids)
    compare(layer, E, y, nn.functional.embedding(ids, E))
    assert (layer.fold({"weight": layer.base.weight})["weight"] - E).abs().max() <= 1e-13
    layer.rows = torch.tensor([True, False])
    assert torch.equal(layer(ids)[1], layer.base(ids)[1]) and torch.equal(layer(ids)[0], y[0])


def check_tied_head(module):
    embedding, E = branch(module)
    base = nn.Linear(8, 11, bias=False, dtype=torch.float64)
    base.weight = embedding.base.weight
    head = module.TiedLoRAHead(base, embedding, 0.5).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = head(x)
    compare(embedding, E, y, x @ E.T)
    assert not list(head.parameters(recurse=False))
    stored = head.state()  # as a LoRA of the head's own, which peft reads
    assert torch.equal(stored["lora_A.weight"], embedding.lora_embedding_B.T)
    assert torch.equal(stored["lora_B.weight"], embedding.lora_embedding_A.T)
    assert (head.fold({"weight": base.weight})["weight"] - E).abs().max() <= 1e-13
    draws = torch.stack([head.train()(x).detach() for _ in range(2000)])
    error = (draws.mean(0) - y).abs() / (draws.std(0) / 2000**0.5)
    assert error.max() < 5  # five standard errors
    terms = (E - base.weight) * x.unsqueeze(-2)  # (2, 5, V, D), each kept with probability 1/2 and doubled
    assert abs((draws.var(0) / terms.square().sum(-1)).mean() - 1) < 0.1
    head.active = False
    assert torch.equal(head(x), base(x))


@pytest.mark.parametrize("check", [check_embedding, check_tied_head])
def test_the_branch_of_an_embedding_and_a_tied_head_is_the_dense_one(check):
    check(low_rank)


LOOKUP = "h = F.embedding(ids, self.lora_embedding_A.t())"
PRODUCT = "(self.lora_embedding_B.to(dtype) @ self.lora_embedding_A.to(dtype)).t()"
SHARE = "self.where_meant(LowRank.apply(dropped, y, A, B, e.scaling), y)"
FACTORS = "A, B = e.lora_embedding_B.t(), e.lora_embedding_A.t()"


@pytest.mark.parametrize(
    "check, old, new",
    [
        (check_embedding, "branch = self.scaling * (h @", "branch = (h @"),
        (check_embedding, "self.where_meant((y + branch).to(y.dtype), y)", "(y + branch).to(y.dtype)"),
        (check_embedding, LOOKUP, LOOKUP.replace("ids", "ids.flip(1)")),
        (check_embedding, LOOKUP, LOOKUP.replace("A.t()", "A.detach().t()")),
        (check_embedding, "self.scaling * " + PRODUCT, PRODUCT),
        (check_embedding, PRODUCT, PRODUCT.replace("to(dtype)", "float()")),
        (check_tied_head, SHARE, SHARE.replace("e.scaling", "1.0")),
        (check_tied_head, SHARE, SHARE.replace("dropped", "x")),
        (check_tied_head, SHARE, SHARE.replace("dropped", "F.dropout(x, 0.3, self.training)")),
        (check_tied_head, FACTORS, FACTORS.replace("B.t()", "B.detach().t()")),
        (check_tied_head, "return self.of[0].fold(tensors)", "return tensors"),
        (
            check_tied_head,
            "self.of = (embedding,)",
            "self.of = (embedding,); self.own = embedding.lora_embedding_A",
        ),
    ],
)
def test_mutants_of_the_two_are_noticed(check, old, new):
    assert not survives(check, low_rank, old, new)


def test_an_embedding_and_a_head_of_their_own_equal_the_dense_model():
    model, plan, weights = adapted(LoRA(r=3, target_modules=[EMBED, HEAD, "q_proj"]), tied=False)
    assert plan.trainable == 3 * (2 * (97 + 32) + 2 * (32 + 32))
    (logits, dW), embedding, head = (
        dense(weights),
        *(model.adapters["default"].modules[p] for p in (EMBED, HEAD)),
    )
    close(model(IDS), logits)
    model(IDS).square().sum().backward()
    s, A, B = 16 / 3, embedding.lora_embedding_A, embedding.lora_embedding_B
    close(A.grad, s * B.T @ dW[EMBED].T)
    close(B.grad, s * dW[EMBED].T @ A.T)
    close(head.lora_A.grad, s * head.lora_B.T @ dW[HEAD])
    close(head.lora_B.grad, s * dW[HEAD] @ head.lora_A.T)
    minift.merge(model)
    close(model(IDS), logits)


@pytest.mark.parametrize("targets", [[HEAD], [EMBED], [EMBED, HEAD]])
def test_tied_both_is_one_branch_on_the_one_weight(targets):
    method = LoRA(r=3, target_modules=[*targets, "v_proj"], tied="both")
    model, plan, weights = adapted(method, tied=True)
    assert (
        plan.trainable == 3 * (97 + 32 + 2 * (32 + 16)) and weights.keys() >= {EMBED} and HEAD not in weights
    )
    logits, dW = dense(weights, tied=True)
    close(model(IDS), logits)
    model(IDS).square().sum().backward()
    layer = model.adapters["default"].modules[EMBED]
    A, B = layer.lora_embedding_A, layer.lora_embedding_B
    close(A.grad, 16 / 3 * B.T @ dW[EMBED].T)  # dW sums over both uses
    close(B.grad, 16 / 3 * dW[EMBED].T @ A.T)
    minift.merge(model)
    assert model.tied and model.config.tie_word_embeddings
    close(model.embed_weight, weights[EMBED])
    close(model(IDS), logits)


@pytest.mark.parametrize("end", [HEAD, EMBED])
def test_tied_untie_adapts_one_end_and_merging_says_so_in_the_config(end):
    model, plan, weights = adapted(LoRA(r=3, target_modules=[end], tied="untie"), tied=True)
    assert [site.path for site in plan.sites] == [end] and plan.trainable == 3 * (97 + 32)
    start = model.embed_weight.detach().clone()
    logits, _ = dense({EMBED: start, HEAD: start} | weights)
    close(model(IDS), logits)
    minift.merge(model)
    assert not model.tied and not model.config.tie_word_embeddings
    close(model(IDS), logits)


def test_a_tied_end_is_refused_unless_it_is_said_what_is_meant():
    tied = tiny_llama(tie_word_embeddings=True)
    for end in (HEAD, EMBED):
        with pytest.raises(ValueError, match=rf"means {end}, and head and embedding are one .*tied='both'"):
            LoRA(target_modules=[end]).plan(tied)
        with pytest.raises(ValueError, match=r"are one weight \(tied\); say tied='both'"):
            LoRA(modules_to_save=[end]).plan(tied)
    with pytest.raises(ValueError, match="target_modules and modules_to_save both mean lm_head"):
        LoRA(target_modules=[EMBED], modules_to_save=[HEAD], tied="both").plan(tied)
    apart = LoRA(target_modules=[EMBED], modules_to_save=[HEAD], tied="untie").plan(tied)
    assert [site.path for site in apart.sites] == [EMBED, f"{HEAD}.weight"]
    with pytest.raises(ValueError, match=r"rank_pattern \['lm_head'\] counts for no layer"):
        LoRA(target_modules=[HEAD], tied="both", rank_pattern={HEAD: 2}).plan(tied)  # the embedding's branch


@pytest.mark.parametrize("end", [HEAD, EMBED])
@pytest.mark.parametrize("tied", ["both", "untie"])
def test_a_tied_end_that_trains_as_a_whole(end, tied):
    model, plan, weights = adapted(LoRA(r=2, modules_to_save=[end], tied=tied), tied=True)
    assert plan.trainable == 97 * 32 + 2 * 2 * (64 + 48)
    start = model.embed_weight.detach().clone()
    if tied == "both":
        assert torch.equal(weights.pop(HEAD), weights[EMBED])
    else:
        weights = {EMBED: start, HEAD: start} | weights
    logits, dW = dense(weights, tied=tied == "both")
    close(model(IDS), logits)
    model(IDS).square().sum().backward()
    trained = model.adapters["default"].modules[end]
    close(trained.weight.grad, dW[EMBED if tied == "both" else end])
    minift.merge(model)
    assert model.tied is model.config.tie_word_embeddings is (tied == "both")
    close(model(IDS), logits)
