"""Heads: what they compute, how a new one starts, what load_model says about them."""

import json

import pytest
import torch
from conftest import tiny_config, tiny_llama

import minift
from minift.models.heads import HEADS, default_labels, label_fields, last_token, read_labels
from minift.models.llama import Llama

IDS = torch.arange(24).view(2, 12) % 97
LABELS = {"sequence_classification": 3, "token_classification": 4}


@pytest.fixture
def folder(tmp_path):
    minift.save_model(tiny_llama(), tmp_path / "lm")
    return tmp_path / "lm"


def shapes_of(head, B=2, T=12, D=32, V=97):
    return {
        "causal_lm": (B, T, V),
        "sequence_classification": (B, 3),
        "token_classification": (B, T, 4),
        "question_answering": (B, T, 2),
        "none": (B, T, D),
    }[head]


@pytest.mark.parametrize("head", Llama.heads)
def test_every_head_gives_its_shape_and_survives_a_save(head, folder, tmp_path):
    model = minift.load_model(folder, head=head, num_labels=LABELS.get(head))
    out = model(IDS)
    assert tuple(out.shape) == shapes_of(head)
    minift.save_model(model, tmp_path / "saved")
    again = minift.load_model(tmp_path / "saved")
    assert again.head_kind == head and again.labels == model.labels and again.new_modules == ()
    assert torch.equal(again(IDS), out)


@pytest.mark.parametrize("head", ["sequence_classification", "token_classification", "question_answering"])
def test_what_a_checkpoint_lacks_is_new_and_the_rest_is_its_own(head, folder):
    model = minift.load_model(folder, head=head, num_labels=LABELS.get(head))
    assert [model.is_new(f"{path}.weight") for path in model.new_modules] == [True]
    old = dict(minift.load_model(folder).named_parameters())
    for name, parameter in model.named_parameters():
        if not model.is_new(name):
            assert torch.equal(parameter, old[name.replace("transformer.", "model.")])


def test_the_last_layer_of_another_classifier_is_not_taken_over(folder, tmp_path):
    tokens = minift.load_model(folder, head="token_classification", num_labels=3, seed=7)
    minift.save_model(tokens, tmp_path / "tokens")
    texts = minift.load_model(tmp_path / "tokens", head="sequence_classification", num_labels=3)
    assert texts.new_modules == ("score",) and not torch.equal(texts.head.weight, tokens.head.weight)
    again = minift.load_model(tmp_path / "tokens", head="token_classification")
    assert again.new_modules == () and torch.equal(again.head.weight, tokens.head.weight)


def test_a_new_head_depends_on_the_seed_alone(folder):
    def start(seed):
        return minift.load_model(folder, head="sequence_classification", num_labels=3, seed=seed).head.weight

    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))
    big = torch.cat([start(seed).flatten() for seed in range(40)])  # 3840 numbers from N(0, 0.02^2)
    # the standard error of a standard deviation is s / sqrt(2 n), of a mean s / sqrt(n); five of them each
    n = len(big)
    assert abs(big.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5 and abs(big.mean()) < 5 * 0.02 / n**0.5


def test_biases_of_a_new_head_are_zero(folder):
    model = minift.load_model(folder, head="question_answering")
    assert not model.head.bias.any() and model.head.weight.any()


def test_a_classifier_reads_the_last_real_token_wherever_the_padding_is(folder):
    model = minift.load_model(folder, head="sequence_classification", num_labels=3)
    short = IDS[:1, :7]
    alone = model(short)
    for pad in ((0, 5), (5, 0)):
        ids = torch.nn.functional.pad(short, pad, value=9)
        mask = torch.nn.functional.pad(torch.ones(1, 7, dtype=torch.long), pad)
        padded = model(ids, attention_mask=mask)
        # the same sums in another order: some 100 roundings of fp32 on numbers of this size
        assert (padded - alone).abs().max() < 100 * 2.0**-24 * alone.abs().max()


def test_last_token_by_hand():
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert last_token(hidden, None).tolist() == [[4, 5], [10, 11]]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert last_token(hidden, mask).tolist() == [[2, 3], [10, 11]]
    holes = torch.tensor([[1, 0, 1], [1, 0, 0]])
    assert last_token(hidden, holes).tolist() == [[4, 5], [6, 7]]


def test_labels_have_names(folder, tmp_path):
    model = minift.load_model(folder, head="sequence_classification", labels=("no", "yes"))
    minift.save_model(model, tmp_path / "named")
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"} and config["label2id"] == {"no": 0, "yes": 1}
    assert minift.load_model(tmp_path / "named", num_labels=2).labels == ("no", "yes")


def test_regression_is_one_output(folder):
    model = minift.load_model(folder, head="regression")
    assert model.head_kind == "sequence_classification" and tuple(model(IDS).shape) == (2, 1)
    assert model.to_hf()["problem_type"] == "regression"


def test_label_fields_read_back():
    assert read_labels(label_fields(("a", "b"))) == ("a", "b")
    assert read_labels({}) == default_labels(2) and read_labels({"num_labels": 3}) == default_labels(3)


@pytest.mark.parametrize("table", [{"0": "a", "2": "b"}, {"0": 1}, ["a"], {}, {"a": "0"}])
def test_a_label_table_with_holes_is_refused(table):
    with pytest.raises(ValueError, match="id2label must give the numbers from 0 a name"):
        read_labels({"id2label": table})


REFUSED = [
    ({"head": "classifier"}, "'classifier' is not one of causal_lm, masked_lm"),
    ({"head": "masked_lm"}, "Llama has no head 'masked_lm'; it has causal_lm"),
    ({"head": "sequence_classification"}, "say how many outputs it has with num_labels"),
    ({"head": "sequence_classification", "num_labels": 0}, "num_labels is 0"),
    ({"head": "sequence_classification", "num_labels": True}, "num_labels is True"),
    ({"head": "sequence_classification", "num_labels": 3, "labels": ("a", "b")}, "as many as num_labels"),
    ({"head": "sequence_classification", "labels": ("a", "a")}, "different names"),
    ({"head": "regression", "num_labels": 2}, "regression' has one output"),
    (
        {"head": "question_answering", "num_labels": 2},
        "num_labels and labels are for sequence_classification",
    ),
    ({"head": "sequence_classification", "labels": "ab"}, "labels is 'ab'; it is a list of names"),
    ({"head": "sequence_classification", "labels": (1, 2)}, "it is a list of names"),
    ({"num_labels": 2}, "num_labels and labels are for sequence_classification"),
]


@pytest.mark.parametrize("asked, message", REFUSED, ids=lambda x: str(x)[:50])
def test_a_head_that_cannot_be_is_refused_by_name(asked, message, folder):
    with pytest.raises(ValueError, match=message):
        minift.load_model(folder, **asked)


def test_a_stored_head_has_the_labels_it_was_saved_with(folder, tmp_path):
    minift.save_model(minift.load_model(folder, head="sequence_classification", num_labels=3), tmp_path / "c")
    with pytest.raises(ValueError, match="has 3 labels .* and 5 were asked for"):
        minift.load_model(tmp_path / "c", num_labels=5)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "problem_type": "regression"}))
    with pytest.raises(ValueError, match="problem_type 'regression' with 3 label"):
        minift.load_model(tmp_path / "c")


def test_labels_without_a_classifier_are_refused():
    with pytest.raises(ValueError, match="classifiers, and only they, have labels"):
        Llama(tiny_config(), "causal_lm", ("a",))
    assert set(Llama.heads) <= set(HEADS)
