"""Checkpoints on disk as streams of rows, in and out: Hugging Face folders and GGUF files.

A model is built on the meta device and filled tensor by tensor, large tensors by chunks of rows, so that
loading holds the model itself and one chunk. Every key is used exactly once and every shape is checked.
Nothing is unpickled: .bin and .pt files are refused.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minift.models import llama
from minift.models.gguf_file import dequantize, read_gguf

CHUNK_BYTES = 2**22  # of fp32 rows in flight while loading
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk: rows(start, stop) reads part of its first dimension."""

    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]


def open_folder(folder: Path, files: ExitStack) -> tuple[dict, dict[str, StoredTensor]]:
    """config.json and the tensors of model.safetensors, or of the shards in model.safetensors.index.json."""
    config = read_json(
        folder / "config.json", "a Hugging Face model folder holds config.json and *.safetensors"
    )
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index, "").get("weight_map") if index.exists() else None
    if index.exists() and not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    shards = (
        sorted({str(shard) for shard in weight_map.values()})
        if weight_map is not None
        else ["model.safetensors"]
    )
    tensors = {}
    for shard in shards:
        if not SHARD_NAME.fullmatch(str(shard)):
            raise ValueError(f"{index}: {shard!r} is no plain file name ending in .safetensors")
        opened = open_safetensors(folder / shard, files)
        for name in opened.keys():  # noqa: SIM118 (a safetensors file is no dict)
            if name in tensors:
                raise ValueError(f"{folder}: {name} stands in two shards")
            part = opened.get_slice(name)
            tensors[name] = StoredTensor(tuple(part.get_shape()), lambda a, b, part=part: part[a:b])
    if weight_map is not None and set(weight_map) != set(tensors):
        raise ValueError(f"{index} and the shards disagree: {_some(set(weight_map) ^ set(tensors))}")
    return config, tensors


def open_safetensors(path: Path, files: ExitStack):
    if not path.is_file():
        pickled = [p.name for p in path.parent.glob("*.bin")]
        hint = f" ({pickled[0]} is a pickle and is never read; convert it to safetensors)" if pickled else ""
        raise ValueError(f"{path} is missing{hint}")
    try:
        return files.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); fetch it again") from None


def open_gguf(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """The config that a GGUF file implies and its tensors, under the names of Hugging Face checkpoints."""
    metadata, stored = read_gguf(path)
    if metadata.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: GGUF architecture {metadata.get('general.architecture')!r} is not supported; "
            "supported: 'llama'"
        )
    config = llama.gguf_config(metadata, {name: t.shape for name, t in stored.items()})
    parsed = llama.LlamaConfig.from_hf(config)
    tensors = {}
    for name, tensor in stored.items():
        order = llama.gguf_rows(llama.gguf_name(name), parsed) if name.startswith("blk.") else None

        def rows(start, stop, tensor=tensor, order=order):
            wanted = slice(start, stop) if order is None else order[start:stop].numpy()
            return torch.from_numpy(dequantize(tensor, wanted)).view(stop - start, *tensor.shape[1:])

        def vector(start, stop, tensor=tensor):
            return torch.from_numpy(dequantize(tensor, slice(0, 1))).view(-1)[start:stop]

        tensors[llama.gguf_name(name)] = StoredTensor(tensor.shape, rows if len(tensor.shape) > 1 else vector)
    return {"architectures": ["LlamaForCausalLM"], **config}, tensors


def fill(
    model: nn.Module, tensors: dict[str, StoredTensor], dtype: torch.dtype, device="cpu", place=None
) -> None:
    """Give a meta-device model its weights, each rounded once to `dtype`; what has weights already keeps
    them.

    `place(model, name, tensor)` puts one tensor where it belongs: by default, as the parameter of that name.
    """
    place = place or set_parameter
    parameters = {name: p for name, p in model.named_parameters() if p.is_meta}  # a tied head appears once
    tensors = {
        name: t
        for name, t in tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in model.ignored_keys)
    }
    _check_tied_copies(model, parameters, tensors)
    missing, unexpected = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or unexpected:
        raise ValueError(
            "the checkpoint does not fit the model:"
            + (f" missing {_some(missing)}" if missing else "")
            + (f" unexpected {_some(unexpected)}" if unexpected else "")
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"{name} has shape {tensors[name].shape} in the checkpoint; "
                f"the config asks for {tuple(parameter.shape)}"
            )
    for name in parameters:
        place(model, name, _read(name, tensors[name], dtype, device))
    model.tie_weights()


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    requires_grad = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=requires_grad))


def _read(name: str, source: StoredTensor, dtype, device) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype, device=device)
    for rows, part in _chunks(source):
        if not part.is_floating_point():
            raise ValueError(f"{name} is stored as {part.dtype}; weights are floating-point")
        target[rows] = part
        if not torch.isfinite(target[rows]).all():
            bad = (~torch.isfinite(target[rows])).nonzero()[0].tolist()
            bad[0] += rows.start
            raise ValueError(f"{name} is not finite at {bad} in {str(dtype).removeprefix('torch.')}")
    return target


def _chunks(source: StoredTensor):
    size = source.shape[0]
    step = max(1, CHUNK_BYTES // (4 * max(1, int(torch.Size(source.shape).numel() / max(1, size)))))
    for start in range(0, size, step):
        stop = min(size, start + step)
        yield slice(start, stop), source.rows(start, stop)


def _check_tied_copies(model, parameters, tensors) -> None:
    """Some checkpoints store a tied head beside its embedding: accept an equal copy, refuse another."""
    names = {id(p): name for name, p in parameters.items()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        name = names.get(id(parameter), alias)
        if alias == name or alias not in tensors or name not in tensors:
            continue
        copy, original = tensors.pop(alias), tensors[name]
        same = copy.shape == original.shape and all(
            torch.equal(a, b) for (_, a), (_, b) in zip(_chunks(copy), _chunks(original), strict=True)
        )
        if not same:
            raise ValueError(
                f"config.json ties {alias} to {name}, but the checkpoint stores different weights"
            )


def write_folder(folder, config: dict, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """model.safetensors and config.json, each moved into place when complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of an older, sharded model
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write beside `path`, flush to disk, rename: an interrupted write leaves the old file as it was.

    The same tensors and metadata give the same bytes.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}

    def write(part):
        save_file(tensors, part, metadata)
        _sort_metadata(part)

    _write_beside(path, write)


def _sort_metadata(path: str) -> None:
    """safetensors writes the metadata in an order that changes from run to run; sort it."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"the header of {path} does not fit its place: {len(text)} of {size} bytes")
        file.seek(8)
        file.write(text.ljust(size))


def write_text(path: Path, text: str) -> None:
    """As `write_safetensors`."""
    _write_beside(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def _write_beside(path: Path, write: Callable[[str], object]) -> None:
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        try:
            write(part)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def read_json(path: Path, hint: str) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing" + (f"; {hint}" if hint else ""))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
