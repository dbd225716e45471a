"""Adapters on GPT-2 beside PEFT, whose layers there hold (in, out): files both ways give equal outputs."""

import pytest
import torch
from families import TOLERANCE, theirs_of
from tiny import tiny

import minift
from minift.methods import METHODS
from minift.methods.base import trainable

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity
IDS = torch.arange(18).view(2, 9)
LM = {"task_type": "CAUSAL_LM"}
CASES = {  # ours, theirs
    "lora": (minift.LoRA(r=3, alpha=6), lambda: peft.LoraConfig(r=3, lora_alpha=6, **LM)),
    "every layer": (
        minift.LoRA(r=3, target_modules=("all-linear",)),
        lambda: peft.LoraConfig(r=3, lora_alpha=16, target_modules="all-linear", **LM),
    ),
    "dora": (METHODS["dora"](r=3), lambda: peft.LoraConfig(r=3, lora_alpha=16, use_dora=True, **LM)),
    "ia3": (METHODS["ia3"](), lambda: peft.IA3Config(**LM)),
    "ln_tuning": (
        METHODS["ln_tuning"](),
        lambda: peft.LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"], **LM),
    ),
    "prefix": (
        METHODS["prefix_tuning"](num_virtual_tokens=4),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **LM),
    ),
    "prompt": (
        METHODS["prompt_tuning"](num_virtual_tokens=4),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **LM),
    ),
}


def assert_equal(ours, theirs):
    with torch.no_grad():
        a, b = ours(IDS), theirs(input_ids=IDS).logits
    b = b[:, b.shape[1] - a.shape[1] :]  # PEFT keeps the places of prompts
    assert (a - b).abs().max() <= TOLERANCE * b.abs().max()
    assert (a - tiny("GPT2LMHeadModel")(IDS)).abs().max() > 0.01  # the adapter does something


def move(parameters):
    with torch.no_grad():
        for p in parameters:
            p.add_(0.2 * torch.randn_like(p))


@pytest.mark.parametrize("ours, theirs", CASES.values(), ids=CASES)
def test_peft_loads_what_we_save_on_layers_that_are_transposed_there(tmp_path, ours, theirs):
    model = tiny("GPT2LMHeadModel")
    base = theirs_of(model, tmp_path / "base")
    minift.apply(model, ours)
    move(trainable(model).values())
    minift.save_adapter(model, tmp_path / "a")
    assert_equal(model, peft.PeftModel.from_pretrained(base, tmp_path / "a").eval())


@pytest.mark.parametrize("ours, theirs", CASES.values(), ids=CASES)
def test_we_load_what_peft_saves_on_its_own_choice_of_layers(tmp_path, ours, theirs):
    model = tiny("GPT2LMHeadModel")
    wrapped = peft.get_peft_model(theirs_of(model, tmp_path / "base"), theirs()).eval()
    move(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.save_pretrained(tmp_path / "a")
    minift.load_adapter(model, tmp_path / "a")
    assert_equal(model, wrapped)
    assert ours.plan(tiny("GPT2LMHeadModel")).trainable == wrapped.get_nb_trainable_parameters()[0]
