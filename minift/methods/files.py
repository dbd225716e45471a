"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors, strict both ways.

Keys are `base_model.model.<module path>.<key of the wrapper>`, `prompt_embeddings` for virtual tokens. What
PEFT does not know travels in the safetensors metadata: the fingerprint of the base, the hash of the chat
template, the method's fields, the scaling of each layer. What virtual tokens were computed from, and what
they need to be trained further, is a file of its own, adapter_encoder.safetensors.

Layouts that PEFT does not have: bottleneck adapters hold adapter_down.weight (m, D), adapter_down.bias (m),
adapter_up.weight (D, m), adapter_up.bias (D) under the path of the module that they stand behind; bitfit and
selective hold the trained parameters under the base's own names.
"""

import dataclasses
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from minift.methods import METHODS, apply
from minift.methods.fingerprint import NO_TEMPLATE, describe_base, fingerprint, template_hash
from minift.methods.peft_format import from_config, to_config
from minift.models.interface import LanguageModel, dense_weight
from minift.models.slots import Slot
from minift.models.weights import open_safetensors, read_json, write_safetensors, write_text
from minift.models.wrappers import get_module, innermost

PREFIX = "base_model.model."
CONFIG, WEIGHTS, ENCODER = "adapter_config.json", "adapter_model.safetensors", "adapter_encoder.safetensors"
ADAPTER_PARTS = (
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


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
        "minift.method": json.dumps({"name": method.name, **asdict(method)}, sort_keys=True),
        "minift.scaling": json.dumps(
            {s.path: s.scaling for s in adapter.plan.sites if s.scaling is not None}
        ),
    }
    if template is not None:
        facts["minift.template"] = template_hash(template)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if encoder:
        write_safetensors(
            folder / ENCODER, encoder, {"format": "pt", "minift.method": facts["minift.method"]}
        )
    else:
        (folder / ENCODER).unlink(missing_ok=True)  # of another adapter that was saved here
    write_safetensors(folder / WEIGHTS, tensors, facts)
    write_text(folder / CONFIG, json.dumps(to_config(model, adapter), indent=2, sort_keys=True) + "\n")


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
    folder = Path(folder)
    config = read_json(folder / CONFIG, "an adapter folder holds it beside " + WEIGHTS)
    with ExitStack() as files:
        opened = open_safetensors(folder / WEIGHTS, files)
        facts = opened.metadata() or {}
        stored = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    _check_facts(model, folder, facts, check_base, template)
    method, encoder = _with_our_fields(from_config(config, folder / CONFIG, model), facts, model), {}
    if (folder / ENCODER).exists():
        method, encoder = _read_encoder(folder, method)
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    apply(model, method, name)
    try:
        adapter = model.adapters[name]
        stored = _our_keys(model, adapter, stored, config, folder / WEIGHTS)
        _check_tensors(_state(adapter), stored, folder / WEIGHTS)
        _check_tensors(_encoder_state(adapter), encoder, folder / ENCODER)
        _check_scaling(adapter, facts, folder)
        _fill(adapter, stored, encoder, folder)
    except ValueError:
        model.adapters.remove(name)
        for parameter, before in requires_grad.items():
            parameter.requires_grad_(before)
        raise


def _state(adapter) -> dict[str, torch.Tensor]:
    """Key in the file -> tensor."""
    found = {}
    for path, part in adapter.modules.items():
        prefix = "" if isinstance(part, Slot) else f"{PREFIX}{path}."
        found |= {prefix + key: tensor for key, tensor in part.state().items()}
    return found


def _encoder_state(adapter) -> dict[str, torch.Tensor]:
    """What virtual tokens are computed from, where they are computed."""
    return {
        key: tensor.detach()
        for part in adapter.parts
        if isinstance(part, Slot) and part.encoded
        for key, tensor in part.trainable_state().items()
    }


def _with_our_fields(method, facts: dict, model):
    """The method with the fields that PEFT has no place for, if the file has some and means the same."""
    fields = json.loads(facts.get("minift.method", "{}"))
    known = {field.name for field in dataclasses.fields(method)}
    if fields.pop("name", None) != method.name or fields.keys() - known:
        return method
    ours = type(method)(**fields)
    same = [
        [(s.path, s.shape, s.r, s.scaling) for s in candidate.plan(model).sites]
        for candidate in (ours, method)
    ]
    return ours if same[0] == same[1] else method


def _read_encoder(folder: Path, exported):
    """(the method with its encoder, the encoder's tensors) of virtual tokens that can be trained further."""
    with ExitStack() as files:
        opened = open_safetensors(folder / ENCODER, files)
        facts = json.loads((opened.metadata() or {}).get("minift.method", "{}"))
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    name = facts.pop("name", None)
    if name not in METHODS or not hasattr(METHODS[name], "num_virtual_tokens"):
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


def _our_keys(model, adapter, stored: dict, config: dict, where) -> dict:
    """The file's tensors under the keys that we write, in fp32.

    Adapter names that older files kept go, and so do embeddings that PEFT saves beside their branch, if they
    are the base's; pruned triplets come back as zeros.
    """
    found = {}
    for key, tensor in stored.items():
        head, dot, _ = key.removesuffix(".weight").rpartition(".")
        kind = head.rpartition(".")[2]
        if kind in ADAPTER_PARTS and dot:  # <path>.lora_A.<adapter name>
            key = f"{head}.weight" if key.endswith(".weight") else head
        if key.endswith("lora_magnitude_vector.weight"):
            key = key.removesuffix(".weight")
        if key.endswith(".base_layer.weight") and key.startswith(PREFIX):
            _check_copy(model, key.removeprefix(PREFIX).removesuffix(".base_layer.weight"), tensor, where)
            continue
        if key in found:
            raise ValueError(f"{where} holds {key} twice, under two adapter names")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {key} is {tensor.dtype}; adapters are floating-point")
        found[key] = tensor.float()
    pattern = config.get("rank_pattern") if config.get("peft_type") == "ADALORA" else None
    for key, kept in (pattern or {}).items():
        _restore_pruned(found, key.removesuffix(".lora_E").removesuffix(".default.lora_E"), kept, where)
    return found


def _check_copy(model, path: str, tensor: torch.Tensor, where) -> None:
    try:
        weight = dense_weight(innermost(get_module(model, path)))
    except (AttributeError, TypeError):
        raise ValueError(f"{where}: {path}.base_layer.weight belongs to no layer of this model") from None
    if weight.shape != tensor.shape or not torch.equal(weight, tensor.to(weight)):
        raise ValueError(
            f"{where} holds a base weight for {path} that is not this model's (a resized or trained "
            "embedding); load the base that it belongs to"
        )


def _restore_pruned(found: dict, path: str, kept, where) -> None:
    """PEFT stores the triplets that `kept` (r booleans) names; put them back at their places."""
    if not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept):
        raise ValueError(f"{where}: rank_pattern of {path} is no list of booleans")
    rows = torch.tensor(kept).nonzero().flatten()
    for part, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        key = f"{PREFIX}{path}.{part}"
        if key not in found or found[key].ndim != 2 or found[key].shape[dim] != len(rows):
            raise ValueError(f"{where}: {key} does not hold the {len(rows)} triplets that rank_pattern names")
        shape = list(found[key].shape)
        shape[dim] = len(kept)
        found[key] = torch.zeros(shape).index_copy(dim, rows, found[key])


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
                for key, parameter in part.trainable_state().items():
                    parameter.copy_(encoder[key] if part.encoded else stored[key])
                continue
            own = dict(part.named_parameters(recurse=False))
            for parameter, key in part.keys.items():
                if parameter in own:
                    own[parameter].copy_(stored[f"{PREFIX}{path}.{key}"])
        for key, tensor in _state(adapter).items():
            # an encoder's products may be summed in another order elsewhere: a few roundings of fp32
            close = 1e-5 * (1 + tensor.abs().max()) if encoder else 0.0
            if (tensor.cpu() - stored[key]).abs().max() > close:
                raise ValueError(
                    f"{folder / WEIGHTS}: {key} is not what the other tensors make it; the files belong to "
                    "different adapters"
                )


def _check_scaling(adapter, facts: dict, folder: Path) -> None:
    """The scale ledger: what config and patterns give must be what the adapter was trained with."""
    ledger = json.loads(facts.get("minift.scaling", "{}"))
    for site in adapter.plan.sites:
        was = ledger.get(site.path, site.scaling)
        if site.scaling is not None and abs(was - site.scaling) > 1e-12 * abs(was):  # of products in fp64
            raise ValueError(
                f"{folder}: {CONFIG} says scaling {site.scaling!r} for {site.path}, {WEIGHTS} {was!r}; "
                "the two files belong to different adapters"
            )


def _check_facts(model, folder, facts: dict, check_base: bool, template: str | None) -> None:
    if check_base and facts.get("minift.base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise ValueError(
            f"{folder} was trained on another base than this one (fingerprints differ): on "
            f"{facts.get('minift.base', 'one that the file does not describe')}, not on "
            f"{describe_base(model)}; load that base, or do not check (check_base=False in Python, "
            "--any-base)"
        )
    known = facts.get("minift.template")
    if template is not None and known not in (None, template_hash(template)):
        raise ValueError(
            f"{folder} was trained with {'no' if known == NO_TEMPLATE else 'another'} chat template "
            f"({known[:12]}, here {template_hash(template)[:12]}); use that one, or do not check "
            "(template=None in Python, --any-template)"
        )


def _resident(model: LanguageModel, name: str):
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    return model.adapters[name]
