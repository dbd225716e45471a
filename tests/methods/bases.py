"""Every method on every kind of base: what the tests of the contract run on."""

import torch
from conftest import tiny_llama
from torch import nn

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.models.wrappers import base_layers

QUANTIZED = ["nf4", "fp4", "int8"]
BASES = ["float32", "bfloat16", *QUANTIZED]
IDS = torch.arange(24).view(2, 12) % 97

# (method, base) -> why it does not run there; "plain" is a model without biases
REFUSALS = {
    **{("full", base): "is quantized; full fine-tuning needs dense weights" for base in QUANTIZED},
    ("bitfit", "plain"): "no bias",
}
CASES = [(name, base) for name in METHODS for base in BASES if (name, base) not in REFUSALS]


def add_biases(model, device=None):
    """Llama has none; bitfit needs some."""
    for layer in base_layers(model).values():
        torch.manual_seed(layer.out_features)
        layer.bias = nn.Parameter(0.1 * torch.randn(layer.out_features, dtype=model.dtype, device=device))


def base_model(base, name=""):
    model = tiny_llama(getattr(torch, base) if base in ("float32", "bfloat16") else torch.float32)
    if name == "bitfit" and base != "plain":
        add_biases(model)
    if base in QUANTIZED:
        minift.quantize_model(model, base)
    return model


def method_for(name, base):
    """The method with its defaults; qlora says the format that the base has."""
    return METHODS[name](format=base) if name == "qlora" and base in QUANTIZED else METHODS[name]()


def nudge(model):
    """Move every trainable parameter, as a step would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.05 * torch.randn_like(p))


def quantized_as(method, base):
    """The base that a method which quantizes leaves behind."""
    if method.name == "qlora" and not base.quantization:
        minift.quantize_model(base, method.format, method.block_size, method.double_quant)
    return base
