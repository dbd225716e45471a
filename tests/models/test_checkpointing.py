"""Gradient checkpointing of every family: the same gradients, a block's input kept and nothing else of it."""

import pytest
import torch
from tiny import SIZES, tiny

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.models import MODELS
from minift.models.heads import LANGUAGE_MODELS as LANGUAGE_HEADS

IDS = torch.arange(2, 26).view(2, 12)
IDS[:, -1] = 1  # T5 classifies at the end
MASK = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
FIELDS = {
    **{name: {"target_modules": ("all-linear",)} for name in ("lora", "qlora", "dora", "adalora")},
    "selective": {"last_blocks": 1, "tied": "both"},
}
# (method, the beginning of an architecture's name) -> why it does not run there
REFUSALS = {
    **{("bitfit", start): "no bias" for start in ("Llama", "Mistral", "T5")},
    ("prefix_tuning", "T5"): "take no prefix",
}
LANGUAGE_MODELS = [  # one of each family
    next(name for name in MODELS if name.startswith(start) and MODELS[name][2] in LANGUAGE_HEADS)
    for start in SIZES
    if start != "T5EncoderModel"
]


def inputs(model, **changes):
    decodes = model.is_encoder_decoder and model.head_kind in ("seq2seq_lm", "none")
    more = {"decoder_input_ids": IDS[:, :7]} if decodes else {}
    return {"input_ids": IDS, "attention_mask": MASK, **more, **changes}


def gradients(model, checkpointing: bool) -> dict:
    """Of every trainable parameter, under one random cotangent."""
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    output = model(**inputs(model))
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    return {name: p.grad for name, p in trainable(model).items()}


def assert_equal_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys() and a
    for name, gradient in a.items():
        assert torch.equal(gradient, b[name]), name


def test_every_architecture_has_a_tiny_model():
    families = {type(tiny(name)) for name in LANGUAGE_MODELS}
    assert families == {family for family, _, _ in MODELS.values()}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_to_the_bit(name):
    model = tiny(name)
    plain = {key: g for key, g in gradients(model, False).items() if g is not None}
    again = {key: g for key, g in gradients(model, True).items() if g is not None}
    assert_equal_bits(plain, again)


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_adapter_on_a_frozen_base_gets_its_gradient(method, architecture):
    model = tiny(architecture)
    reason = next((why for (m, start), why in REFUSALS.items() if m == method and start in architecture), "")
    if reason:
        with pytest.raises(ValueError, match=reason):
            minift.apply(model, METHODS[method](**FIELDS.get(method, {})))
        return
    minift.apply(model, METHODS[method](**FIELDS.get(method, {})))
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.05 * torch.randn_like(p))  # no factor stays at zero
    plain, again = gradients(model, False), gradients(model, True)
    assert all(g is not None for g in plain.values())
    assert sum(bool(g.any()) for g in plain.values()) > 0.8 * len(plain)  # a key's bias may have none
    assert_equal_bits(plain, again)


def kept_bytes(model, checkpointing: bool) -> int:
    """What autograd keeps from the forward for the backward, without parameters, each storage once."""
    model.gradient_checkpointing = checkpointing
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # alive, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs(model))
    total = sum(storage.nbytes() for at, storage in kept.items() if at not in own)
    assert output.requires_grad
    return total


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_block_keeps_its_input_alone(name):
    """Two blocks more keep 2 (B, T, D) more in each stack; without checkpointing many times that."""
    blocks = MODELS[name][1].BLOCKS
    kept = {
        (n, on): kept_bytes(tiny(name, **dict.fromkeys(blocks, n)), on)
        for n in (2, 4)
        for on in (False, True)
    }
    model = tiny(name)
    tokens = IDS.numel() + (IDS[:, :7].numel() if model.is_encoder_decoder else 0)
    assert kept[4, True] - kept[2, True] == 2 * tokens * model.dims.hidden * 4
    assert kept[4, False] - kept[2, False] > 5 * (kept[4, True] - kept[2, True])
