"""Text as it comes: pieces are certain when they are given, stop strings end a row and are cut off."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from minift.data.tokenizer import Tokenizer
from minift.models import pieces
from minift.models.generate import generate, stream
from minift.models.pieces import Pieces

TOKENS = ["a", "b", "ab", "ba.", ".\n", "é", "né", "€", "😀", "\n\n"]


class ByteTokenizer:
    """As byte-level BPE: 256 bytes, then longer tokens; a token may hold half a character."""

    eos_ids = (0,)
    vocabulary = (
        *(bytes([i]) for i in range(256)),
        *(token.encode() for token in TOKENS),
        *(token.encode()[1:] for token in TOKENS[-5:]),
        *(b"b" + token.encode()[:-1] for token in TOKENS[-5:]),
    )

    def decode(self, ids):
        return b"".join(self.vocabulary[i] for i in ids).decode("utf-8", "replace")

    def encode(self, text):
        return list(text.encode())


BYTES = ByteTokenizer()
several = st.sampled_from([97, 98, 46, 10, 0xC3, 0xA9, 0xE2, 0xF0, *range(256, len(BYTES.vocabulary))])
rows = st.lists(several, max_size=12)
stops = st.lists(st.text("ab.\né€", min_size=1, max_size=4), max_size=3).map(tuple)


def run(module, ids, stop=()):
    """(pieces given at each token and at the end, the row)."""
    row, given_out = module.Pieces({-1}, BYTES, stop), []
    for token in ids:
        if not row.done:
            given_out.append(row.add(token))
            held = row.text[row.sent :].rstrip("\ufffd")
            assert row.done or not held or any(s.startswith(held) and s != held for s in stop)
    return given_out + ([] if row.done else [row.end()]), row


def expected(ids, stop):
    """Text and number of tokens at the first moment at which a stop string is there, found from scratch."""
    for n in range(len(ids) + 1):
        text = BYTES.decode(ids[:n])
        found = [text.index(s) for s in stop if s in text]
        if found:
            return text[: min(found)], n
    return BYTES.decode(ids), len(ids)


@given(rows, stops)
def test_pieces_together_are_the_text_before_the_first_stop_string(ids, stop):
    given_out, row = run(pieces, ids, stop)
    text, tokens = expected(ids, stop)
    assert "".join(given_out) == text
    assert len(given_out) == tokens + (tokens == len(ids) and not any(s in BYTES.decode(ids) for s in stop))
    assert BYTES.decode(row.ids) == text and row.done


@given(rows)
def test_without_stop_strings_only_half_characters_are_held_back(ids):
    row = Pieces(set(), BYTES)
    for n, token in enumerate(ids, start=1):
        row.add(token)
        assert row.text[: row.sent] == BYTES.decode(ids[:n]).rstrip("\ufffd")
    row.end()
    assert row.ids == ids


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ã", "©"), ("Ġ", "a"), ("ð", "Ł")]
    names = [*alphabet, *(a + b for a, b in merges)]
    backend = Backend(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return backend


def metaspace():
    """As T5's: a space is part of the word behind it, and the first one of a text is not written."""
    names = ["<unk>", "\u2581", "\u2581a", "\u2581ab", "a", "b", "ba.", "."]
    backend = Backend(models.Unigram([(name, -float(i)) for i, name in enumerate(names)], 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_pieces_of_the_librarys_tokenizers_together_are_the_text(kind):
    tokenizer = Tokenizer(kind(), None, (), 0, None)
    size = tokenizer.backend.get_vocab_size()

    @given(st.lists(st.integers(0, size - 1) | st.integers(max(0, size - 8), size - 1), max_size=10), stops)
    def law(ids, stop):
        row = Pieces(set(), tokenizer, stop)
        given_out = "".join(row.add(token) for token in ids if not row.done)
        given_out += "" if row.done else row.end()
        text = tokenizer.decode(ids)
        first = min((text.index(s) for s in stop if s in text), default=len(text))
        assert text.startswith(given_out) and (len(given_out) == first or stop)
        assert not any(s in given_out for s in stop) and given_out.startswith(tokenizer.decode(row.ids))

    law()


def check_examples(module):
    """Text, a byte a token; stop strings; what is given out after each token and, unless stopped, last."""
    for text, stop, wanted in [
        ("né", (), ["n", "", "é", ""]),
        ("a€b", (), ["a", "", "", "€", "b", ""]),
        ("abc", ("abd",), ["", "", "abc", ""]),
        ("abd", ("abd",), ["", "", ""]),
        ("aab", ("aab",), ["", "", ""]),
        ("xabab.", ("abab.",), ["x", "", "", "", "", ""]),
        ("ababc", ("abc",), ["", "", "ab", "", ""]),
        ("ab", ("b", "ab"), ["", ""]),
        ("aab", ("ab", "b"), ["", "a", ""]),
        ("abab", ("ab",), ["", ""]),
        ("ab", ("abc",), ["", "", "ab"]),
        ("é.", ("é",), ["", ""]),
    ]:
        given_out, row = run(module, list(text.encode()), stop)
        assert given_out == wanted, text
        assert BYTES.decode(row.ids) == "".join(wanted), text


def test_pieces_of_worked_examples():
    check_examples(pieces)


def check_cut(module):
    """A token that the stop string begins in is spelled anew, up to there."""
    ba, dot = TOKENS.index("ba.") + 256, TOKENS.index(".\n") + 256
    for ids, at, kept in [
        ([97, ba], 3, [97, 98, 97]),
        ([97, ba], 4, [97, ba]),
        ([97, ba], 1, [97]),
        ([ba, dot, 97], 3, [ba]),
        ([ba, dot, 97], 4, [ba, 46]),
        ([0xC3, 0xA9, 97, 98], 2, [0xC3, 0xA9, 97]),
        ([0xC3, 0xA9, 97, 98], 0, []),
    ]:
        assert module.cut(BYTES, ids, at) == kept


def test_a_token_that_reaches_into_the_stop_string_is_spelled_anew():
    check_cut(pieces)


@pytest.mark.parametrize(
    "check, old, new",
    [
        (check_examples, '.rstrip("\\ufffd")', ""),
        (check_examples, "range(1, len(s))", "range(1, len(s) - 1)"),
        (check_examples, "range(1, len(s))", "range(2, len(s))"),
        (check_examples, "- begun(whole, self.stop)", ""),
        (check_examples, "max(lengths, default=0)", "min(lengths, default=0)"),
        (check_examples, "self.text[: min(found)]", "self.text[: max(found)]"),
        (check_examples, "if at >= 0]", "if at > 0]"),
        (check_examples, "self.ids = cut(", "cut("),
        (check_cut, "[:at], len(ids)", "[: at + 1], len(ids)"),
        (check_cut, "ids[:whole] + (tokenizer.encode(rest) if rest else [])", "ids[:whole]"),
        (check_cut, "text.startswith(tokenizer.decode(ids[:whole]))", "whole <= at"),
    ],
)
def test_the_checks_notice_a_changed_line(check, old, new):
    assert not survives(check, pieces, old, new)


def test_a_part_that_no_token_spells_is_left_out():
    class Spacing(ByteTokenizer):
        def encode(self, text):
            return super().encode(" " + text)

    assert pieces.cut(Spacing(), [97, TOKENS.index("ba.") + 256], 3) == [97]


def test_streams_give_what_generate_gives_row_by_row(tokenizer):
    model, prompts = tiny_llama(), [[5, 9, 11], [7], [40, 3]]
    for keywords in ({}, {"temperature": 2.0, "seed": 4}):
        whole = [tokenizer.decode(ids) for ids in generate(model, prompts, 12, **keywords)]
        for stop in ((), (whole[0][3:5], whole[1][6])):
            texts = ["", "", ""]
            for row, piece in stream(model, prompts, 12, tokenizer, stop=stop, eos_ids=(), **keywords):
                assert piece
                texts[row] += piece
            cut = [min((text.index(s) for s in stop if s in text), default=99) for text in whole]
            assert texts == [text[:at] for text, at in zip(whole, cut, strict=True)]
            ids = generate(model, prompts, 12, tokenizer=tokenizer, stop=stop, eos_ids=(), **keywords)
            assert [tokenizer.decode(row) for row in ids] == texts
            assert not stop or len(texts[0]) <= 3


def test_a_stream_computes_a_token_when_it_is_asked_for(tokenizer):
    """And the caller is not in inference mode between two pieces."""
    model, calls = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(torch.is_inference_mode_enabled()))
    pieces_given = stream(model, [[5, 9, 11]], 12, tokenizer, eos_ids=())
    assert calls == []
    for _ in range(3):
        next(pieces_given)
        assert not torch.is_inference_mode_enabled()
    assert 3 <= len(calls) < 12 and all(calls)
    model.lm_head.weight.requires_grad_(True)
    model(torch.tensor([[4]])).sum().backward()  # a step of training may come between


def test_a_stop_string_ends_the_work(tokenizer):
    model, calls = tiny_llama(), []
    text = tokenizer.decode(generate(model, [[5, 9, 11]], 12)[0])
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    generate(model, [[5, 9, 11]], 12, tokenizer=tokenizer, eos_ids=(), stop=text[2])
    assert len(calls) == text.index(text[2]) + 1


def test_what_is_wrong_is_said_before_the_first_piece_is_asked_for(tokenizer):
    for keywords, message in [
        ({"num_beams": 2}, "num_beams is 2, and beam search has no text before its end; use generate"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream(tiny_llama(), [[5]], 3, tokenizer, **keywords)
