"""Beam search against every continuation there is; encoder-decoders, on a small one that shows its parts."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

import minift
from minift.models import beam, texts
from minift.models.generate import generate
from minift.models.sampling import Decoding
from minift.models.texts import Texts

V, STEPS = 5, 3
PROMPTS = [[2, 3, 4], [1]]


@functools.cache
def everything(seed):
    """A model, and for each prompt log p (V^STEPS, STEPS) of the tokens of all continuations."""
    model, ys = (
        tiny_llama(vocab_size=V, seed=seed),
        torch.tensor(list(itertools.product(range(V), repeat=STEPS))),
    )
    tables = []
    for prompt in PROMPTS:
        before = torch.tensor(prompt).expand(len(ys), -1)
        logits = model(torch.cat((before, ys), dim=1))[:, len(prompt) - 1 : -1].detach()
        tables.append(logits.double().log_softmax(dim=-1).gather(2, ys[..., None])[..., 0])
    return model, ys.tolist(), tables


def likeliest(ys, log_p, ends, length_penalty):
    """The best of all continuations of at most STEPS tokens by log p / length^penalty, without its end."""
    scored = []
    for y, steps in zip(ys, log_p.tolist(), strict=True):
        n = next((n for n, token in enumerate(y, start=1) if token in ends), STEPS)
        scored.append((sum(steps[:n]) / n**length_penalty, [token for token in y[:n] if token not in ends]))
    return max(scored)[1]


def check_exhaustive(module):
    """As many beams as there are continuations miss none of them."""
    for seed, penalty, ends in itertools.product(range(2), (1.0, 0.0, 2.0, -1.0), (set(), {0}, {1, 3})):
        model, ys, tables = everything(seed)
        with torch.inference_mode():
            how = Decoding(num_beams=V**STEPS, length_penalty=penalty, early_stopping="never")
            found = module.beam_search(Texts(model, PROMPTS, STEPS), STEPS, how, ends)
            assert found == [likeliest(ys, log_p, ends, penalty) for log_p in tables]


def test_beams_without_number_find_the_likeliest_continuation():
    check_exhaustive(beam)


@pytest.mark.parametrize(
    "old, new",
    [
        ("length**self.how.length_penalty, ids", "self.how.length_penalty, ids"),
        ("key=lambda beam: -beam[0]", "key=lambda beam: beam[0]"),
        ("open_.view(-1, 1) + log_p", "log_p"),
        ("+ width * torch.arange(B", "+ 0 * torch.arange(B"),
        ("over[:, :n].nonzero()", "over[:, :1].nonzero()"),
        ("texts.reorder(", "(lambda rows: texts.reorder(rows.sort()[0]))("),
        (".append(tokens.gather(1, go_on).flatten())", ".append(tokens[:, : go_on.shape[1]].flatten())"),
        ("| (length == max_new_tokens)", ""),
        ("ids[:-1] if ids[-1] in ends else ids", "ids"),
    ],
)
def test_the_search_notices_a_changed_line(old, new):
    assert not survives(check_exhaustive, beam, old, new)


def check_done(module):
    """When a text of two beams is done: settings, scores log p and length of the finished, the open one's."""
    for settings, log_p, length, done in [
        ({}, -4.1, 2, True),  # -2.05 each token, and -2 is the worst finished
        ({}, -3.9, 2, False),
        ({}, -4.1, 3, False),
        ({"early_stopping": True}, -1.0, 2, True),
        ({"early_stopping": "never"}, -19.0, 2, False),  # ten tokens could make it -1.9
        ({"early_stopping": "never"}, -21.0, 2, True),
        ({"early_stopping": "never", "length_penalty": -1.0}, -0.9, 2, False),  # -1.8, and ever lower
    ]:
        text = module.Finished(Decoding(num_beams=2, **settings), 10)
        text.add(-2.0, 1, [1])
        text.close(-100.0, 1)
        assert not text.done
        text.add(-1.0, 1, [2])
        text.add(-3.0, 1, [3])
        assert [ids for _, ids in text.beams] == [[2], [1]]
        text.close(log_p, length)
        assert text.done == done, settings
        text.add(-0.5, 1, [4])
        assert (text.beams[0][1] == [4]) != done
        text.close(0.0, length)
        assert text.done or not done  # once done, done


def test_a_text_is_done_when_no_open_beam_can_be_better():
    check_done(beam)


@pytest.mark.parametrize(
    "old, new",
    [
        ('== "never" and self.how.length_penalty > 0', '== "never"'),
        ("length = self.max_new_tokens", "length = length"),
        ("self.how.early_stopping is True or", ""),
        ("< self.how.num_beams:", "< 1:"),
        ("self.beams[-1][0]", "self.beams[0][0]"),
        ("self.done |=", "self.done ="),
        ("if not self.done:", "if True:"),
        ("del self.beams[self.how.num_beams :]", "pass"),
    ],
)
def test_the_end_notices_a_changed_line(old, new):
    assert not survives(check_done, beam, old, new)


def test_one_beam_is_greedy():
    model = tiny_llama()
    with torch.inference_mode():
        found = beam.beam_search(Texts(model, [[5, 9, 11], [7]], 8), 8, Decoding(num_beams=1), set())
    assert found == generate(model, [[5, 9, 11], [7]], 8)


@pytest.mark.parametrize("ends", [(0, 1, 2), range(V)])
def test_beams_may_be_more_than_what_the_vocabulary_can_go_on_with(ends):
    """Where every token ends a text, the first step is the last."""
    found = generate(tiny_llama(vocab_size=V), PROMPTS, 6, num_beams=9, eos_ids=ends)
    assert len(found) == 2 and not {*found[0], *found[1]} & set(ends)


class Summer(torch.nn.Module):
    """An encoder-decoder: hidden state = tanh(mean of the encoded + sum of the decoder's tokens so far).

    Its cache holds the two parts; `encoder_calls` lists how many texts were encoded at a time.
    """

    head_kind, is_encoder_decoder, decoder_start_id, virtual_tokens = "seq2seq_lm", True, 3, 0
    device = torch.device("cpu")

    def __init__(self, V=23, D=8):
        super().__init__()
        torch.manual_seed(1)
        self.source, self.target = torch.nn.Embedding(V, D), torch.nn.Embedding(V, D)
        self.head, self.encoder_calls = torch.nn.Linear(D, V), []
        self.dims = SimpleNamespace(vocab=V, context=64)
        self.adapters = SimpleNamespace(by_rows=lambda: False)

    def encode(self, input_ids, attention_mask):
        self.encoder_calls.append(len(input_ids))
        return self.source(input_ids) * attention_mask[..., None]  # (B, S, D)

    def backbone(self, input_ids, attention_mask, decoder_input_ids, cache=None):
        parts = cache.parts if cache is not None else {}
        if "encoded" not in parts:
            states = self.encode(input_ids, attention_mask)
            parts["encoded"] = states.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
            parts["sum"] = torch.zeros(len(input_ids), states.shape[-1])
        assert len(attention_mask) == len(parts["encoded"]) and attention_mask.shape == input_ids.shape
        sums = parts["sum"][:, None] + self.target(decoder_input_ids).cumsum(dim=1)  # (B, T, D)
        parts["sum"] = sums[:, -1]
        return (parts["encoded"][:, None] + sums).tanh()

    def new_cache(self, B, capacity):
        cache = SimpleNamespace(parts={})
        cache.reorder = lambda rows: cache.parts.update({k: v[rows] for k, v in cache.parts.items()})
        return cache


some = st.lists(st.lists(st.integers(1, 22), min_size=1, max_size=7), min_size=1, max_size=3)
WAYS = st.sampled_from(
    [{}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.0}, {"repetition_penalty": 2.0}]
)


@given(some, WAYS)
def test_an_encoder_decoder_encodes_once_and_gives_the_same_tokens_in_any_batch(prompts, way):
    model = Summer()
    together = generate(model, prompts, 7, **way)
    assert model.encoder_calls == [len(prompts)] and all(len(ids) == 7 for ids in together)
    assert together == generate(model, prompts, 7, use_cache=False, **way)
    assert together == [generate(model, [p], 7, **way)[0] for p in prompts]


def test_a_decoder_begins_with_its_start_token():
    model, prompt, ids = Summer(), torch.tensor([[5, 9, 2]]), [3]
    for token in generate(model, prompt.tolist(), 6)[0]:
        hidden = model.backbone(prompt, torch.ones_like(prompt), torch.tensor([ids]))
        assert token == model.head(hidden)[0, -1].argmax()
        ids.append(token)


@given(some, st.booleans())
def test_padding_goes_to_its_side_and_the_mask_says_where(prompts, left):
    ids, mask = texts.pad(prompts, 0, left)
    assert [row[on].tolist() for row, on in zip(ids, mask.bool(), strict=True)] == prompts
    order = mask if left else mask.flip(1)
    assert (order[:, 1:] >= order[:, :-1]).all() and (ids * (1 - mask)).sum() == 0


def test_public_names():
    assert minift.generate is generate and minift.stream.__module__ == "minift.models.generate"
