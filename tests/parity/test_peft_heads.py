"""Adapters with a new head, beside PEFT: their files in ours, ours in theirs, equal logits."""

import pytest
import torch
from conftest import tiny_llama

import minift
from minift.methods.base import trainable

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).view(2, 12) % 97
AUTO = {
    "sequence_classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token_classification": ("AutoModelForTokenClassification", "TOKEN_CLS"),
}
# 2 blocks of sums over at most 48 terms, rounded in another order: well below 1e-5 of the logits' size
CLOSE = 1e-5


@pytest.fixture(params=AUTO)
def bases(request, tmp_path):
    """(our model with a new head, theirs with the same base, its PEFT task)."""
    minift.save_model(tiny_llama(pad_token_id=0), tmp_path / "lm")
    ours = minift.load_model(tmp_path / "lm", head=request.param, num_labels=3)
    auto, task = AUTO[request.param]
    theirs = getattr(transformers, auto).from_pretrained(tmp_path / "lm", num_labels=3)
    return ours, theirs.eval(), task


def close(ours, theirs):
    with torch.no_grad():
        a, b = ours(IDS), theirs(input_ids=IDS).logits
    assert (a - b).abs().max() <= CLOSE * b.abs().max()


CASES = {
    "lora": (minift.LoRA(r=2), lambda task: peft.LoraConfig(task_type=task, r=2, lora_alpha=4)),
    "ia3": (minift.IA3(), lambda task: peft.IA3Config(task_type=task)),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_our_head(name, bases, tmp_path):
    ours, theirs, _ = bases
    minift.apply(ours, CASES[name][0])
    with torch.no_grad():
        for p in trainable(ours).values():
            p.add_(0.1 * torch.randn_like(p))
    minift.save_adapter(ours, tmp_path / "a")
    close(ours, peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval())


@pytest.mark.parametrize("name", CASES)
def test_we_load_the_head_that_peft_saved(name, bases, tmp_path):
    ours, theirs, task = bases
    theirs = peft.get_peft_model(theirs, CASES[name][1](task)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "a")
    minift.load_adapter(ours, tmp_path / "a")
    assert next(site.path for site in ours.adapters["default"].plan.head) == "score.weight"
    close(ours, theirs)


def test_virtual_tokens_and_the_head_have_pefts_keys(bases, tmp_path):
    ours, theirs, task = bases
    theirs = peft.get_peft_model(theirs, peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)).eval()
    theirs.save_pretrained(tmp_path / "a")
    minift.load_adapter(ours, tmp_path / "a")
    minift.save_adapter(ours, tmp_path / "b")
    a, b = (peft.load_peft_weights(str(tmp_path / d), device="cpu") for d in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if task == "SEQ_CLS":  # PEFT's token classifier gives logits for the virtual tokens too
        close(ours, theirs)
