"""merge and unmerge: fold an adapter into the base weights, and bring the exact bits back.

    W' = fold(W), computed in fp32 (fp64 for fp64) and rounded once

Each wrapper says its own `fold`; the error of the rounding is measured against the same fold in fp64. Merging
makes new layers and never writes into old ones, so undoing it means putting the old ones back.
"""

import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from minift.models.adapters import Adapter
from minift.models.heads import LANGUAGE_MODELS
from minift.models.interface import LanguageModel, dense_weight, is_quantized
from minift.models.wrappers import (
    Wrapper,
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
    """What `unmerge` needs: of the adapter, of each of its paths, and of the model's records."""

    adapter: Adapter
    position: int  # among the resident adapters
    layers: dict[str, "Change"]
    quantization: tuple
    rows: list  # of the quantization table, of layers that are dense now


class Change(NamedTuple):
    """What merging did at a path."""

    old: nn.Module
    merged: nn.Module
    around: list[Wrapper]  # the wrappers that stayed, outermost first
    outside: int  # how many of them stood outside the merged one
    versions: list  # of the merged layer's parameters, which training in place would change


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
    _check_state(model, name, original)
    folded = {path: _fold(model, name, path, mode, original) for path in adapter.modules}
    kept = Kept(adapter, list(model.adapters).index(name), {}, model.quantization, [])
    changes = {}
    for path, (layer, _) in folded.items():
        wrapper, around = adapter.modules[path], chain(get_module(model, path))
        outside = around.index(wrapper)
        old = innermost(wrapper)
        replace_base(model, path, layer)
        unwrap(model, path, wrapper)
        around.remove(wrapper)
        changes[path] = (old, layer, around, outside)
    if not folded:  # the trained weights are the model's weights already
        model.requires_grad_(False)
    del model.adapters[name]
    _tie(model)
    kept.rows = _forget_quantization(model)
    kept.layers = {path: Change(*change, _versions(change[1])) for path, change in changes.items()}
    if keep:
        model.kept[name] = kept
    return {path: error for path, (_, error) in folded.items()} or {
        site.path: 0.0 for site in adapter.plan.sites
    }


def unmerge(model: LanguageModel, name: str) -> None:
    """Undo `merge(model, name, keep=True)`: the old layers, to the bit, and the adapter around them.

    What was done at its layers since must have been undone before. The adapter trains again where no other
    is resident.
    """
    if name not in model.kept:
        raise ValueError(
            f"no merged adapter {name!r} is kept; kept: {sorted(model.kept) or 'none'} (merge with keep=True)"
        )
    kept = model.kept[name]
    for path, change in kept.layers.items():
        now = get_module(model, path)
        same = innermost(now) is change.merged and chain(now) == change.around
        if not same or _versions(change.merged) != change.versions:
            later = [n for n, k in model.kept.items() if n != name and path in k.layers]
            what = f"unmerge {' and '.join(later)} first" if later else "undo that first"
            raise ValueError(f"{path} was changed after {name!r} was merged; {what}")
    for path, (old, _, around, outside, _) in kept.layers.items():
        wrapper = kept.adapter.modules[path]
        replace_base(model, path, old)
        wrapper.base = around[outside] if outside < len(around) else old
        if outside:
            around[outside - 1].base = wrapper
        else:
            replace_module(model, path, wrapper)
        wrapper.train(model.training)
        wrapper.active, wrapper.rows = True, None
        for parameter in wrapper.parameters(recurse=False):
            parameter.requires_grad_(not model.adapters)
    _tie(model)
    recipes = [recipe for recipe in model.quantization if recipe not in kept.quantization]
    model.quantization = (*kept.quantization, *recipes)
    order = list(base_layers(model))
    rows = sorted((*model.quantization_table, *kept.rows), key=lambda row: order.index(row.path))
    model.quantization_table = type(model.quantization_table)(rows)
    del model.kept[name]
    resident = list(model.adapters.items())
    resident.insert(kept.position, (name, kept.adapter))
    model.adapters.clear()
    model.adapters.update(resident)


def _versions(layer: nn.Module) -> list:
    return [(id(p), p._version, p.dtype, p.device) for p in layer._parameters.values() if p is not None]


def _fold(model, name, path, mode, original) -> tuple[nn.Module, float]:
    """(the layer at a path with the adapter folded in, its largest error)."""
    wrapper = model.adapters[name].modules[path]
    base = innermost(wrapper)
    against = _parameters(base)
    start = dict(against)
    if original is not None and is_quantized(base):  # a layer that another merge made dense is what it is
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


def _tie(model) -> None:
    """One weight where both ends are the same numbers; and the config says what is."""
    ends = [getattr(innermost(end), "weight", None) for end in (model.embed, model.head)]
    if model.head_kind not in LANGUAGE_MODELS or None in ends:
        return
    if model.config.tie_word_embeddings and not model.tied and torch.equal(*ends):
        model.tie_weights()
    if model.config.tie_word_embeddings != model.tied:
        model.config = replace(model.config, tie_word_embeddings=model.tied)


def _forget_quantization(model) -> list:
    """Keep the record of those layers alone that are still quantized; what was forgotten."""
    quantized = {path for path, layer in base_layers(model).items() if is_quantized(innermost(layer))}
    rows = [row for row in model.quantization_table if row.path not in quantized]
    model.quantization_table = type(model.quantization_table)(
        row for row in model.quantization_table if row.path in quantized
    )
    model.quantization = model.quantization if quantized else ()
    return rows


def _check_state(model, name, original) -> None:
    parts = model.adapters[name].parts
    if not all(part.active for part in parts) or any(part.rows is not None for part in parts):
        raise ValueError(
            f"{name!r} is switched off, or works for some rows of a batch; switch it on "
            f"(model.adapters.switch) before it is merged"
        )
    if original is not None and any(
        hasattr(p, "loftq_errors") or hasattr(p, "makes_up_for_quantization") for p in parts
    ):
        raise ValueError(
            f"{name!r} started as LoftQ, which makes up for what quantization took; on the original weights "
            "it would do so twice: merge with mode 'dequantized'"
        )


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
