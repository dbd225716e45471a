"""The losses of the heads against their definitions, in fp64; transformers' are in tests/parity."""

import pytest
import torch
from conftest import tiny_config
from torch.nn.functional import cross_entropy

from minift.data.collate import IGNORED
from minift.models.llama import Llama
from minift.models.t5 import T5, T5Config
from minift.training import objective
from minift.training.objective import Objective

LABELS = {"sequence_classification": ("a", "b", "c"), "token_classification": ("x", "y")}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
UNIT = 2.0**-40  # sums of a few fp64 terms, which round at 2^-53


def tiny(head, labels=None):
    torch.manual_seed(1)
    model = Llama(tiny_config(), head, LABELS.get(head, ()) if labels is None else labels)
    return model.to(torch.float64).eval()


def test_a_sequence_classifier_sums_over_rows():
    model, labels = tiny("sequence_classification"), torch.tensor([2, 0])
    total, count = Objective(model)({**INPUTS, "labels": labels})
    assert count == 2
    assert total.item() == pytest.approx(
        cross_entropy(model(**INPUTS), labels, reduction="sum").item(), rel=UNIT
    )


def test_one_label_is_a_squared_error():
    model, labels = tiny("sequence_classification", ("number",)), torch.tensor([0.5, -2.0])
    total, count = Objective(model)({**INPUTS, "labels": labels})
    assert count == 2
    assert total.item() == pytest.approx(((model(**INPUTS)[:, 0] - labels) ** 2).sum().item(), rel=UNIT)


def test_a_token_classifier_reads_each_position_at_its_own_label():
    model, labels = tiny("token_classification"), torch.tensor([[1, IGNORED, 0, 1], [0, 1, IGNORED, IGNORED]])
    total, count = Objective(model)({**INPUTS, "labels": labels})
    logits = model(**INPUTS).flatten(0, 1)
    want = cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
    assert count == 5 and total.item() == pytest.approx(want.item(), rel=UNIT)


def test_a_decoder_behind_an_encoder_reads_its_labels_one_place_later():
    sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4}
    torch.manual_seed(1)
    model = T5(T5Config(**sizes, num_layers=1, num_decoder_layers=2), "seq2seq_lm").to(torch.float64).eval()
    labels = torch.tensor([[4, 5, 1], [7, 1, IGNORED]])
    read = torch.tensor([[0, 4, 5], [0, 7, 1]])  # the start, then all but the last label
    total, count = Objective(model)({**INPUTS, "labels": labels})
    logits = model(**INPUTS, decoder_input_ids=read).flatten(0, 1)
    want = cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
    assert count == 5 and total.item() == pytest.approx(want.item(), rel=UNIT)


@pytest.mark.parametrize(
    "head, lacks", [("causal_lm", "labels"), ("question_answering", "start_positions and end_positions")]
)
def test_a_batch_without_its_labels_is_refused(head, lacks):
    with pytest.raises(ValueError, match=f"the batch lacks {lacks}; it has input_ids, attention_mask"):
        Objective(tiny(head))(INPUTS)


def test_an_answer_is_the_mean_of_its_two_ends_and_padding_is_no_place_of_it():
    model, start, end = tiny("question_answering"), torch.tensor([0, 1]), torch.tensor([3, 1])
    total, count = Objective(model)({**INPUTS, "start_positions": start, "end_positions": end})
    want = 0
    for row, n in ((0, 4), (1, 3)):
        first, last = model(IDS[row : row + 1, :n]).unbind(-1)
        want += (cross_entropy(first, start[row, None]) + cross_entropy(last, end[row, None])).item() / 2
    assert count == 2 and total.item() == pytest.approx(want, rel=UNIT)


def test_chunks_change_no_loss_and_no_gradient(monkeypatch):
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 1, IGNORED]])
    found = []
    for rows in (1024, 3):
        monkeypatch.setattr(objective, "ROWS", rows)
        model = tiny("token_classification")
        total, _ = Objective(model)({**INPUTS, "labels": labels})
        total.backward()
        found.append((total.item(), model.score.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=UNIT)
    assert torch.allclose(found[0][1], found[1][1], rtol=0, atol=UNIT * found[0][1].abs().max().item())


def test_losses_of_half_precision_logits_are_fp32():
    model = tiny("sequence_classification").to(torch.bfloat16)
    assert Objective(model)({**INPUTS, "labels": torch.tensor([1, 2])})[0].dtype == torch.float32


def test_a_model_without_a_head_has_no_loss():
    with pytest.raises(ValueError, match="head 'none' has no loss; load the model with one of causal_lm"):
        Objective(tiny("none"))(INPUTS)
