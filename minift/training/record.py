"""What a run was made with: its config.json, and what a resumed part must share with the first."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from minift.methods.base import training_adapter
from minift.methods.fingerprint import adapters_beneath, fingerprint
from minift.models.interface import LanguageModel


def describe_run(model, data, valid, config) -> dict:
    """The resolved configuration, in the form that `minift train` reads."""
    method = model.adapters[training_adapter(model)].method
    paths = {
        name: str(value)
        for name, value in (("data", data), ("valid", valid))
        if isinstance(value, str | Path)
    }
    return {
        "model": model.source,
        "dtype": model.loaded_dtype or str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        **paths,
        **_head(model),
        **_quantize(model, method),
        "method": {"name": method.name, **asdict(method)},
        "train": asdict(config),
    }


def _head(model) -> dict:
    """A head that is new or has labels; the names of its outputs in the order of their numbers."""
    labels = {"labels": list(model.labels)} if model.labels else {}
    return {"head": model.head_kind, **labels} if labels or model.new_modules else {}


def _quantize(model, method) -> dict:
    """{"quantize": its recipe}; of several recipes, which a config cannot hold, all of them. LoftQ quantizes
    on its own and says so in its fields."""
    own = () if getattr(method, "quantization", True) else (method.recipe,)
    recipes = [asdict(recipe) for recipe in model.quantization if recipe not in own]
    return {"quantize": recipes[0] if len(recipes) == 1 else recipes} if recipes else {}


def resume_key(recorded: dict, model: LanguageModel, examples: list) -> dict:
    """What must not change between the parts of a resumed run."""
    free = ("output", "log_every", "save_every", "eval_every")  # they do not touch the trained numbers
    train = {f"train.{name}": value for name, value in recorded["train"].items() if name not in free}
    method = {f"method.{name}": value for name, value in recorded["method"].items()}
    rows = [{**vars(example), "where": None} for example in examples]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return {
        "model": recorded["model"],
        "dtype": recorded["dtype"],
        **_head(model),
        "base_sha256": fingerprint(model)
        if model.adapters[training_adapter(model)].method.adapter_file
        else None,
        "beneath": adapters_beneath(model, training_adapter(model)),
        "tokens_sha256": digest,
        **method,
        **train,
    }
