"""Generation: cache, batches, ends, and what does not go together."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

import minift
from minift.models.generate import generate

prompts = st.lists(st.lists(st.integers(2, 96), min_size=1, max_size=8), min_size=1, max_size=4)
ways = st.sampled_from([{}, {"repetition_penalty": 1.4}, {"num_beams": 3}, {"temperature": 1.5, "top_k": 9}])


@given(prompts, st.integers(1, 6), ways)
def test_tokens_are_the_same_with_and_without_the_cache_and_in_any_batch(prompts, n, way):
    """A sampled text depends on its place, so it is compared at its place in a smaller batch."""
    model = tiny_llama()
    together = generate(model, prompts, n, **way)
    assert together == generate(model, prompts, n, use_cache=False, **way)
    if "temperature" in way:
        assert together[:1] == generate(model, prompts[:1], n, **way)
    else:
        assert together == [generate(model, [p], n, **way)[0] for p in prompts]


def test_greedy_is_the_argmax_of_the_logits():
    model, ids = tiny_llama(), [5, 9, 11]
    for token in generate(model, [ids], 5)[0]:
        assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids = [*ids, token]


def test_the_repetition_penalty_counts_every_token_of_a_text_and_no_padding():
    """The padding's id is the likeliest next token, so that a penalty on it would show."""
    model = tiny_llama()
    likeliest = generate(model, [[7]], 1)[0][0]
    for pad_id in (0, likeliest):
        short, _ = generate(model, [[7], [5, 9, 11]], 5, repetition_penalty=1e6, pad_id=pad_id)
        assert short[0] == likeliest
        assert len({7, *short}) == 6  # a penalty as high as this forbids a positive score's token


def test_a_row_stops_at_its_end_token_and_others_go_on():
    model = tiny_llama()
    free = generate(model, [[5, 9, 11], [7]], 8)
    end = free[0][2]
    stopped = generate(model, [[5, 9, 11], [7]], 8, eos_ids=(end,))
    assert stopped[0] == free[0][: free[0].index(end)]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])


def test_the_ends_are_the_tokenizers_unless_others_are_given(tokenizer):
    model = tiny_llama()
    free = generate(model, [[5, 9, 11]], 8)[0]
    tokenizer.eos_ids = (free[3],)
    short = generate(model, [[5, 9, 11]], 8, tokenizer=tokenizer)[0]
    assert short == free[: free.index(free[3])]
    assert generate(model, [[5, 9, 11]], 8, tokenizer=tokenizer, eos_ids=()) == [free]


@pytest.mark.parametrize(
    "prompts, keywords, message",
    [
        ([[1] * 60], {"max_new_tokens": 5}, "exceed the model's context of 64"),
        ([], {"max_new_tokens": 5}, "at least one prompt"),
        ([[97]], {"max_new_tokens": 1}, "prompt id 97, the vocabulary is 0 to 96"),
        ([[-2]], {"max_new_tokens": 1}, "prompt id -2, the vocabulary is 0 to 96"),
        ([[1], []], {"max_new_tokens": 5}, "at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"min_p": 1.5}, "min_p is 1.5"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be positive"),
        ([[1]], {"num_beams": 0}, "num_beams is 0"),
        ([[1]], {"num_beams": 2, "length_penalty": 11}, "length_penalty is 11; it must be from -10 to 10"),
        ([[1]], {"num_beams": 2, "early_stopping": "yes"}, "early_stopping is 'yes'; it is True, False or"),
        ([[1]], {"stop": ["a", ""]}, r"stop is \('a', ''\); give texts"),
        ([[1]], {"stop": "a"}, r"stop is \('a',\), and texts need a tokenizer"),
        ([[1]], {"num_beams": 2, "temperature": 0.5}, "num_beams is 2 and temperature is 0.5"),
        ([[1]], {"num_beams": 2, "stop": "a"}, r"num_beams is 2 and stop is \('a',\)"),
        ([[1]], {"length_penalty": 0.5}, "length_penalty is 0.5 and num_beams is 1"),
        ([[1]], {"early_stopping": True}, "early_stopping is True and num_beams is 1"),
        ([[1]], {"top_k": 5}, "top_k is 5 and temperature is 0"),
        ([[1]], {"top_p": 0.5}, "top_p is 0.5 and temperature is 0"),
        ([[1]], {"min_p": 0.5}, "min_p is 0.5 and temperature is 0"),
    ],
)
def test_bad_input_is_one_sentence(prompts, keywords, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_llama(), prompts, **{"max_new_tokens": 1, **keywords})


def test_a_model_without_a_language_models_head_is_refused():
    model = tiny_llama()
    model.head_kind = "sequence_classification"
    with pytest.raises(ValueError, match="causal_lm or seq2seq_lm, and this model has the head sequence_cl"):
        generate(model, [[5]], 1)


def test_beams_with_an_adapter_for_each_text_are_refused_and_with_one_for_all_are_not():
    model = tiny_llama()
    minift.apply(model, minift.LoRA(r=2))
    assert len(generate(model, [[5], [6]], 2, num_beams=2)) == 2
    with model.adapters.rows(["default", None]):
        assert len(generate(model, [[5], [6]], 2)) == 2
        with pytest.raises(ValueError, match="num_beams is 2, and adapters were chosen for each text"):
            generate(model, [[5], [6]], 2, num_beams=2)


def test_virtual_tokens_stay_with_their_beams():
    """The first call is over the texts, and the cache grows to the beams with what the prompt put there."""
    model = tiny_llama()
    minift.apply(model, minift.PromptTuning(num_virtual_tokens=3))
    for keywords in ({"num_beams": 3}, {}):
        cached = generate(model, [[5, 9, 4], [6]], 6, **keywords)
        assert cached == generate(model, [[5, 9, 4], [6]], 6, use_cache=False, **keywords)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_a_reordered_cache_goes_on_as_the_texts_that_it_holds(rows):
    model, ids = tiny_llama(), torch.tensor([[5, 9, 11], [8, 8, 3], [4, 60, 2]])
    cache, rows = model.new_cache(3, 5), torch.tensor(rows)
    with torch.no_grad():
        model(ids, cache=cache)
        storage = cache.keys.data_ptr()
        cache.reorder(rows)
        assert (cache.keys.data_ptr() == storage) == (len(rows) == 3)  # its own as long as the number stays
        assert tuple(cache.keys.shape) == (2, len(rows), 2, 5, 8)
        last = torch.arange(len(rows))[:, None] + 20
        whole = model(torch.cat((ids[rows], last), dim=1))[:, -1]
        assert torch.allclose(model(last, cache=cache)[:, -1], whole, atol=1e-5)  # as cached and uncached do
