"""Models and tokenizers from an alias, a Hugging Face folder or a GGUF file; and back to a folder."""

import json
import os
from pathlib import Path

import torch

from minift.data import tokenizer as tokenizers
from minift.fetch import ALIASES, cached
from minift.memory import release_free_memory
from minift.models import MODELS, weights
from minift.models.disk import never_read, open_file, write_text
from minift.models.gguf_file import read_gguf
from minift.models.heads import CLASSIFIERS, asked_head, check_problem, default_labels, read_labels
from minift.models.interface import LanguageModel, is_quantized
from minift.models.skeleton import shapes_only
from minift.models.wrappers import base_layers, replace_module
from minift.quant import Quantization, bnb
from minift.quant.linear import QuantizedLinear
from minift.quant.model import layers_to_quantize, quantize_layer, record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        with open_file(path.resolve()) as file:
            start = file.read(512)
        raise ValueError(never_read(path, start) or f"{path} is neither a folder nor a .gguf file")
    return path.is_file()


def load_model(
    source: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    quantize: str | Quantization | None = None,
    *,
    head: str | None = None,
    num_labels: int | None = None,
    labels: tuple[str, ...] | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Build on the meta device, fill tensor by tensor. `dtype`, of storage and compute, is one of DTYPES.

    `head` is one of heads.HEADS or "regression"; by default the one that the checkpoint was saved with. What
    the checkpoint lacks of another head is new: it starts from `seed` and trains with every method
    (`model.new_modules`). A classifier has `num_labels` outputs, or one for each name in `labels`.

    `quantize` is a format ("nf4") or a Quantization: each linear layer that it means is quantized as soon as
    it has been read, with the numbers of `quantize_model` after a dense load. A bitsandbytes 4-bit folder
    loads as it is. Peak private memory: the model's bytes, one of its largest tensors where layers are
    quantized, and one chunk of rows (`weights.CHUNK_BYTES`) with its copies.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    recipe = Quantization(quantize) if isinstance(quantize, str) else quantize
    if not isinstance(recipe, Quantization | None):
        raise ValueError(f"quantize is {quantize!r}; give a format such as 'nf4', a Quantization, or None")
    model, tensors = _open(source, head, num_labels, labels)
    _take_quantized(model, tensors, DTYPES[dtype], device)
    chosen = set(layers_to_quantize(model, recipe)) if recipe else set()
    rows = []

    def place(model, name, tensor):
        weights.set_parameter(model, name, tensor)
        path = name.removesuffix(".weight")
        if path in chosen:
            layer, row = quantize_layer(model.get_submodule(path), recipe, path)
            replace_module(model, path, layer)
            rows.append(row)
            release_free_memory()

    weights.fill(model, tensors, DTYPES[dtype], device, place, seed)
    if recipe:
        record(model, recipe, rows)
    model.loaded_dtype = dtype
    return model.eval()


def _take_quantized(model: LanguageModel, tensors: dict, dtype: torch.dtype, device) -> None:
    """Take a bitsandbytes checkpoint's 4-bit layers out of `tensors` and into the model."""
    layers, paths = base_layers(model), bnb.quantized_paths(tensors)
    for path in paths:
        name = f"{path}.weight"
        state = {}
        for key in [key for key in tensors if key == name or key.startswith(name + ".")]:
            stored = tensors.pop(key)
            if not stored.shape:
                raise ValueError(f"{key} has no dimensions; a 4-bit layer is stored as vectors")
            state[key] = stored.rows(0, stored.shape[0]).to(device, copy=True)  # not the mapped file
        weight = bnb.from_state(state, path)
        if weight.scales().abs().max() > torch.finfo(dtype).max:
            raise ValueError(f"{name} holds numbers beyond {dtype}; load the model with another dtype")
        if path not in layers:
            raise ValueError(f"{name} is 4-bit, and the model has no linear layer {path}")
        layer = layers[path]
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{name} is a 4-bit matrix {weight.shape}; the config asks for "
                f"{(layer.out_features, layer.in_features)}"
            )
        if layer is model.head and model.tied:
            raise ValueError(
                f"{name} is 4-bit, but config.json ties it to the embedding; set tie_word_embeddings to false"
            )
        replace_module(model, path, QuantizedLinear.from_weight(weight, dtype, layer.bias))


def holds_quantized(source: str | Path) -> bool:
    """Whether a source is a 4-bit checkpoint already."""
    return bool(bnb.quantized_paths(_open(source)[1]))


def build_model(
    source: str | Path, head: str | None = None, num_labels: int | None = None, labels=None
) -> LanguageModel:
    """The model of a source on the meta device: all shapes, no weights."""
    return _open(source, head, num_labels, labels)[0]


def _open(source, head=None, num_labels=None, labels=None):
    """(model on the meta device, its tensors on disk)."""
    path = locate(source)
    config, tensors = weights.open_gguf(path) if _is_gguf(path) else weights.open_folder(path)
    family, config_class, stored = _family(config, path)
    bnb.check_config(config)
    if config.pop("quantization_config", None) and not bnb.quantized_paths(tensors):
        raise ValueError(f"{path}: config.json announces 4-bit weights, and no tensor has a quant_state")
    head, num_labels = asked_head(head, num_labels)
    kind = head or stored
    labels = _labels(config, kind, kind == stored, num_labels, labels)
    parsed = config_class.from_hf(config)
    blocks = sum(getattr(parsed, name) or 0 for name in parsed.BLOCKS)
    if blocks > len(tensors):  # before that many are made
        raise ValueError(
            f"{path}: the config asks for {blocks} blocks; the checkpoint has {len(tensors)} tensors"
        )
    try:
        with shapes_only():
            model = family(parsed, kind, labels)
    except RuntimeError as error:  # sizes beyond 64 bits
        raise ValueError(f"{path}: the config asks for tensors that no memory holds: {error}") from None
    model.source = str(source)
    tensors = weights.renamed(model, tensors)
    model.settle(tensors)
    if kind != stored:
        weights.take_new_head(model, tensors)
    return model, tensors


def _family(config: dict, path):
    """(family, its config, head) of an architecture."""
    names = config.get("architectures")
    names = names if isinstance(names, list) and names else [None]
    if names[0] not in list(MODELS):
        raise ValueError(
            f"{path}: architecture {names[0]!r} is not supported; supported: {', '.join(MODELS)}"
        )
    return MODELS[names[0]]


def _labels(config: dict, head: str, is_stored: bool, num_labels: int | None, labels) -> tuple[str, ...]:
    """The names of the outputs of a head that the checkpoint has, or of a new one."""
    if labels is not None:
        if not isinstance(labels, list | tuple) or not all(isinstance(x, str) and x for x in labels):
            raise ValueError(f"labels is {labels!r}; it is a list of names")
        labels = tuple(labels)
        if num_labels not in (None, len(labels)) or len(set(labels)) != len(labels) or not labels:
            raise ValueError(f"labels {labels} must be different names, as many as num_labels, {num_labels}")
        num_labels = len(labels)
    if head not in CLASSIFIERS:
        if num_labels is not None:
            raise ValueError(
                f"num_labels and labels are for {' and '.join(CLASSIFIERS)}; the head is {head!r}"
            )
        return ()
    if not is_stored:
        if num_labels is None:
            raise ValueError(f"the head {head!r} is new here; say how many outputs it has with num_labels")
        return labels or default_labels(num_labels)
    known = read_labels(config)
    check_problem(config, known)
    if num_labels not in (None, len(known)) or labels not in (None, known):
        raise ValueError(
            f"the checkpoint's head has {len(known)} labels ({', '.join(known[:5])}), and "
            f"{labels or num_labels} were asked for; leave num_labels out, or load it with another head first"
        )
    return known


def load_tokenizer(source: str | Path) -> tokenizers.Tokenizer:
    """From tokenizer.json and its neighbours in a folder, or from the vocabulary inside a GGUF file."""
    path = locate(source)
    return tokenizers.from_gguf(read_gguf(path)[0]) if _is_gguf(path) else tokenizers.from_folder(path)


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: str | Path) -> None:
    """tokenizer.json, and what `load_tokenizer` needs beside it, into a model's folder."""
    folder, backend = Path(folder), tokenizer.backend
    roles = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None), "pad": tokenizer.pad_id}
    names = {f"{role}_token": backend.id_to_token(i) for role, i in roles.items() if i is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    ends = {"eos_token_id": list(tokenizer.eos_ids)}
    write_text(folder / "generation_config.json", json.dumps(ends, indent=2) + "\n")


def fresh_folder(output: str | Path) -> Path:
    """The path, if nothing would be overwritten there."""
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {output} exists already; give another folder, or remove it first")
    return path


def save_model(model: LanguageModel, folder: str | Path) -> None:
    """A Hugging Face folder: config.json and model.safetensors; adapters must have been merged.

    NF4 and FP4 layers are written as bitsandbytes 4-bit checkpoints are, which transformers loads.
    """
    if model.adapters:
        raise ValueError(
            f"adapters {sorted(model.adapters)} are still wrapped around the model: "
            "minift.merge(model) first, or minift.save_adapter them"
        )
    layers = base_layers(model)
    quantized = {path: layer.quantized() for path, layer in layers.items() if is_quantized(layer)}
    state = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    config, state = model.to_hf(), weights.as_stored(model, state)
    if quantized:
        for path, weight in quantized.items():
            state |= bnb.to_state(weight, path)
        dense = [path for path in layers if path not in quantized]
        config["quantization_config"] = bnb.to_config(quantized, dense)
    weights.write_folder(folder, config, state, model.dtype)
