"""A corpus of files that attack whoever loads them, made by code: folders of models, adapters and tokenizers.

A case is a valid folder with some files replaced: by bytes, by a function that makes a link or a pipe, or by
nothing. Its kind is the valid folder that it spoils: "model", "adapter", "tokenizer", "gguf" or
"gguf_tokenizer".
"""

import json
import os
import pickle
import socket
from pathlib import Path
from typing import NamedTuple

import hostile_gguf
from hostile_json import adapter_values, broken_json, config_values, tokenizer_values
from hostile_weights import built, parts, weight_files

EXTENSIONS = (
    "bin",
    "pt",
    "pth",
    "ckpt",
    "pkl",
    "pickle",
    "safetensors",
    "npz",
    "joblib",
    "model",
    "zip",
    "gguf",
)
FILES = {  # of the valid folders
    "model": ("config.json", "model.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
}
INDEX = "model.safetensors.index.json"
SECRET = "the words of a file outside"


class Case(NamedTuple):
    kind: str  # which valid folder, and how it is loaded
    name: str
    changes: dict  # file -> bytes, a function of the path, or None
    target: str = ""  # the file to load, where it is not the folder


class Bomb:
    def __reduce__(self):
        return os.system, (f"echo {SECRET}",)


def foreign():
    """What is never read, by name."""
    yield from {f"pickle {p}": pickle.dumps(Bomb(), protocol=p) for p in (0, 2, 4, 5)}.items()
    yield "zip", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + pickle.dumps(Bomb())
    yield "empty zip", b"PK\x05\x06" + bytes(18)
    yield "tar", b"data.pkl".ljust(257, b"\0") + b"ustar\x0000" + bytes(247) + pickle.dumps(Bomb())
    yield "gzip", b"\x1f\x8b\x08" + bytes(100)


def foreign_cases():
    for what, data in foreign():
        for extension in EXTENSIONS:
            name = f"weights.{extension}"
            yield Case("model", f"{what} as a file .{extension}", {name: data}, name)
        for kind, names in FILES.items():
            for name in names:
                yield Case(kind, f"{what} as {name}", {name: data})
        yield Case("model", f"{what} as an index", {INDEX: data})
        yield Case("adapter", f"{what} as an encoder", {"adapter_encoder.safetensors": data})
        yield Case(
            "model", f"{what} as the only weights", {"model.safetensors": None, "pytorch_model.bin": data}
        )


def links(outside: Path):
    """What may stand where a file should: function of the path that puts it there, by name."""
    yield "link outside", lambda path: path.symlink_to(outside / path.name)
    yield "link to a secret", lambda path: path.symlink_to(outside / "secret")
    yield "link to nothing", lambda path: path.symlink_to(outside / "absent")
    yield "link to itself", lambda path: path.symlink_to(path)
    yield "link to zeros without end", lambda path: path.symlink_to("/dev/zero")
    yield "link beside it", lambda path: (path.with_name("x").write_bytes(b"{}"), path.symlink_to("x"))
    yield "pipe", os.mkfifo
    yield "folder", lambda path: path.mkdir()
    yield "socket", _socket
    yield "nothing", None


def _socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def link_cases(outside):
    for what, make in links(outside):
        for kind, names in FILES.items():
            for name in names:
                if (name, what) != ("tokenizer_config.json", "nothing"):
                    yield Case(kind, f"{what} as {name}", {name: make})
        if make:
            yield Case("model", f"{what} as an index", {INDEX: make})
            index = json.dumps({"weight_map": {"a": "shard.safetensors"}}).encode()
            yield Case("model", f"{what} as a shard", {INDEX: index, "shard.safetensors": make})
            yield Case("adapter", f"{what} as an encoder", {"adapter_encoder.safetensors": make})


SHARDS = [
    "../outside/model.safetensors",
    "/outside/model.safetensors",
    "a/../model.safetensors",
    "./model.safetensors",
    "sub/model.safetensors",
    "..",
    ".",
    "",
    ".model.safetensors",
    "..safetensors",
    "model.safetensors\0.txt",
    "model.safetensors\n",
    "model.safetensors/",
    "..\\model.safetensors",
    "C:\\model.safetensors",
    "~/m.safetensors",
    "$HOME/m.safetensors",
    "file:///m.safetensors",
    "%2e%2e/m.safetensors",
    "mo\u0501el.safetensors",
    "m\u2024safetensors",
    "\u202em.safetensors",
    "\ud800.safetensors",
    "m" * 300 + ".safetensors",
    "model.bin",
    "config.json",
    "model.safetensors ",
    " model.safetensors",
    "-",
    5,
    None,
    True,
    ["model.safetensors"],
    {"model.safetensors": 1},
    "absent.safetensors",
]


def index_cases(valid):
    header, data = parts(valid["model"]["model.safetensors"])
    names = list(header)
    for shard in SHARDS:
        index = {"weight_map": dict.fromkeys(names, shard)}
        yield Case("model", f"shard {shard!r:.40}", {INDEX: json.dumps(index).encode()})
    for what, index in {
        "no weight_map": {"metadata": {}},
        "weight_map is a list": {"weight_map": names},
        "weight_map is a text": {"weight_map": "model.safetensors"},
        "weight_map is empty": {"weight_map": {}},
        "one tensor less": {"weight_map": dict.fromkeys(names[1:], "model.safetensors")},
        "one tensor more": {"weight_map": dict.fromkeys([*names, "x"], "model.safetensors")},
        "65,536 shards": {"weight_map": {n: f"{i:030}.safetensors" for i, n in enumerate(names * 99)}},
    }.items():
        yield Case("model", what, {INDEX: json.dumps(index).encode()})
    twice = {"weight_map": {names[0]: "a.safetensors", names[1]: "b.safetensors"}}
    whole = {"a.safetensors": valid["model"]["model.safetensors"], "b.safetensors": built(header, data)}
    yield Case("model", "a tensor in two shards", {INDEX: json.dumps(twice).encode(), **whole})
    swapped = {"weight_map": {**dict.fromkeys(names, "a.safetensors"), names[0]: "b.safetensors"}}
    empty = {"a.safetensors": whole["a.safetensors"], "b.safetensors": built({}, b"")}
    yield Case("model", "a tensor in another shard", {INDEX: json.dumps(swapped).encode(), **empty})


def corpus(valid: dict[str, dict[str, bytes]], outside: Path):
    """All cases; `valid`: kind -> file -> bytes."""
    yield from foreign_cases()
    yield from link_cases(outside)
    yield from index_cases(valid)
    for kind, name, most in (
        ("model", "model.safetensors", 2**24),
        ("adapter", "adapter_model.safetensors", 2**20),
    ):
        for what, data in weight_files(valid[kind][name], most):
            yield Case(kind, f"{name}: {what}", {name: data})
    for kind, name in [*((k, names[0]) for k, names in FILES.items()), ("model", INDEX)]:
        for what, data in broken_json():
            yield Case(kind, f"{name}: {what}", {name: data})
    for kind, values in (
        ("model", config_values),
        ("adapter", adapter_values),
        ("tokenizer", tokenizer_values),
    ):
        for name, what, data in values(valid[kind]):
            yield Case(kind, f"{name}: {what}", {name: data})
    for kind, files in (("gguf", hostile_gguf.model_files), ("gguf_tokenizer", hostile_gguf.tokenizer_files)):
        for what, data in files():
            yield Case(kind, what, {"m.gguf": data}, "m.gguf")
