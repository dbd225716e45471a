"""Rows of classifiers and of encoder-decoders: labels, special tokens, pairs, cutting, batches."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from minift.data.collate import (
    IGNORED,
    Labelled,
    Translation,
    collate,
    encode_labelled,
    encode_translation,
    micro_batches,
)
from minift.data.rows import LABELLED, check_row, label_arguments, label_targets, read_rows
from minift.data.tokenizer import Tokenizer, shares

CLS, SEP = 0, 1


@pytest.fixture(scope="module")
def bert():
    """Letters as ids from 2, in [CLS] text [SEP] pair [SEP]."""
    letters = {letter: i for i, letter in enumerate(["[CLS]", "[SEP]", *"abcdefghij"])}
    backend = Backend(models.WordLevel(letters, unk_token="[SEP]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return Tokenizer(backend, None, (SEP,), CLS, None)


def rows_of(*labels):
    return [check_row({"text": "a", "label": label}, f"row {i}", LABELLED) for i, label in enumerate(labels)]


def test_names_are_sorted_and_numbers_count_from_zero():
    assert label_arguments(rows_of("b", "a", "b")) == {"labels": ("a", "b")}
    assert label_arguments(rows_of(0, 3, 1.0)) == {"num_labels": 4}


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_a_name_is_its_place_among_the_models_labels(names):
    labels = ("c", "a", "b")
    assert [labels[i] for i in label_targets(rows_of(*names), labels)] == names
    assert label_targets(rows_of(*map(labels.index, names)), labels) == list(map(labels.index, names))


@given(st.lists(st.one_of(st.integers(-9, 9), st.floats(-1e30, 1e30)), min_size=1, max_size=9))
def test_one_output_takes_any_finite_number(numbers):
    assert label_targets(rows_of(*numbers), ("score",)) == list(map(float, numbers))


BAD_ROWS = {
    "no text": ({"label": 1}, "no field 'text'"),
    "no label": ({"text": "a"}, "no field 'label'"),
    "text not text": ({"text": 1, "label": 1}, "text is a int, not text"),
    "pair not text": ({"text": "a", "text_pair": 2, "label": 1}, "text_pair is a int, not text"),
    "label true": ({"text": "a", "label": True}, "label is a bool, not a number or a text"),
    "label null": ({"text": "a", "label": None}, "label is a NoneType"),
    "label a list": ({"text": "a", "label": [1]}, "label is a list"),
    "label blank": ({"text": "a", "label": " "}, "label is an empty text"),
    "label nan": ({"text": "a", "label": float("nan")}, "label is nan, not a finite number"),
    "label infinite": ({"text": "a", "label": float("inf")}, "label is inf, not a finite number"),
    "label too large": ({"text": "a", "label": 10**400}, "not a finite number of fp32"),
}


@pytest.mark.parametrize("row, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_names_file_and_line(tmp_path, row, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a", "label": 0}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{reason}"):
        read_rows(path, LABELLED)


@pytest.mark.parametrize(
    "labels, model, sentence",
    [
        (("a", "zz"), ("aa", "a"), r"row 1: label 'zz' is none of the model's 2 labels; nearest: 'a"),
        ((0, 2), ("a", "b"), r"row 1: label 2 is not a whole number from 0 to 1; head 'regression'"),
        ((0, -1), ("a", "b"), r"row 1: label -1 is not a whole number"),
        ((0.5,), ("a", "b"), r"row 0: label 0.5 is not a whole number"),
        (("a", 0), ("a", "b"), r"row 1: label 0 is a number, and that of row 0 is a text"),
        ((0, "a"), ("a", "b"), r"row 1: label 'a' is a text, and that of row 0 is a number"),
        (("a",), ("score",), r"row 0: label 'a' is a text, and the model has one output"),
    ],
)
def test_a_label_that_the_model_does_not_have_is_an_error(labels, model, sentence):
    with pytest.raises(ValueError, match=sentence):
        label_targets(rows_of(*labels), model)


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (("a", "a"), "every row has the label 'a'"),
        ((0, 0), "every row has the label 0"),
        ((0, 1.5), "row 1: label 1.5 is not a whole number"),
        ((0, 2**20), "row 1: label 1048576 is not a whole number"),
        (("a", 1), "row 1: label 1 is a number"),
    ],
)
def test_rows_that_make_no_classifier_are_refused(labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        label_arguments(rows_of(*labels))


def test_special_tokens_stand_around_the_texts_and_types_tell_them_apart(bert):
    row = {"text": "ab", "text_pair": "c", "where": "w"}
    e = encode_labelled(bert, row, 1, 9, with_types=True)
    assert (e.ids, e.types, e.supervised, e.tokens) == ([CLS, 2, 3, SEP, 4, SEP], [0, 0, 0, 0, 1, 1], 1, 6)
    assert encode_labelled(bert, row, 1, 9).types is None  # for a model without token types
    e = encode_labelled(bert, {"text": "ab", "where": "w"}, 1, 9, with_types=True)
    assert (e.ids, e.types) == ([CLS, 2, 3, SEP], None)
    assert e.ids == bert.encode("ab", special_tokens=True)


@given(st.text("abc", max_size=9), st.text("abc", max_size=9), st.integers(5, 30))
def test_cutting_keeps_the_special_tokens_and_the_starts_of_both_texts(bert, a, b, most):
    ids, _ = bert.encode_texts(a, b, most)
    whole, _ = bert.encode_texts(a, b)
    assert len(ids) == min(most, len(whole)) and ids[0] == CLS and ids[-1] == SEP
    end = ids.index(SEP)
    assert (
        bert.encode(a)[: end - 1] == ids[1:end] and bert.encode(b)[: len(ids) - end - 2] == ids[end + 1 : -1]
    )


@given(st.lists(st.integers(0, 20), min_size=1, max_size=2), st.integers(2, 30))
def test_the_longer_text_is_cut_first(lengths, room):
    found = shares(lengths, room)
    assert sum(found) == min(sum(lengths), room) and all(a <= b for a, b in zip(found, lengths, strict=True))
    for one, was in zip(found, lengths, strict=True):
        assert one == was or one >= max(found) - 1


def test_a_longer_text_is_an_error_unless_it_is_to_be_cut(bert):
    row = {"text": "abcdef", "where": "rows.jsonl:7"}
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:7: the text has 8 tokens, and 1 to 6 .*train.truncate"
    ):
        encode_labelled(bert, row, 0, 6)
    assert encode_labelled(bert, row, 0, 6, truncate=True).ids == [CLS, 2, 3, 4, 5, SEP]
    with pytest.raises(ValueError, match="no room for 1 text"):
        encode_labelled(bert, row, 0, 2, truncate=True)


def test_an_encoder_reads_the_prompt_and_the_decoder_learns_the_completion(bert):
    e = encode_translation(bert, {"prompt": "ab", "completion": "c", "where": "w"}, "none", 4)
    assert (e.ids, e.completion) == ([CLS, 2, 3, SEP], [4, SEP])
    assert (len(e), e.supervised, e.tokens) == (4, 2, 6)
    for prompt, completion, side in (("abc", "c", "prompt has 5"), ("a", "abcd", "completion has 5")):
        with pytest.raises(ValueError, match=rf"w: the {side} tokens, and 1 to 4 are possible"):
            encode_translation(bert, {"prompt": prompt, "completion": completion, "where": "w"}, "none", 4)
    with pytest.raises(ValueError, match="template 'chat' is for causal models"):
        encode_translation(bert, {"prompt": "a", "completion": "b", "where": "w"}, "chat", 4)


ids = st.lists(st.integers(0, 20), min_size=1, max_size=9)


@given(st.lists(st.tuples(ids, st.integers(0, 4), st.booleans()), min_size=1, max_size=6))
def test_a_batch_of_classifiers_has_a_label_for_each_row_and_types_where_some_row_has(rows):
    examples = [Labelled(i, y, "", [1] * len(i) if types else None) for i, y, types in rows]
    batch = collate(examples, 7)
    assert batch["labels"].tolist() == [y for _, y, _ in rows] and batch["labels"].dtype == torch.int64
    assert ("token_type_ids" in batch) == any(types for *_, types in rows)
    for b, (i, _, types) in enumerate(rows):
        rest = batch["input_ids"].shape[1] - len(i)
        assert batch["input_ids"][b].tolist() == i + [7] * rest
        assert batch["attention_mask"][b].tolist() == [1] * len(i) + [0] * rest
        if "token_type_ids" in batch:
            assert batch["token_type_ids"][b].tolist() == [int(types)] * len(i) + [0] * rest


def test_numbers_to_predict_stay_numbers():
    assert collate([Labelled([1], 0.5, ""), Labelled([1, 2], 2.0, "")], 0)["labels"].dtype == torch.float32


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), st.integers(1, 40))
def test_both_sides_of_an_encoder_decoder_are_padded_apart(rows, most):
    examples = [Translation(a, b, "") for a, b in rows]
    for part in micro_batches(examples, most):
        batch = collate(part, 7)
        assert len(part) == 1 or max(batch[x].numel() for x in ("input_ids", "labels")) <= most
        for row, e in enumerate(part):
            assert batch["labels"][row].tolist()[: len(e.completion)] == e.completion
            assert (batch["labels"][row, len(e.completion) :] == IGNORED).all()
            assert batch["attention_mask"][row].sum() == len(e.ids)
