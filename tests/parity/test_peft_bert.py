"""Adapter files of BERT's families in PEFT: the new head travels with them, and the logits are the same."""

import pytest
import torch
from families import TOLERANCE, largest, random_peer
from test_transformers_bert import fields_of

import minift
from minift.methods import METHODS
from minift.methods.base import trainable

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

FIELDS = {"prefix_tuning": {"num_virtual_tokens": 2}}
# PEFT has prefixes for models with a cache alone, and DistilBERT's class has none; a soft prompt is not here:
# PEFT's classifier reads the first virtual token, ours the first real one.
METHOD_NAMES = ("lora", "dora", "adalora", "ia3", "ln_tuning", "prefix_tuning")
CASES = [
    (family, method)
    for family in ("Bert", "Roberta", "DistilBert")
    for method in METHOD_NAMES
    if (family, method) != ("DistilBert", "prefix_tuning")
]


@pytest.mark.parametrize("family, method", CASES)
def test_a_classifier_trained_here_answers_the_same_in_peft(family, method, tmp_path):
    random_peer(f"{family}ForMaskedLM", **fields_of(f"{family}ForMaskedLM")).save_pretrained(tmp_path)
    ours = minift.load_model(tmp_path, head="sequence_classification", num_labels=3)
    minift.apply(ours, METHODS[method](**FIELDS.get(method, {})))
    with torch.no_grad():
        for p in trainable(ours).values():
            p.add_(0.1 * torch.randn_like(p))
    minift.save_adapter(ours, tmp_path / "adapter")
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    base = kind.from_pretrained(tmp_path, num_labels=3, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids, mask = torch.randint(1, 31, (3, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 5 + [0]])
    want = theirs(ids * mask, attention_mask=mask).logits
    assert (ours(ids * mask, attention_mask=mask) - want).abs().max() <= TOLERANCE * largest([want])
