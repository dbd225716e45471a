"""minift: parameter-efficient fine-tuning of transformer language models, from scratch.

The public names below are resolved on first use (PEP 562): `import minift` imports nothing, and
`import minift.metrics` needs numpy alone.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "load_model": "minift.load",
    "load_tokenizer": "minift.load",
    "save_model": "minift.load",
    "save_tokenizer": "minift.load",
    "apply": "minift.methods",
    "merge": "minift.methods",
    "unmerge": "minift.methods",
    "METHODS": "minift.methods",
    "combine": "minift.methods.algebra",
    "set_rank": "minift.methods.rank",
    "advise": "minift.methods.rank",
    "LoRA": "minift.methods.lora",
    "QLoRA": "minift.methods.qlora",
    "DoRA": "minift.methods.dora",
    "AdaLoRA": "minift.methods.adalora",
    "Full": "minift.methods.full",
    "Selective": "minift.methods.selective",
    "PromptTuning": "minift.methods.prompt_tuning",
    "PTuning": "minift.methods.p_tuning",
    "PrefixTuning": "minift.methods.prefix_tuning",
    "BitFit": "minift.methods.bitfit",
    "LNTuning": "minift.methods.ln_tuning",
    "IA3": "minift.methods.ia3",
    "Bottleneck": "minift.methods.bottleneck",
    "Method": "minift.methods.base",
    "Plan": "minift.methods.base",
    "save_adapter": "minift.methods.files",
    "load_adapter": "minift.methods.files",
    "quantize_weight": "minift.quant",
    "quantize_model": "minift.quant",
    "Quantization": "minift.quant",
    "FORMATS": "minift.quant",
    "MODELS": "minift.models",
    "generate": "minift.models.generate",
    "stream": "minift.models.generate",
    "train": "minift.training.loop",
    "evaluate_loss": "minift.training.evaluation",
    "TrainConfig": "minift.training.settings",
    "Tokenizer": "minift.data.tokenizer",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'minift' has no attribute {name!r}; public names: {', '.join(_HOME)}")
    home = import_module(_HOME[name])
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
