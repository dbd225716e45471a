"""Methods by name, and what is done with them: apply, merge."""

from minift.methods.base import Adapter, Method, Plan
from minift.methods.full import Full
from minift.methods.lora import LoRA
from minift.models.interface import LanguageModel

METHODS = {"full": Full, "lora": LoRA}


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


def merge(model: LanguageModel, name: str | None = None) -> dict[str, float]:
    """Fold an adapter (the only one, or `name`) into the base weights and remove its wrappers.

    Returns, for each path, the largest difference between a merged weight and its exact value; the merged
    weight is computed in fp32 and rounded once to the base's dtype.
    """
    if name is None:
        if len(model.adapters) != 1:
            raise ValueError(f"merge which adapter? resident: {sorted(model.adapters) or 'none'}")
        name = next(iter(model.adapters))
    if name not in model.adapters:
        raise ValueError(f"no adapter named {name!r}; resident: {sorted(model.adapters) or 'none'}")
    errors = model.adapters[name].method.merge(model, name)
    del model.adapters[name]
    return errors
