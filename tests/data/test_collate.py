"""Labels, padding, micro-batches, the order of an epoch, and rows to ids."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minift.data.collate import IGNORED, Example, collate, encode_row, epoch_order, micro_batches

PAD = 7  # also drawn as an ordinary id, so that padding is told by position alone


@st.composite
def example(draw):
    ids = draw(st.lists(st.integers(0, 20), min_size=1, max_size=12))
    return Example(ids, draw(st.integers(0, len(ids))), "row")


batches = st.lists(example(), min_size=1, max_size=8)


@given(batches)
def test_ids_stand_on_the_left_and_the_rest_is_masked_padding(examples):
    batch = collate(examples, PAD)
    for i, e in enumerate(examples):
        n = len(e)
        assert batch["input_ids"][i, :n].tolist() == e.ids
        assert (batch["input_ids"][i, n:] == PAD).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)


@given(batches)
def test_a_batch_is_as_wide_as_its_longest_row(examples):
    batch = collate(examples, PAD)
    assert {tuple(t.shape) for t in batch.values()} == {(len(examples), max(map(len, examples)))}
    assert {t.dtype for t in batch.values()} == {torch.int64}


@given(batches)
def test_labels_are_ignored_exactly_on_prompt_and_padding(examples):
    """The first token of a text has no prediction, so without a prompt it is ignored as well."""
    labels = collate(examples, PAD)["labels"]
    for i, e in enumerate(examples):
        first = max(1, e.prompt_length)
        assert labels[i, :first].eq(IGNORED).all()
        assert labels[i, first : len(e)].tolist() == e.ids[first:]
        assert labels[i, len(e) :].eq(IGNORED).all()


@given(batches)
def test_supervised_counts_the_labels_that_are_left_after_the_shift(examples):
    labels = collate(examples, PAD)["labels"]
    assert (labels[:, 1:] != IGNORED).sum(1).tolist() == [e.supervised for e in examples]


@pytest.mark.parametrize("prompt_length, supervised", [(0, 3), (1, 3), (2, 2), (4, 0)])
def test_four_ids_supervise_those_after_the_prompt_and_never_the_first(prompt_length, supervised):
    e = Example([3, 4, 5, 6], prompt_length, "row")
    assert e.supervised == supervised
    assert (collate([e], PAD)["labels"][:, 1:] != IGNORED).sum() == supervised


@given(batches, st.integers(1, 40))
def test_micro_batches_partition_the_batch(examples, max_tokens):
    parts = micro_batches(examples, max_tokens)
    assert sorted(id(e) for part in parts for e in part) == sorted(map(id, examples))
    assert all(parts)


@given(batches, st.integers(1, 40))
def test_a_micro_batch_with_its_padding_stays_within_the_limit_or_is_one_row(examples, max_tokens):
    for part in micro_batches(examples, max_tokens):
        assert len(part) == 1 or collate(part, PAD)["input_ids"].numel() <= max_tokens


@given(batches)
def test_a_batch_that_fits_is_not_cut(examples):
    assert len(micro_batches(examples, len(examples) * max(map(len, examples)))) == 1


@given(st.integers(0, 200), st.integers(0, 2**64), st.integers(0, 1000))
def test_an_epoch_visits_every_row_once_in_an_order_of_seed_and_epoch_alone(n, seed, epoch):
    np.random.seed(1)
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    np.random.seed(2)
    assert epoch_order(n, seed, epoch) == order


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def row(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion, "where": "train.jsonl:3"}


def test_a_row_is_its_prompt_its_completion_and_the_end(tokenizer):
    e = encode_row(tokenizer, row("ab", "cd"), "none", 5)
    assert e.ids == [*tokenizer.encode("abcd"), tokenizer.eos_ids[0]]
    assert (e.prompt_length, e.supervised, e.where) == (2, 3, "train.jsonl:3")


def test_the_end_of_the_completion_is_learned(tokenizer):
    labels = collate(
        [
            encode_row(tokenizer, row("a", "b"), "none", 9),
            encode_row(tokenizer, row("long prompt", "b"), "none", 99),
        ],
        PAD,
    )["labels"]
    b, eos = tokenizer.encode("b")[0], tokenizer.eos_ids[0]
    assert labels[0].tolist() == [IGNORED, b, eos] + [IGNORED] * 10
    assert labels[1].tolist() == [IGNORED] * 11 + [b, eos]


class Wrapping:
    """One id for each character; 1 and 2 stand around a text where special tokens are asked for."""

    bos_id, eos_ids = 1, (2, 3)

    def encode(self, text, special_tokens=False):
        ids = [ord(c) for c in text]
        return [1, *ids, 2] if special_tokens else ids

    def encode_chat(self, messages, add_generation_prompt=False):
        (message,) = messages
        assert message["role"] == "user"
        return [5, *self.encode(message["content"]), *([6] if add_generation_prompt else [])]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(-2, 2))
def test_a_row_longer_than_the_limit_is_named_and_no_other(prompt, completion, room):
    r, tokens = row("p" * prompt, "c" * completion), 1 + prompt + completion + 1  # BOS and EOS
    limit = tokens + room
    if room >= 0:
        assert len(encode_row(Wrapping(), r, "none", limit)) == tokens
    else:
        with pytest.raises(ValueError, match=rf"train\.jsonl:3: .* {tokens} tokens, the limit is {limit};"):
            encode_row(Wrapping(), r, "none", limit)


def test_a_plain_prompt_keeps_the_start_its_tokenizer_adds_and_loses_the_end():
    e = encode_row(Wrapping(), row("ab", "c"), "none", 9)
    assert (e.ids, e.prompt_length) == ([1, ord("a"), ord("b"), ord("c"), 2], 3)


def test_a_chat_prompt_is_one_user_turn_and_the_start_of_the_answer():
    e = encode_row(Wrapping(), row("ab", "c"), "chat", 9)
    assert (e.ids, e.prompt_length) == ([5, ord("a"), ord("b"), 6, ord("c"), 2], 4)


def test_an_end_that_the_prompt_itself_spells_out_is_kept(tokenizer):
    """`none` is the prompt as it stands; only what the tokenizer adds behind it is taken off."""
    end = chr(30 + tokenizer.eos_ids[0])
    assert encode_row(tokenizer, row(f"a{end}", "b"), "none", 9).ids == tokenizer.encode(f"a{end}b{end}")


def test_behind_an_end_that_the_prompt_spells_out_the_added_one_is_still_taken_off():
    assert encode_row(Wrapping(), row("a\x02", "b"), "none", 9).ids == [1, ord("a"), 2, ord("b"), 2]


def test_an_unknown_template_is_an_error_that_lists_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match="template 'alpaca' is not one of none, chat"):
        encode_row(tokenizer, row("a", "b"), "alpaca", 9)


def test_a_tokenizer_without_an_end_cannot_encode_a_row(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "eos_ids", ())
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_row(tokenizer, row("a", "b"), "none", 9)
