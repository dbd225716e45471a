"""Checkpoints on disk as streams of rows, in and out: Hugging Face folders and GGUF files.

A model is built on the meta device and filled tensor by tensor, large tensors by chunks of rows, so that
loading holds the model itself and one chunk. Every key is used exactly once and every shape is checked.
Nothing is unpickled: .bin and .pt files are refused.
"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from minift.models import gguf_llama
from minift.models.disk import replacing
from minift.models.gguf_file import dequantize, read_gguf
from minift.models.heads import LANGUAGE_MODELS, start_parameter
from minift.models.json_file import read_json
from minift.models.llama import LlamaConfig
from minift.models.safetensors_file import StoredTensor, open_safetensors, write_tensors
from minift.models.wrappers import path_of

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2**22  # of fp32 rows in flight while loading
SHARD_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,116}\.safetensors")


def open_folder(folder: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """config.json and the tensors of model.safetensors, or of the shards in model.safetensors.index.json."""
    config = read_json(
        folder / "config.json", "a Hugging Face model folder holds config.json and *.safetensors"
    )
    index = folder / INDEX
    if not os.path.lexists(index):
        return config, open_safetensors(folder / "model.safetensors")[0]
    weight_map = _weight_map(index)
    tensors, places = {}, {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in open_safetensors(folder / shard)[0].items():
            if name in tensors:
                raise ValueError(f"{folder}: {name} stands in two shards, {places[name]} and {shard}")
            tensors[name], places[name] = tensor, shard
    if weight_map != places:
        wrong = {name for name in weight_map | places if weight_map.get(name) != places.get(name)}
        raise ValueError(f"{index} and the shards disagree: {_some(wrong)}")
    return config, tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, a plain file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f"{index}: {str(shard)[:200]!r} is no plain file name ending in .safetensors, of at most "
                "128 letters, digits and ._-"
            )
    return weight_map


def open_gguf(path: Path) -> tuple[dict, dict[str, StoredTensor]]:
    """The config that a GGUF file implies and its tensors, under the names of Hugging Face checkpoints."""
    metadata, stored = read_gguf(path)
    if metadata.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: GGUF architecture {metadata.get('general.architecture')!r} is not supported; "
            "supported: 'llama'"
        )
    for key in (*gguf_llama.GGUF_FIELDS.values(), "llama.attention.key_length"):
        if type(metadata.get(key, 0)) not in (int, float):
            raise ValueError(f"{path}: {key} is {str(metadata[key])[:80]}, expected a number")
    config = gguf_llama.gguf_config(metadata, {name: t.shape for name, t in stored.items()})
    parsed = LlamaConfig.from_hf(config)
    widest = max(parsed.num_attention_heads, parsed.num_key_value_heads) * parsed.head_dim
    if widest > max((t.shape[0] for t in stored.values()), default=0):  # before the order of rows is made
        raise ValueError(f"{path}: no tensor has the {widest} rows of {parsed.num_attention_heads} heads")
    tensors = {}
    for name, tensor in stored.items():
        ours = gguf_llama.gguf_name(name)
        if ours in tensors:
            raise ValueError(f"{path} stores {ours} twice, the second time as {name}")

        def rows(start, stop, tensor=tensor, ours=ours):
            order = gguf_llama.gguf_rows(ours, parsed)
            wanted = slice(start, stop) if order is None else order[start:stop].numpy()
            return torch.from_numpy(dequantize(tensor, wanted)).view(stop - start, *tensor.shape[1:])

        def vector(start, stop, tensor=tensor):
            return torch.from_numpy(dequantize(tensor, slice(0, 1))).view(-1)[start:stop]

        tensors[ours] = StoredTensor(tensor.shape, rows if len(tensor.shape) > 1 else vector)
    return {"architectures": ["LlamaForCausalLM"], **config}, tensors


def renamed(model: nn.Module, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint's tensors under the model's own names, in its orientation, without those it ignores."""
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for key, stored in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in model.ignored_keys):
            continue
        weight, dot, beside = key.partition(".weight.")  # bitsandbytes stores more beside a weight
        name = _own_name(model, own, f"{weight}.weight" if dot else key) + (f".{beside}" if dot else "")
        if name in found:
            raise ValueError(f"the checkpoint stores {name} twice, the second time as {key}")
        found[name] = _transposed(stored) if _is_transposed(model, name) else stored
    return found


def _own_name(model: nn.Module, own: set[str], key: str) -> str:
    """Checkpoints differ in what they call the part without the head; an unknown key stays as it is."""
    for pattern, new in model.renamed_keys:
        key = re.sub(pattern, new, key)
    if key in own:
        return key
    for trunk in ("", *model.trunks):
        if not trunk or key.startswith(trunk + "."):
            name = f"{model.trunk}.{key.removeprefix(trunk).lstrip('.')}".lstrip(".")
            if name in own:
                return name
    return key


def _is_transposed(model: nn.Module, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in model.transposed)


def _transposed(stored: StoredTensor) -> StoredTensor:
    if len(stored.shape) != 2:
        return stored  # of a wrong shape, which is an error later
    rows, columns = stored.shape
    return StoredTensor((columns, rows), lambda a, b: stored.rows(0, rows)[:, a:b].T)


def take_new_head(model: nn.Module, tensors: dict[str, StoredTensor]) -> None:
    """Leave out what other heads of the family store; what this head lacks is new.

    The last layer of another classifier is left out even where its name and shape are the same.
    """
    own = dict(model.named_parameters())  # a tied one once
    last = "" if model.head_kind in LANGUAGE_MODELS else path_of(model, model.head) + "."
    for name in list(tensors):
        another = name not in own and any(re.fullmatch(pattern, name) for pattern in model.head_keys)
        if another or (last and name.startswith(last)):
            del tensors[name]
    model.new_modules = tuple(
        path
        for path in model.head_modules
        if any(name.startswith(path + ".") for name in own)
        and not any(name.startswith(path + ".") for name in own.keys() & tensors.keys())
    )


def as_stored(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors as checkpoints hold them: without the trunk's name where there is no head."""
    prefix = f"{model.trunk}." if model.head_kind == "none" and model.trunk else ""
    return {
        name.removeprefix(prefix): tensor.T if _is_transposed(model, name) else tensor
        for name, tensor in state.items()
    }


def fill(
    model: nn.Module,
    tensors: dict[str, StoredTensor],
    dtype: torch.dtype,
    device="cpu",
    place=None,
    seed: int = 0,
) -> None:
    """Give a meta-device model its weights, each rounded once to `dtype`; what has weights already keeps
    them, and what is new in the head starts from the seed.

    `place(model, name, tensor)` puts one tensor where it belongs: by default, as the parameter of that name.
    """
    place = place or set_parameter
    parameters = {name: p for name, p in model.named_parameters() if p.is_meta}  # a tied head appears once
    new = {name for name in parameters if model.is_new(name)}
    tensors = dict(tensors)
    _check_tied_copies(model, parameters, tensors)
    missing, unexpected = sorted(set(parameters) - set(tensors) - new), sorted(set(tensors) - set(parameters))
    if missing or unexpected:
        raise ValueError(
            "the checkpoint does not fit the model:"
            + (f" missing {_some(missing)}" if missing else "")
            + (f" unexpected {_some(unexpected)}" if unexpected else "")
        )
    for name, parameter in parameters.items():
        if name not in new and tensors[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"{name} has shape {tensors[name].shape} in the checkpoint; "
                f"the config asks for {tuple(parameter.shape)}"
            )
    for name in parameters:
        if name in new:
            path, _, attribute = name.rpartition(".")
            start = start_parameter(model.get_submodule(path), attribute, name, dtype, device, seed)
            place(model, name, start)
        else:
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


def same_tensor(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers in the same dtype."""
    return a.shape == b.shape != () and all(
        p.dtype == q.dtype and torch.equal(p, q)
        for (_, p), (_, q) in zip(_chunks(a), _chunks(b), strict=True)
    )


def _check_tied_copies(model, parameters, tensors) -> None:
    """Some checkpoints store a tied head beside its embedding: accept an equal copy, refuse another."""
    names = {id(p): name for name, p in parameters.items()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        name = names.get(id(parameter), alias)
        if alias == name or alias not in tensors or name not in tensors:
            continue
        if not same_tensor(tensors.pop(alias), tensors[name]):
            raise ValueError(
                f"config.json ties {alias} to {name}, but the checkpoint stores different weights"
            )


def write_folder(folder, config: dict, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """model.safetensors and config.json, moved into place when both are on disk, the config last.

    An old config that says something else goes before the new weights come: a crash between the two leaves a
    folder that does not load, never new weights under an old config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    weights, settings, index = (folder / n for n in ("model.safetensors", "config.json", INDEX))
    same = settings.is_file() and settings.read_bytes() == text.encode()
    shards = set()
    with suppress(ValueError):  # of a damaged index nothing is removed but itself
        shards = set(_weight_map(index).values())
    removing = (index,) if same else (index, settings)
    with replacing(weights, settings, removing=removing) as (weights_file, settings_file):
        write_tensors(weights_file, state, {"format": "pt"})
        settings_file.write(text.encode())
    for shard in shards - {weights.name}:  # of the older, sharded model
        (folder / shard).unlink(missing_ok=True)


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
