"""adapter_config.json: what PEFT's fields say about a method, and back.

A field that would change the forward and is not known here is an error that names it. Methods that PEFT does
not have (bottleneck, bitfit, selective) write their own fields under their own peft_type, which PEFT refuses.
Source: the configs of PEFT 0.21.
"""

from dataclasses import asdict

from minift.methods import METHODS
from minift.methods.base import Method
from minift.methods.ia3 import NONE
from minift.methods.peft_lora import (
    ADALORA_FIELDS,
    LORA_FIELDS,
    listed,
    peft_targets,
    read_adalora,
    read_lora,
    shortest,
    write_adalora,
    write_lora,
)
from minift.models.interface import LanguageModel
from minift.models.targets import fits
from minift.models.wrappers import bare_modules

# Fields that say nothing about the forward of a loaded adapter.
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_ia3_weights",
    "init_weights",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    # of soft prompts: how they were made, and shapes that the base says
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "num_attention_heads",
    "num_layers",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
OWN = ("selective", "bitfit", "bottleneck")  # methods that PEFT does not have
TASKS = {
    "causal_lm": "CAUSAL_LM",
    "masked_lm": None,  # PEFT has no name for it
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "none": "FEATURE_EXTRACTION",
}
USUAL_HEADS = ("classifier", "score")  # PEFT lists both for every classifier, whatever its head is called


def to_config(model: LanguageModel, adapter) -> dict:
    """adapter_config.json of a resident adapter."""
    method = adapter.method
    common = {
        "task_type": TASKS[model.head_kind],
        "base_model_name_or_path": model.source,
        "revision": None,
        "inference_mode": True,
    }
    if method.name in OWN:
        fields = {"peft_type": method.name.upper(), **asdict(method)}
    else:
        fields = WRITE[method.name](model, adapter)
    new = new_head(model, adapter.plan)  # PEFT wraps it whole, so that no name inside it may stand beside it
    inside = tuple(f"{path}." for path in new)
    saved = [*(n for n in fields.get("modules_to_save") or () if not n.startswith(inside)), *new]
    return {**common, **fields, **({"modules_to_save": sorted(saved)} if saved else {})}


def new_head(model: LanguageModel, plan) -> list[str]:
    """The paths of the modules that a plan trains because they are new in the head."""
    return [new for new in model.new_modules if any(s.path.startswith(new + ".") for s in plan.head)]


def without_new_head(model: LanguageModel, config: dict, where) -> dict:
    """A config whose modules_to_save names nothing that is new in this model and trains anyway."""
    saved = listed(config.get("modules_to_save"))
    modules = bare_modules(model)
    kept = [
        name
        for name in saved
        if not any(fits(path, name) and model.is_new(path) for path in modules)
        and not (name in USUAL_HEADS and not any(fits(path, name) for path in modules))
    ]
    if kept and config.get("peft_type") not in ("LORA", "ADALORA"):
        raise ValueError(
            f"{where}: the adapter trained {', '.join(kept)}, a head that its base did not have; load the "
            "base with minift.load_model(..., head=...) so that it is new here too"
        )
    rest = {name: value for name, value in config.items() if name != "modules_to_save"}
    return {**rest, "modules_to_save": kept} if kept else rest


def from_config(config: dict, where) -> Method:
    """The method that a config means."""
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.lower() in OWN:
        fields = {name: value for name, value in config.items() if name not in INERT}
        try:
            return METHODS[kind.lower()](**fields)
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
    if not isinstance(kind, str) or kind not in READ:
        supported = ", ".join([*READ, *map(str.upper, OWN)])
        raise ValueError(f"{where}: peft_type {kind!r} is not supported; supported: {supported}")
    read, known = READ[kind]
    for name, value in config.items():
        neutral = value in (None, False, [], {}, "none") or (name == "lora_bias" and not value)
        if name not in known and name not in INERT and not neutral:
            raise ValueError(
                f"{where}: {name} = {value!r} is not supported, and leaving it out could change the result"
            )
    try:
        return read(config, where)
    except TypeError as error:
        raise ValueError(f"{where}: a field has a type that it cannot have: {error}") from None


def _write_ia3(model, adapter) -> dict:
    paths = {site.path: adapter.modules[site.path].feedforward for site in adapter.plan.sites}
    targets, layers = peft_targets(model, list(paths))
    inner = [path for path, feedforward in paths.items() if feedforward]
    mixed = any(len({paths[p] for p in paths if fits(p, target)}) > 1 for target in targets)
    if layers is not None or mixed:
        targets = sorted(paths)
    return {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": [t for t in targets if any(fits(path, t) for path in inner)],
        "fan_in_fan_out": False,
    }


def _read_ia3(config, where) -> Method:
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(name), str):
            raise ValueError(
                f"{where}: {name} {config[name]!r} is a regular expression; list the names instead"
            )
    return METHODS["ia3"](
        target_modules=tuple(listed(config.get("target_modules"))),
        feedforward_modules=tuple(listed(config.get("feedforward_modules"))) or NONE,
    )


def _write_ln(model, adapter) -> dict:
    own = list(dict.fromkeys(site.path.rpartition(".")[0] for site in adapter.plan.sites))
    return {"peft_type": "LN_TUNING", "target_modules": shortest(model, own)}


def _read_ln(config, where) -> Method:
    return METHODS["ln_tuning"](target_modules=tuple(listed(config.get("target_modules"))))


def _virtual(kind):
    def write(model, adapter) -> dict:
        dims, method = model.dims, adapter.method
        encoder = getattr(method, "encoder_hidden_size", None)
        per_layer = kind == "PREFIX_TUNING"
        return {
            "peft_type": kind,
            "num_virtual_tokens": method.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": dims.blocks,
            "num_attention_heads": dims.kv_heads if per_layer else dims.hidden // dims.head_dim,
            "token_dim": dims.kv_heads * dims.head_dim if per_layer else dims.hidden,
            **({"encoder_hidden_size": encoder} if encoder else {}),
            **({"prefix_projection": method.prefix_projection} if per_layer else {}),
        }

    return write


def _read_virtual(name):
    """The tokens themselves; an encoder, where there is one, is in a file of ours (files.py)."""

    def read(config, where) -> Method:
        if config.get("num_transformer_submodules") not in (None, 1):
            raise ValueError(
                f"{where}: num_transformer_submodules = {config['num_transformer_submodules']!r} is not "
                "supported; supported: 1"
            )
        return METHODS[name](num_virtual_tokens=config.get("num_virtual_tokens"))

    return read


VIRTUAL_FIELDS = {"num_virtual_tokens", "num_transformer_submodules"}
WRITE = {
    **dict.fromkeys(("lora", "qlora", "dora"), write_lora),
    "adalora": write_adalora,
    "ia3": _write_ia3,
    "ln_tuning": _write_ln,
    "prompt_tuning": _virtual("PROMPT_TUNING"),
    "p_tuning": _virtual("P_TUNING"),
    "prefix_tuning": _virtual("PREFIX_TUNING"),
}
READ = {
    "LORA": (read_lora, LORA_FIELDS),
    "ADALORA": (read_adalora, ADALORA_FIELDS),
    "IA3": (_read_ia3, {"target_modules", "feedforward_modules", "fan_in_fan_out"}),
    "LN_TUNING": (_read_ln, {"target_modules"}),
    "PROMPT_TUNING": (_read_virtual("prompt_tuning"), VIRTUAL_FIELDS),
    "P_TUNING": (_read_virtual("prompt_tuning"), VIRTUAL_FIELDS),
    "PREFIX_TUNING": (_read_virtual("prefix_tuning"), VIRTUAL_FIELDS),
}
