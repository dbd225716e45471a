"""Methods by name, and what is done with them: apply, merge."""

import torch
from torch import nn

from minift.methods.base import Adapter, Method, Plan
from minift.methods.full import Full
from minift.methods.lora import LoRA, innermost
from minift.methods.qlora import QLoRA
from minift.models.interface import LanguageModel, base_layers, is_quantized

METHODS = {"full": Full, "lora": LoRA, "qlora": QLoRA}
MERGE_MODES = ("dequantized", "requantized", "original")


def apply(model: LanguageModel, method: Method, name: str = "default", seed: int = 0) -> Plan:
    """Freeze the model, plan, inject; what the method adds under `name` is all that trains.

    Adapters that are resident already stay active, frozen. Nothing is touched when the plan fails.
    """
    if name in model.adapters:
        raise ValueError(
            f"an adapter named {name!r} is resident already ({', '.join(model.adapters)}); give another name"
        )
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r} must not be empty or hold a dot")
    reason = method.refuses(model)
    if reason:
        raise ValueError(f"{method.name} cannot run on this model: {reason}")
    plan = method.plan(model)
    model.requires_grad_(False)
    model.adapters[name] = Adapter(method, plan)
    method.inject(model, plan, name, seed)
    return plan


def merge(
    model: LanguageModel,
    name: str | None = None,
    mode: str = "dequantized",
    original: LanguageModel | None = None,
) -> dict[str, float]:
    """Fold an adapter (the only one, or `name`) into the base weights and remove its wrappers.

    On a quantized base, `mode` says what W is in W + delta, and what the layer becomes:
    "dequantized": the dequantized weight, which the adapter was trained against; the layer becomes dense.
    "requantized": the same, quantized again in the layer's format.
    "original": the dense weight of `original`, the model before quantization; the layer becomes dense.

    Returns, for each path, the largest difference between a merged weight and the exact sum of the weight
    that was trained against and the delta. Sums are computed in fp32 and rounded once.
    """
    if name is None:
        if len(model.adapters) != 1:
            raise ValueError(f"merge which adapter? resident: {sorted(model.adapters) or 'none'}")
        name = next(iter(model.adapters))
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    _check_mode(model, name, mode, original)
    errors = model.adapters[name].method.merge(model, name, mode, original)
    del model.adapters[name]
    quantized = {path for path, layer in base_layers(model).items() if is_quantized(innermost(layer))}
    model.quantization_table = type(model.quantization_table)(
        row for row in model.quantization_table if row.path in quantized
    )
    model.quantization = model.quantization if quantized else ()
    return errors


def _check_mode(model, name, mode, original) -> None:
    if mode not in MERGE_MODES:
        raise ValueError(f"merge mode {mode!r} is not known; known modes: {', '.join(MERGE_MODES)}")
    if (mode == "original") != (original is not None):
        raise ValueError(
            "mode 'original' needs original, the dense model before quantization, and no other mode does"
        )
    if mode != "dequantized" and not any(is_quantized(m) for m in model.modules()):
        raise ValueError(
            f"merge mode {mode!r} is for quantized models, and no layer of this one is quantized"
        )
    if original is None:
        return
    if not torch.equal(original.embed.weight.to(model.embed.weight), model.embed.weight):
        raise ValueError("original has other embeddings than this model; load the model that was quantized")
    layers, found = base_layers(model), base_layers(original)
    for path in model.adapters[name].modules:
        shape = (layers[path].out_features, layers[path].in_features)
        layer = found.get(path)
        if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != shape:
            came = "nothing"
            if layer is not None:
                came = f"{type(layer).__name__} {layer.out_features, layer.in_features}"
            raise ValueError(
                f"original has {came} at {path}, where a dense layer of shape {shape} is needed; load "
                "the model that was quantized"
            )
