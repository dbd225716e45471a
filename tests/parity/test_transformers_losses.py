"""The loss of every head, and its gradients, beside transformers' on the same tiny models."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift.data.collate import IGNORED
from minift.models.bert import Bert, BertConfig
from minift.models.t5 import T5, T5Config
from minift.training.objective import Objective

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

V, D = 61, 24
AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
}
LABELS = {"sequence_classification": ("a", "b", "c"), "token_classification": ("x", "y")}
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 40, "num_hidden_layers": 2}
CASES = [
    ("llama", "causal_lm", None),
    ("llama", "sequence_classification", None),
    ("llama", "sequence_classification", ("number",)),
    ("llama", "token_classification", None),
    ("llama", "question_answering", None),
    ("bert", "masked_lm", None),
    ("bert", "sequence_classification", None),
    ("bert", "sequence_classification", ("number",)),
    ("bert", "token_classification", None),
    ("bert", "question_answering", None),
    ("t5", "seq2seq_lm", None),
]
T5_SIZES = {"vocab_size": V, "d_model": D, "d_kv": 6, "d_ff": 40, "num_heads": 4}


def build(family, head, labels):
    """Random weights large enough that every part of the forward matters."""
    labels = labels or LABELS.get(head, ())
    if family == "llama":
        config = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        model = type(tiny_llama())(type(tiny_llama().config)(**config, pad_token_id=0), head, labels)
    elif family == "t5":
        model = T5(T5Config(**T5_SIZES, num_layers=2, num_decoder_layers=2), head)
    else:
        model = Bert(BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=32), head, labels)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "orm.weight" in name else 0.3 * torch.randn_like(p))
    return model.eval()


def batch_of(head, labels, B, T, short):
    """Padded on the right, the first row by `short`."""
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, T - short :] = 0
    ids = torch.randint(1, V, (B, T)) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if head == "sequence_classification":
        return batch | {"labels": torch.randn(B) if labels == 1 else torch.randint(labels, (B,))}
    if head == "question_answering":
        ends = torch.randint(0, T - short, (2, B))
        return batch | {"start_positions": ends[0], "end_positions": ends[1]}
    classes = torch.randint(0, labels or V, (B, T))
    some = (torch.rand(B, T) < 0.6) & mask.bool()
    some[-1, 1] = True  # at least one, also behind the first, which a causal model does not predict
    return batch | {"labels": torch.where(some, classes, IGNORED)}


@pytest.mark.parametrize("family, head, labels", CASES)
@settings(max_examples=3)
@given(B=st.integers(1, 3), T=st.integers(3, 9), short=st.integers(0, 1), seed=st.integers(0, 99))
def test_loss_and_gradients_agree(tmp_path_factory, family, head, labels, B, T, short, seed):
    torch.manual_seed(seed)
    ours = build(family, head, labels)
    folder = tmp_path_factory.mktemp("m")
    minift.save_model(ours, folder)
    peer = AUTO[head].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if head == "question_answering":
        short = 0  # theirs takes padding for a place of the answer, ours does not
    batch = batch_of(head, len(ours.labels), B, T, short)
    total, count = Objective(ours)(batch)
    loss, expected = total / count, peer(**batch).loss
    # Sums of at most 27 terms of fp32, in an order of their own: 1e-5 of the scale, as for the logits.
    assert abs(loss - expected) <= 1e-5 * (1 + expected.abs())
    loss.backward()
    expected.backward()
    theirs = dict(peer.named_parameters(remove_duplicate=False))  # tied: two names of one
    for name, p in ours.named_parameters():
        if theirs[name].grad is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert (p.grad - theirs[name].grad).abs().max() <= 1e-5 * (1 + theirs[name].grad.abs().max()), (
                name
            )
