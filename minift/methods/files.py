"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors, strict both ways.

Keys are `base_model.model.<module path>.<key of the wrapper>`, `prompt_embeddings` for virtual tokens. What
PEFT does not know travels in the safetensors metadata: the fingerprint of the base, the hash of the chat
template, the scaling of each layer (fingerprint.py). What virtual tokens were computed from, and what
they need to be trained further, is a file of its own, adapter_encoder.safetensors.

Layouts that PEFT does not have: bottleneck adapters hold adapter_down.weight (m, D), adapter_down.bias (m),
adapter_up.weight (D, m), adapter_up.bias (D) under the path of the module that they stand behind; bitfit and
selective hold the trained parameters under the base's own names.
"""

import dataclasses
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from minift.methods import METHODS, apply
from minift.methods.fingerprint import (
    adapters_beneath,
    check_facts,
    check_scaling,
    describe_base,
    fact,
    fingerprint,
    template_hash,
)
from minift.methods.peft_format import from_config, to_config, without_new_head
from minift.methods.peft_keys import PREFIX, SLOT_PREFIX, our_keys
from minift.models.disk import write_text
from minift.models.interface import LanguageModel
from minift.models.json_file import read_json
from minift.models.safetensors_file import read_tensors, write_safetensors
from minift.models.slots import Slot

CONFIG, WEIGHTS, ENCODER = "adapter_config.json", "adapter_model.safetensors", "adapter_encoder.safetensors"


def save_adapter(
    model: LanguageModel, folder: str | Path, name: str = "default", template: str | None = None
) -> None:
    """Write adapter `name`; a file is complete or, after a failure, as it was.

    `template`: the chat template that its training rows went through, "none" for none; None leaves it open.
    """
    adapter = _resident(model, name)
    method = adapter.method
    if not method.adapter_file:
        raise ValueError(
            f"{method.name} has no adapter file; minift.merge(model), then minift.save_model(model, folder)"
        )
    tensors = {key: t.detach() for key, t in _state(adapter).items()}
    encoder = _encoder_state(adapter)
    for key, tensor in (tensors | encoder).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} is not finite; the adapter was not saved")
    facts = {
        "format": "pt",
        "minift.base_fingerprint": fingerprint(model),
        "minift.base": describe_base(model),
        "minift.method": json.dumps(_beyond_peft(method)),
        "minift.beneath": json.dumps(adapters_beneath(model, name)),
        "minift.scaling": json.dumps(
            {s.path: s.scaling for s in adapter.plan.sites if s.scaling is not None}
        ),
    }
    if adapter.plan.head:
        facts["minift.head"] = json.dumps({"head": model.head_kind, "labels": model.labels})
    if template is not None:
        facts["minift.template"] = template_hash(template)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if encoder:
        fields = json.dumps({"name": method.name, **asdict(method)})
        write_safetensors(folder / ENCODER, encoder, {"format": "pt", "minift.method": fields})
    else:
        (folder / ENCODER).unlink(missing_ok=True)  # of another adapter that was saved here
    write_safetensors(folder / WEIGHTS, tensors, facts)
    write_text(folder / CONFIG, json.dumps(to_config(model, adapter), indent=2, sort_keys=True) + "\n")


def _beyond_peft(method) -> dict:
    """What PEFT's config has no place for."""
    started = {"init": "loftq"} if getattr(method, "init", "") == "loftq" else {}
    return {"name": method.name, "lr_ratio": getattr(method, "lr_ratio", 1.0), **started}


def load_adapter(
    model: LanguageModel,
    folder: str | Path,
    name: str = "default",
    check_base: bool = True,
    template: str | None = None,
) -> None:
    """Inject the adapter of a folder as `name`, trainable. Nothing is changed when something does not fit.

    `check_base=False` loads it onto another base than the one that it was trained on. `template`, where it is
    given, must be the chat template that it was trained with ("none" for none).
    """
    folder, resident = Path(folder), list(model.adapters)
    config = read_json(folder / CONFIG, "an adapter folder holds it beside " + WEIGHTS)
    stored, facts = read_tensors(folder / WEIGHTS)
    check_facts(model, facts, folder / WEIGHTS, check_base, template)
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    try:
        config = without_new_head(model, config, folder / CONFIG)
        method, encoder = _read_method(model, folder, config, facts)
        _check_size(method.plan(model), {**stored, **encoder}, folder)
        apply(model, method, name)
        adapter = model.adapters[name]
        stored = our_keys(model, stored, config, folder / WEIGHTS)
        _check_tensors(_state(adapter), stored, folder / WEIGHTS)
        _check_tensors(_encoder_state(adapter), encoder, folder / ENCODER)
        check_scaling(adapter, facts, folder / WEIGHTS)
        _fill(adapter, stored, encoder, folder)
        if fact(facts, "minift.method", folder / WEIGHTS).get("init") == "loftq":
            for part in adapter.parts:
                part.makes_up_for_quantization = True
    except Exception as error:
        if name in model.adapters and name not in resident:
            model.adapters.remove(name)
        for parameter, before in requires_grad.items():
            parameter.requires_grad_(before)
        if isinstance(error, ValueError | OSError):
            raise
        raise ValueError(f"{folder} holds a value that an adapter cannot have: {error}") from error


def trained_head(folder: str | Path) -> dict:
    """What `load_model` must be asked for so that the base of this adapter has the head that it trained."""
    read_json(Path(folder) / CONFIG, "an adapter folder holds it beside " + WEIGHTS)
    path = Path(folder) / WEIGHTS
    found = fact(read_tensors(path)[1], "minift.head", path)
    head, labels = found.get("head"), found.get("labels", [])
    if not found:
        return {}
    if (
        not isinstance(head, str)
        or not isinstance(labels, list)
        or not all(isinstance(x, str) for x in labels)
    ):
        raise ValueError(f"{path}: minift.head in the metadata is {found}; it names a head and its labels")
    return {"head": head, "labels": tuple(labels)} if labels else {"head": head}


def _read_method(model, folder: Path, config: dict, facts: dict):
    """(method, tensors of its encoder); the config counts, the metadata add what PEFT cannot say."""
    method, encoder = from_config(config, folder / CONFIG), {}
    ratio = fact(facts, "minift.method", folder / WEIGHTS).get("lr_ratio", 1.0)
    if hasattr(method, "lr_ratio"):
        method = dataclasses.replace(method, lr_ratio=ratio)
    if os.path.lexists(folder / ENCODER):  # a link to nothing is no missing file
        method, encoder = _read_encoder(folder, method)
    return method, encoder


def _state(adapter) -> dict[str, torch.Tensor]:
    """Key in the file -> tensor."""
    found = {}
    for path, part in adapter.modules.items():
        prefix = "" if isinstance(part, Slot) else f"{_root(adapter)}{path}."
        found |= {prefix + key: tensor for key, tensor in part.state().items()}
    return found


def _root(adapter) -> str:
    """What stands before module paths: PEFT has one level less around a model with virtual tokens."""
    return SLOT_PREFIX if "" in adapter.modules else PREFIX


def _encoder_state(adapter) -> dict[str, torch.Tensor]:
    """What virtual tokens are computed from, where they are computed."""
    return {
        key: tensor.detach()
        for part in adapter.parts
        if isinstance(part, Slot) and part.encoded
        for key, tensor in part.trainable_state().items()
    }


def _read_encoder(folder: Path, exported):
    """(the method with its encoder, the encoder's tensors) of virtual tokens that can be trained further."""
    tensors, facts = read_tensors(folder / ENCODER)
    facts = fact(facts, "minift.method", folder / ENCODER)
    name = facts.pop("name", None)
    if not isinstance(name, str) or name not in METHODS or not hasattr(METHODS[name], "num_virtual_tokens"):
        raise ValueError(
            f"{folder / ENCODER} does not say which method it belongs to; remove it or restore it"
        )
    method = METHODS[name](**facts)
    if method.num_virtual_tokens != exported.num_virtual_tokens:
        raise ValueError(
            f"{folder}: {CONFIG} says num_virtual_tokens {exported.num_virtual_tokens}, {ENCODER} "
            f"{method.num_virtual_tokens}; the files belong to different adapters"
        )
    return method, tensors


def _check_size(plan, stored: dict, folder: Path) -> None:
    """Before anything is made: what the config asks for is in the files, or left out of them by pruning."""
    held = sum(tensor.numel() for tensor in stored.values())
    if plan.trainable > max(held, plan.base_parameters):
        raise ValueError(
            f"{folder / CONFIG} asks for {plan.trainable:,} parameters; its files hold {held:,}, its base "
            f"{plan.base_parameters:,}"
        )


def _check_tensors(expected: dict, stored: dict, where) -> None:
    for kind, keys in (
        ("lacks", expected.keys() - stored.keys()),
        ("has unexpected", stored.keys() - expected.keys()),
    ):
        if keys:
            raise ValueError(f"{where} {kind} {len(keys)} tensor(s), first {min(keys)}")
    for key, wanted in expected.items():
        shape = tuple(stored[key].shape)
        if shape != tuple(wanted.shape) or not stored[key].is_floating_point():
            raise ValueError(
                f"{where}: {key} is {stored[key].dtype} {shape}, expected floating-point "
                f"{tuple(wanted.shape)}"
            )
        if not torch.isfinite(stored[key]).all():
            raise ValueError(f"{where}: {key} is not finite")


def _fill(adapter, stored: dict, encoder: dict, folder: Path) -> None:
    """Copy the tensors in; what follows from others (tied copies, computed prompts) must agree with them."""
    with torch.no_grad():
        for path, part in adapter.modules.items():
            if isinstance(part, Slot):
                part.load(encoder if part.encoded else {key: stored[key] for key in part.state()})
                continue
            own = dict(part.named_parameters(recurse=False))
            for parameter, key in part.keys.items():
                if parameter in own:
                    own[parameter].copy_(stored[f"{_root(adapter)}{path}.{key}"])
        for key, tensor in _state(adapter).items():
            # an encoder's products may be summed in another order elsewhere: a few roundings of fp32
            close = 1e-5 * (1 + tensor.abs().max()) if encoder else 0.0
            if (tensor.cpu() - stored[key]).abs().max() > close:
                raise ValueError(
                    f"{folder / WEIGHTS}: {key} is not what the other tensors make it; the files belong to "
                    "different adapters"
                )


def _resident(model: LanguageModel, name: str):
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    return model.adapters[name]
