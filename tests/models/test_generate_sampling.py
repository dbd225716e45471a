"""The next token: what is kept, with which probabilities, and what a seed decides."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import assume, given
from hypothesis import strategies as st
from mutants import survives

from minift.models import sampling
from minift.models.generate import generate
from minift.models.sampling import Decoding, distribution, draw, penalize, uniforms

LOGITS = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3]]))  # in no order


def check_kept(module):
    """Worked examples: settings -> probabilities of the four tokens."""
    for settings, expected in [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.6}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_p": 0.81}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"min_p": 0.5}, [0, 0.625, 0, 0.375]),
        ({"min_p": 0.2}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.625, 0, 0.375]),  # 0.3's predecessors have 0.526 of the three
        ({"top_k": 2, "top_p": 0.62}, [0, 1, 0, 0]),  # 0.5 is 0.625 of the two
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        ({"temperature": 0.5, "min_p": 0.3}, [0, 0.25 / 0.34, 0, 0.09 / 0.34]),  # after the temperature
        ({"temperature": 0.5, "top_p": 0.65}, [0, 1, 0, 0]),  # 0.25 / 0.365 = 0.68
    ]:
        p, tokens = module.distribution(LOGITS, module.Decoding(**{"temperature": 1.0, **settings}))
        p = torch.zeros(1, 4, dtype=p.dtype).scatter(1, tokens, p / p.sum(dim=-1, keepdim=True))
        assert torch.allclose(p, torch.tensor([expected], dtype=p.dtype), atol=1e-6), settings


def test_each_setting_keeps_what_it_says():
    check_kept(sampling)


def check_penalty(module):
    scores = torch.tensor([[2.0, -2.0, 0.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    seen = torch.tensor([[0, 1, 1], [3, 3, 3]])  # a token twice is penalised once
    expected = torch.tensor([[1.0, -4.0, 0.0, 6.0], [1.0, 1.0, 1.0, 0.5]])
    assert torch.equal(module.penalize(scores, seen, 2.0), expected)
    assert torch.equal(module.penalize(scores, seen, 1.0), scores)


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    check_penalty(sampling)


def check_draw(module):
    """u inside each token's share, and at both ends of [0, 1); whatever the sum of p."""
    tokens, p = torch.tensor([[5, 7, 8, 3, 0, 1]]), torch.tensor([[0, 0.2, 0, 0.6, 0.2, 0]]).double()
    for scale in (1, 2, 1.1, 1.9, 1 + 2**-52, 1e-3):
        for u, token in [(0.0, 7), (0.1, 7), (0.5, 3), (0.79, 3), (0.81, 0), (1 - 2**-53, 0)]:
            assert module.draw(scale * p, tokens, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


def test_a_draw_inverts_the_cumulated_probabilities():
    check_draw(sampling)


@pytest.mark.parametrize(
    "check, old, new",
    [
        (check_kept, "before >= how.top_p", "before + p >= how.top_p"),
        (check_kept, "p.cumsum(dim=-1) - p", "p.cumsum(dim=-1)"),
        (check_kept, "/ how.temperature).softmax", "* how.temperature).softmax"),
        (check_kept, "how.min_p * p.amax(dim=-1, keepdim=True)", "how.min_p"),
        (check_kept, "how.top_k or V, V", "how.top_k + 1 or V, V"),
        (check_kept, "if how.top_k or how.top_p < 1:", "if how.top_k:"),
        (check_penalty, "held < 0", "held > 0"),
        (check_penalty, "gather(1, seen)", "gather(1, seen.flip(1))"),
        (check_draw, "reached <= u", "reached < u"),
        (check_draw, "* reached[:, -1:]", ""),
        (check_draw, "before.sum(dim=-1, keepdim=True)", "before.sum(dim=-1, keepdim=True) - 1"),
    ],
)
def test_the_checks_notice_a_changed_formula(check, old, new):
    assert not survives(check, sampling, old, new)


@given(st.integers(0, 2**31), st.sampled_from([0.2, 1.0, 3.0]), st.integers(0, 5))
def test_shares_of_many_draws_are_the_probabilities(seed, temperature, top_k):
    n, random = 4000, torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 6, generator=random)
    how = Decoding(temperature=temperature, top_k=top_k)
    p, tokens = distribution(scores, how)
    chosen = draw(p.expand(n, -1), tokens.expand(n, -1), uniforms(seed, 0, n))
    shares = torch.bincount(chosen, minlength=6) / n
    expected = torch.zeros(1, 6, dtype=p.dtype).scatter(1, tokens, p / p.sum())
    # 6 standard deviations: a share misses one in about 5e8 times
    assert ((shares - expected[0]).abs() <= 6 * (expected[0] * (1 - expected[0]) / n).sqrt() + 1e-12).all()


@given(st.integers(-(2**63), 2**63), st.integers(0, 50), st.integers(1, 40), st.integers(1, 40))
def test_the_numbers_of_a_row_are_its_own_and_the_first_ones_depend_on_nothing_else(seed, row, n, more):
    u = uniforms(seed, row, n)
    assert torch.equal(u, uniforms(seed, row, n + more)[:n])
    assert not torch.equal(u, uniforms(seed, row + 1, n)) and not torch.equal(u, uniforms(seed + 1, row, n))
    assert u.dtype == torch.float64 and (u >= 0).all() and (u < 1).all()


def test_sampling_repeats_with_its_seed_and_changes_with_it():
    model = tiny_llama()
    first = generate(model, [[3, 4]], 12, temperature=2.0, seed=1)
    assert first == generate(model, [[3, 4]], 12, temperature=2.0, seed=1)
    assert first != generate(model, [[3, 4]], 12, temperature=2.0, seed=2)


@given(
    st.lists(st.lists(st.integers(2, 96), min_size=1, max_size=6), min_size=1, max_size=3), st.integers(0, 9)
)
def test_a_sampled_row_depends_on_its_place_and_not_on_its_neighbours_or_the_number_of_tokens(others, seed):
    model, keywords = tiny_llama(), {"temperature": 1.5, "top_p": 0.95, "seed": seed}
    alone = generate(model, [[5, 9]], 6, **keywords)[0]
    assert generate(model, [[5, 9], *others], 9, **keywords)[0][:6] == alone
    twice = generate(model, [[5, 9], [5, 9]], 12, **keywords)
    assert twice[0] != twice[1]  # the same prompt at two places is two samples


@pytest.mark.parametrize("keywords", [{"temperature": 1e-40}, {"temperature": 3.0, "top_k": 1}])
def test_the_narrowest_sampling_is_greedy(keywords):
    model = tiny_llama()
    assert generate(model, [[5, 9]], 6, **keywords) == generate(model, [[5, 9]], 6)


@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.floats(0.01, 0.99))
def test_a_tighter_setting_keeps_fewer(seed, a, b):
    assume(a != b)
    scores = 3 * torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))

    def kept(**settings):
        p, tokens = distribution(scores, Decoding(temperature=1.0, **settings))
        return torch.zeros(2, 30).scatter(1, tokens, (p > 0).float()).bool()

    low, high = sorted((a, b))
    assert (kept(top_p=low) <= kept(top_p=high)).all() and kept(top_p=low).any(dim=1).all()
    assert (kept(min_p=high) <= kept(min_p=low)).all() and kept(min_p=high).any(dim=1).all()


def test_penalize_leaves_its_argument_alone():
    scores = torch.ones(1, 3)
    penalize(scores, torch.tensor([[0]]), 2.0)
    assert torch.equal(scores, torch.ones(1, 3))
