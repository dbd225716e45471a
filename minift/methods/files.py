"""Adapters on disk in PEFT's layout: adapter_config.json and adapter_model.safetensors, strict both ways.

Keys are `base_model.model.<module path>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), fp32. What
PEFT does not know travels in the safetensors metadata: the fingerprint of the base and the method's fields.
"""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from minift.methods import apply
from minift.methods.lora import LoRA
from minift.models.interface import LanguageModel
from minift.models.targets import ALL_LINEAR, fits, match
from minift.models.weights import open_safetensors, read_json, write_safetensors, write_text
from minift.models.wrappers import base_layers, base_parameters

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields of PEFT's LoraConfig (0.21) that say nothing about the forward of a loaded adapter.
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
}
# Fields that this file reads.
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "bias",
    "fan_in_fan_out",
}
# Start states whose residual changes the base weights, so that A and B alone do not say the forward.
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(model: LanguageModel, folder: str | Path, name: str = "default") -> None:
    """Write adapter `name`; a file is complete or, after a failure, as it was."""
    adapter = _resident(model, name)
    method = adapter.method
    if not isinstance(method, LoRA):
        raise ValueError(
            f"{method.name} has no adapter file; minift.merge(model), then minift.save_model(model, folder)"
        )
    tensors = {}
    for path, layer in adapter.modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} is not finite; the adapter was not saved")
    targets, layers = _peft_targets(model, list(adapter.modules))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "revision": None,
        "inference_mode": True,
        "r": method.r,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": False,
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": layers,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    facts = {
        "format": "pt",
        "minift.base_fingerprint": fingerprint(model),
        "minift.base": _base(model),
        "minift.method": json.dumps(asdict(method)),
        "minift.scaling": repr(method.scaling),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, tensors, facts)
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(
    model: LanguageModel, folder: str | Path, name: str = "default", check_base: bool = True
) -> None:
    """Inject the adapter of a folder as `name`, trainable. Nothing is touched when something does not fit."""
    folder = Path(folder)
    method = lora_from_peft(
        read_json(folder / CONFIG, "an adapter folder holds it beside " + WEIGHTS), folder / CONFIG
    )
    with ExitStack() as files:
        opened = open_safetensors(folder / WEIGHTS, files)
        facts = opened.metadata() or {}
        stored = {_our_key(key): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if check_base and facts.get("minift.base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise ValueError(
            f"{folder} was trained on another base than this one (fingerprints differ): on "
            f"{facts.get('minift.base', 'one that the file does not describe')}, not on {_base(model)}; load "
            "that base, or pass check_base=False to load_adapter"
        )
    expected = {}
    for site in method.plan(model).sites:
        fan_out, fan_in = site.shape
        expected[f"{site.path}.lora_A"], expected[f"{site.path}.lora_B"] = (
            (method.r, fan_in),
            (fan_out, method.r),
        )
    for kind, keys in (
        ("lacks", expected.keys() - stored.keys()),
        ("has unexpected", stored.keys() - expected.keys()),
    ):
        if keys:
            raise ValueError(f"{folder / WEIGHTS} {kind} {len(keys)} tensor(s), first {min(keys)}")
    for key, shape in expected.items():
        tensor = stored[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{folder / WEIGHTS}: {key} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"floating-point {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder / WEIGHTS}: {key} is not finite")
    if "minift.scaling" in facts and facts["minift.scaling"] != repr(method.scaling):
        raise ValueError(
            f"{folder}: {CONFIG} says scaling {method.scaling!r}, {WEIGHTS} {facts['minift.scaling']}; "
            "the two files belong to different adapters"
        )
    apply(model, method, name)
    with torch.no_grad():
        for path, layer in model.adapters[name].modules.items():
            layer.lora_A.copy_(stored[f"{path}.lora_A"])
            layer.lora_B.copy_(stored[f"{path}.lora_B"])


def lora_from_peft(config: dict, where) -> LoRA:
    """The LoRA that a PEFT config means; an unsupported field that would change the forward raises."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type {config.get('peft_type')!r} is not supported; supported: 'LORA'"
        )
    for name, value in config.items():
        neutral = value in (None, False, [], {}, "none") or (name == "lora_bias" and not value)
        if name not in READ | INERT and not neutral:
            raise ValueError(
                f"{where}: {name} = {value!r} is not supported, and leaving it out could change the result"
            )
    init = config.get("init_lora_weights")
    if not isinstance(init, str | bool | None) or str(init).lower().startswith(RESIDUAL_INITS):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} changed the base weights; convert the adapter to a "
            "plain LoRA on the original base first"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias = {config['bias']!r} is not supported; supported: 'none'")
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise ValueError(
            f"{where}: target_modules {targets!r} is a regular expression; list the module names instead"
        )
    layers = config.get("layers_to_transform")
    excluded = _listed(config.get("exclude_modules"))  # PEFT allows a name on both lists
    return LoRA(
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora") or False,
        target_modules=tuple(t for t in _listed(targets) if t not in excluded),
        exclude_modules=tuple(excluded),
        layers_to_transform=tuple(map(str, _listed(layers))),
    )


def _listed(value) -> list:
    return [] if value is None else [value] if isinstance(value, str | int) else list(value)


def _our_key(key: str) -> str:
    """PEFT's key without its prefix, `.weight`, and an adapter name that older files kept."""
    path = key.removeprefix(PREFIX)
    for part in ("lora_A", "lora_B"):
        head, found, tail = path.rpartition(f".{part}.")
        if found and key.startswith(PREFIX) and tail.split(".")[-1] == "weight" and tail.count(".") <= 1:
            return f"{head}.{part}"
    raise ValueError(
        f"unexpected key {key}; a LoRA file holds {PREFIX}<module>.lora_A.weight and .lora_B.weight"
    )


def _peft_targets(model: LanguageModel, paths: list[str]) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that mean exactly these paths; last names where they suffice."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    blocks = sorted({model.block_index(path) for path in paths} - {None})
    everywhere = [p for p in base_layers(model) if any(fits(p, n) for n in names)]
    if sorted(everywhere) == sorted(paths):
        return names, None
    inside = all(model.block_index(path) is not None for path in paths)
    if inside and sorted(match(model, names, layers=blocks)) == sorted(paths):
        return names, blocks
    return sorted(paths), None


def _base(model: LanguageModel) -> str:
    """Source, dtype and quantization of a base, in words."""
    recipes = [
        f"{r.format} in blocks of {r.block_size}{', double' * r.double_quant}" for r in model.quantization
    ]
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{model.source or 'a model made in Python'} in {dtype}, {' and '.join(recipes) or 'not quantized'}"
    )


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 over the base's parameter names and shapes and, as bf16, the first and last row of each.

    Of quantized parameters, the first and last 1024 bytes. The same for a base held in fp32 or bf16; wrappers
    and adapters are left out.
    """
    digest = hashlib.sha256()
    base = base_parameters(model)
    for name, p in sorted(base.items()):
        digest.update(f"{name}:{tuple(p.shape)}".encode())
        if p.dtype == torch.uint8 and not p.is_meta:
            digest.update(torch.cat((p.detach()[:1024], p.detach()[-1024:])).cpu().numpy().tobytes())
        elif not p.is_meta:
            ends = torch.stack((p.detach()[0], p.detach()[-1])).to(torch.bfloat16).cpu()
            digest.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resident(model: LanguageModel, name: str):
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    return model.adapters[name]
