"""merge and unmerge: fold an adapter into the base weights, and bring the exact bits back.

    W' = fold(W), computed in fp32 (fp64 for fp64) and rounded once

Each wrapper says its own `fold`; the error of the rounding is measured against the same fold in fp64. Merging
makes new layers and never writes into old ones, so undoing it means putting the old ones back.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from minift.models.adapters import Adapter
from minift.models.interface import LanguageModel, dense_weight, is_quantized
from minift.models.wrappers import (
    base_layers,
    chain,
    get_module,
    innermost,
    replace_base,
    replace_module,
    unwrap,
)

MODES = ("dequantized", "requantized", "original")


@dataclass
class Kept:
    """What `unmerge` needs: the adapter, and for each path both layers and the wrapper's depth."""

    adapter: Adapter
    layers: dict[str, tuple[nn.Module, nn.Module, int]]
    before: dict  # config, quantization, quantization_table of the model


def merge(
    model: LanguageModel,
    name: str | None = None,
    mode: str = "dequantized",
    original: LanguageModel | None = None,
    keep: bool = False,
) -> dict[str, float]:
    """Fold an adapter (the only one, or `name`) into the base weights and remove its wrappers.

    On a quantized base, `mode` says what W is in fold(W), and what the layer becomes:
    "dequantized": the dequantized weight, which the adapter was trained against; the layer becomes dense.
    "requantized": the same, quantized again in the layer's format.
    "original": the dense weight of `original`, the model before quantization; the layer becomes dense.
    `keep` holds on to the old layers, so that `unmerge` can bring them back.

    Returns, for each path, the largest difference between a merged parameter and the exact fold of the
    parameter that was trained against. Nothing is changed when a merged number is not finite.
    """
    if name is None:
        if len(model.adapters) != 1:
            raise ValueError(f"merge which adapter? resident: {sorted(model.adapters) or 'none'}")
        name = next(iter(model.adapters))
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    adapter = model.adapters[name]
    _check_mode(model, name, mode, original)
    _check_order(model, name)
    if original is not None and any(hasattr(part, "loftq_errors") for part in adapter.parts):
        raise ValueError(
            f"{name!r} started as LoftQ, which makes up for what quantization took; on the original weights "
            "it would do so twice: merge with mode 'dequantized'"
        )
    folded = {path: _fold(model, name, path, mode, original) for path in adapter.modules}
    kept = Kept(adapter, {}, {n: getattr(model, n) for n in ("config", "quantization", "quantization_table")})
    for path, (layer, _) in folded.items():
        wrapper = adapter.modules[path]
        depth = len(chain(wrapper)) - 1
        kept.layers[path] = (innermost(wrapper), layer, depth)
        replace_base(model, path, layer)
        unwrap(model, path, wrapper)
    if not folded:  # the trained weights are the model's weights already
        model.requires_grad_(False)
    del model.adapters[name]
    _tie_again(model, kept)
    _forget_quantization(model)
    if keep:
        model.kept[name] = kept
    return {path: error for path, (_, error) in folded.items()} or {
        site.path: 0.0 for site in adapter.plan.sites
    }


def unmerge(model: LanguageModel, name: str) -> None:
    """Undo `merge(model, name, keep=True)`: the old layers, to the bit, and the adapter around them."""
    if name not in model.kept:
        raise ValueError(
            f"no merged adapter {name!r} is kept; kept: {sorted(model.kept) or 'none'} (merge with keep=True)"
        )
    kept = model.kept[name]
    for path, (_, merged, _) in kept.layers.items():
        if innermost(get_module(model, path)) is not merged:
            later = [n for n, k in model.kept.items() if n != name and path in k.layers]
            raise ValueError(f"{path} was changed after {name!r} was merged; unmerge {later or 'that'} first")
    for path, (old, _, depth) in kept.layers.items():
        wrapper, around = kept.adapter.modules[path], chain(get_module(model, path))
        replace_base(model, path, old)
        inside = around[max(0, len(around) - depth) :]
        outside = around[: len(around) - len(inside)]
        wrapper.base = inside[0] if inside else old
        if outside:
            outside[-1].base = wrapper
        else:
            replace_module(model, path, wrapper)
    for attribute, value in kept.before.items():
        setattr(model, attribute, value)
    model.adapters[name] = kept.adapter
    del model.kept[name]


def _fold(model, name, path, mode, original) -> tuple[nn.Module, float]:
    """(the layer at a path with the adapter folded in, its largest error)."""
    wrapper = model.adapters[name].modules[path]
    base = innermost(wrapper)
    against = _parameters(base)
    start = dict(against)
    if original is not None and path in base_layers(original):
        start["weight"] = dense_weight(get_module(original, path)).to(against["weight"].device)
    wide = torch.promote_types(next(iter(against.values())).dtype, torch.float32)
    with torch.no_grad():
        exact = wrapper.fold({n: t.double() for n, t in against.items()})
        given = {n: t.to(wide) for n, t in start.items()}
        got = wrapper.fold(given)
        for n, tensor in got.items():
            if not torch.isfinite(tensor.to(against[n].dtype)).all():
                raise ValueError(
                    f"merging {name!r} into {path} gives a {n} that is not finite; nothing was changed"
                )
        untouched = got["weight"] is given["weight"] and original is None
        layer = _with_parameters(base, got, mode, untouched)
        errors = [(t.double() - exact[n]).abs().max().item() for n, t in _parameters(layer).items()]
    return layer, max(errors)


def _parameters(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A layer's parameters by name, the weight dequantized."""
    if is_quantized(layer):
        return {"weight": dense_weight(layer)} | ({} if layer.bias is None else {"bias": layer.bias})
    return {name: p for name, p in layer._parameters.items() if p is not None}


def _with_parameters(
    base: nn.Module, tensors: dict[str, torch.Tensor], mode: str, untouched: bool
) -> nn.Module:
    """A layer as `base` with other numbers: quantized again in mode "requantized", otherwise dense; codes
    that the adapter did not touch stay."""
    if is_quantized(base):
        weight = tensors["weight"]
        if untouched:
            layer = copy.copy(base)
            layer._parameters = dict(base._parameters)
        else:
            layer = base.requantized(weight) if mode == "requantized" else base.dense(weight)
        if base.bias is not None:
            layer.bias = nn.Parameter(tensors["bias"].to(base.bias.dtype), False)
        return layer
    layer = copy.copy(base)
    new = {n: nn.Parameter(t.to(base._parameters[n].dtype), False) for n, t in tensors.items()}
    layer._parameters = {**base._parameters, **new}
    return layer


def _tie_again(model, kept) -> None:
    """One weight again where both ends became the same; where they did not, the config says so."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    ends = [innermost(model.embed), innermost(model.head)]
    changed = [any(end is layer for _, layer, _ in kept.layers.values()) for end in ends]
    if all(changed) and torch.equal(ends[0].weight, ends[1].weight):
        model.tie_weights()
    elif any(changed):
        model.config = replace(model.config, tie_word_embeddings=False)


def _forget_quantization(model) -> None:
    """Keep the record of those layers alone that are still quantized."""
    quantized = {path for path, layer in base_layers(model).items() if is_quantized(innermost(layer))}
    rows = (row for row in model.quantization_table if row.path in quantized)
    model.quantization_table = type(model.quantization_table)(rows)
    model.quantization = model.quantization if quantized else ()


def _check_order(model, name) -> None:
    """A wrapper may be folded in if what is inside it only adds, and it only adds or is innermost."""
    adapter = model.adapters[name]
    if adapter.method.unmergeable:
        raise ValueError(f"{adapter.method.name} cannot be merged: {adapter.method.unmergeable}")
    for path, wrapper in adapter.modules.items():
        inside = chain(wrapper)[1:]
        if not inside or (wrapper.additive and all(w.additive for w in inside)):
            continue
        names = [n for n, a in model.adapters.items() if any(a.modules.get(path) is w for w in inside)]
        raise ValueError(
            f"{name!r} at {path} is wrapped around {', '.join(names)}, and the two do not commute; merge "
            f"{names[-1]!r} first"
        )


def _check_mode(model, name, mode, original) -> None:
    if mode not in MODES:
        raise ValueError(f"merge mode {mode!r} is not known; known modes: {', '.join(MODES)}")
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
    if not torch.equal(original.embed_weight.to(model.embed_weight), model.embed_weight):
        raise ValueError("original has other embeddings than this model; load the model that was quantized")
    layers, found = base_layers(model), base_layers(original)
    for path in model.adapters[name].modules:
        if path not in layers:
            continue
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
