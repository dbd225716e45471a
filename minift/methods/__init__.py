"""Methods by name, and what is done with them: apply, merge, unmerge."""

from minift.methods.adalora import AdaLoRA
from minift.methods.base import Method
from minift.methods.bitfit import BitFit
from minift.methods.bottleneck import Bottleneck
from minift.methods.dora import DoRA
from minift.methods.full import Full
from minift.methods.ia3 import IA3
from minift.methods.ln_tuning import LNTuning
from minift.methods.lora import LoRA
from minift.methods.merging import merge, unmerge
from minift.methods.p_tuning import PTuning
from minift.methods.plan import Plan
from minift.methods.prefix_tuning import PrefixTuning
from minift.methods.prompt_tuning import PromptTuning
from minift.methods.qlora import QLoRA
from minift.methods.selective import Selective
from minift.models.interface import LanguageModel

__all__ = ["METHODS", "apply", "merge", "unmerge"]

METHODS = {
    "full": Full,
    "selective": Selective,
    "lora": LoRA,
    "qlora": QLoRA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "bitfit": BitFit,
    "ln_tuning": LNTuning,
    "ia3": IA3,
    "bottleneck": Bottleneck,
}


def apply(model: LanguageModel, method: Method, name: str = "default", seed: int = 0) -> Plan:
    """Freeze the model, plan, inject; what the method adds under `name` is all that trains.

    Adapters that are resident already stay active, frozen. Nothing is touched when the plan fails.
    """
    return model.adapters.add(name, method, seed)
