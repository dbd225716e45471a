"""Methods by name, and what is done with them: apply, merge, unmerge."""

from minift.methods.base import Method, Plan
from minift.methods.full import Full
from minift.methods.lora import LoRA
from minift.methods.merging import merge, unmerge
from minift.methods.qlora import QLoRA
from minift.methods.selective import Selective
from minift.models.interface import LanguageModel

__all__ = ["METHODS", "apply", "merge", "unmerge"]

METHODS = {"full": Full, "selective": Selective, "lora": LoRA, "qlora": QLoRA}


def apply(model: LanguageModel, method: Method, name: str = "default", seed: int = 0) -> Plan:
    """Freeze the model, plan, inject; what the method adds under `name` is all that trains.

    Adapters that are resident already stay active, frozen. Nothing is touched when the plan fails.
    """
    return model.adapters.add(name, method, seed)
