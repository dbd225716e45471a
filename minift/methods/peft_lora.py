"""adapter_config.json of LoRA and its kin, written and read; see peft_format.py."""

import re

from minift.methods import METHODS
from minift.methods.base import Method
from minift.models.interface import LanguageModel
from minift.models.targets import ALL_LINEAR, fits, match
from minift.models.wrappers import bare_modules

# Start states whose residual changes the base weights, so that A and B alone do not say the forward.
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write_lora(model, adapter) -> dict:
    method, plan = adapter.method, adapter.plan
    sites = [site for site in plan.sites if site.r is not None]
    # a start that is taken off makes the file a LoRA of twice the rank, of the same scaling
    twice = 2 if any(getattr(part, "start_A", None) is not None for part in adapter.parts) else 1
    alphas = {s.path: s.scaling * twice * s.r if twice == 2 else _alpha(method, s) for s in sites}
    usual = method.scale(method.r, method.alpha) * 2 * method.r if twice == 2 else method.alpha
    targets, layers = peft_targets(model, [site.path for site in sites if site.parameters])
    return {
        "peft_type": "LORA",
        "r": twice * method.r,
        "lora_alpha": usual,
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora and twice == 1,
        "use_dora": method.name == "dora",
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": layers,
        "rank_pattern": {s.path: twice * s.r for s in sites if s.r != method.r},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != usual},
        "modules_to_save": _saved_modules(plan) or None,
        "ensure_weight_tying": any(not site.parameters for site in plan.sites),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _alpha(method, site) -> float:
    return next((a for rule, a in method.alpha_pattern.items() if fits(site.path, rule)), method.alpha)


def _saved_modules(plan) -> list[str]:
    return sorted({s.path.rpartition(".")[0] for s in plan.sites if s.r is None and s.parameters})


LORA_FIELDS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "ensure_weight_tying",
    "init_lora_weights",
    "bias",
    "fan_in_fan_out",
}


def read_lora(config, where) -> Method:
    init = config.get("init_lora_weights")
    if not isinstance(init, str | bool | None) or str(init).lower().startswith(RESIDUAL_INITS):
        raise ValueError(
            f"{where}: init_lora_weights = {init!r} changed the base weights; convert the adapter to a "
            "plain LoRA on the original base first"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias = {config['bias']!r} is not supported; supported: 'none'")
    method = METHODS["dora" if config.get("use_dora") else "lora"]
    return method(
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        rslora=config.get("use_rslora") or False,
        rank_pattern=_pattern(config, "rank_pattern", where),
        alpha_pattern=_pattern(config, "alpha_pattern", where),
        **_low_rank_fields(config, where),
    )


def _low_rank_fields(config, where) -> dict:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise ValueError(
            f"{where}: target_modules {targets!r} is a regular expression; list the module names instead"
        )
    excluded = listed(config.get("exclude_modules"))  # PEFT allows a name on both lists
    targets = tuple(t for t in listed(targets) if t not in excluded)
    if not targets:
        raise ValueError(f"{where}: target_modules is empty, so that no layer is meant")
    return {
        "dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets,
        "exclude_modules": tuple(excluded),
        "layers_to_transform": tuple(map(str, listed(config.get("layers_to_transform")))),
        "modules_to_save": tuple(listed(config.get("modules_to_save"))),
        "tied": "both" if config.get("ensure_weight_tying") else "untie",
    }


def _pattern(config, field, where) -> dict:
    pattern = config.get(field) or {}
    for key in pattern:
        if not re.fullmatch(r"[\w.]+", key):
            raise ValueError(f"{where}: {field} {key!r} is a regular expression; give a name or a path")
    return dict(pattern)


def write_adalora(model, adapter) -> dict:
    method = adapter.method
    targets, layers = peft_targets(model, [site.path for site in adapter.plan.sites if site.r is not None])
    return {
        "peft_type": "ADALORA",
        "init_r": method.r,
        "target_r": method.target_r,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "target_modules": targets,
        "layers_to_transform": layers,
        "modules_to_save": _saved_modules(adapter.plan) or None,
        "tinit": method.tinit,
        "tfinal": method.tfinal,
        "deltaT": method.deltaT,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orth_reg_weight,
        "ensure_weight_tying": any(not site.parameters for site in adapter.plan.sites),
        "total_step": method.tinit + method.tfinal + 1,  # PEFT wants one; it says nothing about the forward
        "rank_pattern": None,  # all r triplets are in the file, the pruned ones with lambda zero
        "bias": "none",
    }


ADALORA_FIELDS = {
    *("init_r", "r", "target_r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias"),
    *("layers_to_transform", "modules_to_save", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
    *("ensure_weight_tying", "orth_reg_weight", "total_step", "rank_pattern", "init_lora_weights"),
}


def read_adalora(config, where) -> Method:
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias = {config['bias']!r} is not supported; supported: 'none'")
    named = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    return METHODS["adalora"](
        r=config.get("init_r", 12),
        alpha=config.get("lora_alpha", 8),
        **{name: config[name] for name in named if config.get(name) is not None},
        **_low_rank_fields(config, where),
    )


def listed(value) -> list:
    return [] if value is None else [value] if isinstance(value, str | int) else list(value)


def shortest(model: LanguageModel, paths: list[str]) -> list[str]:
    """Last names where they mean just these paths, otherwise the paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    meant = [p for p in bare_modules(model) if any(fits(p, n) for n in names)]
    return names if sorted(meant) == sorted(paths) else sorted(paths)


def peft_targets(model: LanguageModel, paths: list[str]) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that mean exactly these paths; last names where they suffice."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    blocks = sorted({model.block_index(path) for path in paths} - {None})
    if shortest(model, paths) == names:
        return names, None
    inside = all(model.block_index(path) is not None for path in paths)
    if inside and sorted(match(model, names, layers=blocks, among=bare_modules(model))) == sorted(paths):
        return names, blocks
    return sorted(paths), None
