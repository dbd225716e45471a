"""Models and tokenizers from an alias, a Hugging Face folder or a GGUF file; and back to a folder."""

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from minift.data import tokenizer as tokenizers
from minift.fetch import ALIASES, cached
from minift.models import MODELS, weights
from minift.models.gguf_file import read_gguf
from minift.models.interface import LanguageModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SkipInit(TorchFunctionMode):
    """Leave out torch.nn.init: random starts on the meta device load 77 MB of modules for nothing."""

    def __torch_function__(self, function, kinds, arguments=(), keywords=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


def locate(source: str | Path) -> Path:
    """The folder or .gguf file that a source names; an alias must have been fetched."""
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    if str(source) in ALIASES:
        return cached(str(source))
    raise ValueError(
        f"no model at {source!r}: give a folder with config.json and *.safetensors, a .gguf file, "
        f"or one of {', '.join(ALIASES)}"
    )


def _is_gguf(path: Path) -> bool:
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is neither a folder nor a .gguf file")
    return path.is_file()


def load_model(source: str | Path, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """Build on the meta device, fill tensor by tensor. `dtype`, of storage and compute, is one of DTYPES.

    Peak private memory: the model's bytes and one chunk of rows (`weights.CHUNK_BYTES`) with its copies.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    with ExitStack() as files:
        model, tensors = _open(source, files)
        weights.fill(model, tensors, DTYPES[dtype], device)
    model.loaded_dtype = dtype
    return model.eval()


def build_model(source: str | Path) -> LanguageModel:
    """The model of a source on the meta device: all shapes, no weights."""
    with ExitStack() as files:
        return _open(source, files)[0]


def _open(source, files: ExitStack):
    """(model on the meta device, its tensors on disk)."""
    path = locate(source)
    config, tensors = weights.open_gguf(path) if _is_gguf(path) else weights.open_folder(path, files)
    names = config.get("architectures")
    names = names if isinstance(names, list) and names else [None]
    if names[0] not in list(MODELS):
        raise ValueError(
            f"{path}: architecture {names[0]!r} is not supported; supported: {', '.join(MODELS)}"
        )
    model_class, config_class = MODELS[names[0]]
    with torch.device("meta"), SkipInit():
        model = model_class(config_class.from_hf(config))
    model.source = str(source)
    return model, tensors


def load_tokenizer(source: str | Path) -> tokenizers.Tokenizer:
    """From tokenizer.json and its neighbours in a folder, or from the vocabulary inside a GGUF file."""
    path = locate(source)
    return tokenizers.from_gguf(read_gguf(path)[0]) if _is_gguf(path) else tokenizers.from_folder(path)


def save_model(model: LanguageModel, folder: str | Path) -> None:
    """A Hugging Face folder: config.json and model.safetensors; adapters must have been merged."""
    if model.adapters:
        raise ValueError(
            f"adapters {sorted(model.adapters)} are still wrapped around the model: "
            "minift.merge(model) first, or minift.save_adapter them"
        )
    weights.write_folder(
        folder, model.config.to_hf(), dict(model.named_parameters()), model.embed.weight.dtype
    )
