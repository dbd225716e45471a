"""Generation: cache, batches, sampling."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from minift.models.generate import _choose, generate

prompts = st.lists(st.lists(st.integers(2, 96), min_size=1, max_size=8), min_size=1, max_size=4)


@given(prompts, st.integers(1, 6))
def test_greedy_tokens_are_the_same_with_and_without_the_cache_and_in_any_batch(prompts, n):
    model = tiny_llama()
    together = generate(model, prompts, n)
    assert together == generate(model, prompts, n, use_cache=False)
    assert together == [generate(model, [p], n)[0] for p in prompts]


def test_greedy_is_the_argmax_of_the_logits():
    model, ids = tiny_llama(), [5, 9, 11]
    for token in generate(model, [ids], 5)[0]:
        assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids = [*ids, token]


def test_a_row_stops_at_its_end_token_and_others_go_on():
    model = tiny_llama()
    free = generate(model, [[5, 9, 11], [7]], 8)
    end = free[0][2]
    stopped = generate(model, [[5, 9, 11], [7]], 8, eos_ids=(end,))
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, 4)
    random = torch.Generator().manual_seed(0)

    def share(**keywords):
        chosen = _choose(logits, keywords.get("t", 1.0), keywords.get("k", 0), keywords.get("p", 1.0), random)
        return torch.bincount(chosen, minlength=4) / 20000

    # 5 standard deviations of a share from 20000 draws: 5 sqrt(0.25 / 20000) = 0.018
    assert torch.allclose(share(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.018)
    assert torch.allclose(share(k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.018)
    assert torch.allclose(share(p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.018)
    assert torch.allclose(share(p=0.5), torch.tensor([1.0, 0, 0, 0]), atol=0)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    assert torch.allclose(share(t=0.5), squared, atol=0.018)


def test_sampling_repeats_with_its_seed_and_changes_with_it():
    model = tiny_llama()
    first = generate(model, [[3, 4]], 12, temperature=2.0, seed=1)
    assert first == generate(model, [[3, 4]], 12, temperature=2.0, seed=1)
    assert first != generate(model, [[3, 4]], 12, temperature=2.0, seed=2)


@pytest.mark.parametrize(
    "prompts, keywords, message",
    [
        ([[1] * 60], {"max_new_tokens": 5}, "exceed the model's context of 64"),
        ([], {"max_new_tokens": 5}, "at least one prompt"),
        ([[97]], {"max_new_tokens": 1}, "prompt id 97, the vocabulary is 0 to 96"),
        ([[1], []], {"max_new_tokens": 5}, "at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 1, "temperature": -1.0}, "temperature is -1"),
        ([[1]], {"max_new_tokens": 1, "top_p": 0.0}, "top_p is 0"),
        ([[1]], {"max_new_tokens": 1, "top_k": -1}, "top_k is -1"),
    ],
)
def test_bad_input_is_one_sentence(prompts, keywords, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(), prompts, **keywords)


def test_a_very_small_temperature_is_greedy():
    model = tiny_llama()
    assert generate(model, [[5, 9]], 6, temperature=1e-40) == generate(model, [[5, 9]], 6)
