"""Configurations: TOML or JSON and command-line flags, into dataclasses, strictly.

A default is written once, in its dataclass. Flags are the config's own paths: `--train.epochs 2`; `--method
lora` names the method and `--method.r 16` sets its fields. A run's config.json reads back as a config.
"""

import difflib
import json
import tomllib
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType

from minift.methods import METHODS
from minift.methods.base import Method
from minift.methods.lora import LoRA
from minift.quant import Quantization
from minift.training.settings import TrainConfig

NAMED_TABLES = {"method": "name", "quantize": "format"}  # a text in place of the table means this key


@dataclass(frozen=True)
class RunConfig:
    """A run of `minift train`."""

    data: str
    """JSONL file of training rows: with prompt and completion, or with text and label."""
    model: str = "smollm2"
    """Alias, Hugging Face folder or .gguf file."""
    dtype: str = "bfloat16"
    """Storage and compute of the base: float32, bfloat16 or float16. Trainable parameters are float32."""
    head: str = ""
    """Of models.heads.HEADS, or regression; empty means the one that the checkpoint has."""
    labels: tuple[str, ...] = ()
    """A new classifier's labels in the order of their numbers; empty means those of the training rows."""
    num_labels: int = 0
    """How many they are, where they have no names; 0 means as many as labels, or as the rows have."""
    device: str = "cpu"
    valid: str = ""
    """JSONL file of validation rows; empty means none."""
    quantize: Quantization | None = None
    """Quantize the base while it is loaded; without it the base stays dense, or is as method qlora says."""
    method: Method = field(default_factory=LoRA)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def base_quantization(self) -> Quantization | None:
        """What to load the base with."""
        return self.quantize or getattr(self.method, "quantization", None)


def read_config(path: str | Path) -> dict:
    """The tables of a .toml or .json file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a table of settings")
    return tree


def read_flags(words: list[str]) -> dict[str, str]:
    """`--a.b value` and `--a.b=value` -> {"a.b": "value"}; a dash in a name is an underscore."""
    flags, words = {}, list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(
                f"unexpected argument {word!r}; settings are given as --path value, as --train.epochs 2"
            )
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} needs a value")
            value = words.pop(0)
        path = name.replace("-", "_")
        if flags.get(path, value) != value:
            raise ValueError(f"--{name} is given twice, as {flags[path]!r} and {value!r}; leave one out")
        flags[path] = value
    return flags


def place_bare(tree: dict, flags: dict[str, str]) -> dict[str, str]:
    """`--r 8` -> `method.r`, for the fields of the method that tree and flags name."""
    name = flags.get("method", flags.get("method.name"))
    if name is None:
        table = override(tree, {}).get("method", {})
        name = table.get("name", LoRA.name)
    known, settings = _names(_method_class(name, "method.")), _names(RunConfig)
    placed, spelled = {}, {}
    for flag, value in flags.items():
        first, path = flag.partition(".")[0], f"{flag}.{NAMED_TABLES[flag]}" if flag in NAMED_TABLES else flag
        if first not in settings:
            if first not in known:
                close = difflib.get_close_matches(first, known + settings, n=1, cutoff=0.5)
                hint = f"did you mean --{close[0]}?" if close else f"known: {', '.join(known + settings)}"
                raise ValueError(f"unknown setting --{flag}, neither of a run nor of method {name}; {hint}")
            path = f"method.{flag}"
        if placed.get(path, value) != value:
            raise ValueError(
                f"--{spelled[path]} {placed[path]} and --{flag} {value} set the same and contradict each "
                "other; leave one out"
            )
        placed[path], spelled[path] = value, flag
    return placed


def override(tree: dict, flags: dict[str, str]) -> dict:
    """A copy of the tree with flags written over it.

    `--method lora` is `--method.name lora`, and `--quantize nf4` is `--quantize.format nf4`.
    """
    tree = json.loads(json.dumps(tree, default=str))
    for table, key in NAMED_TABLES.items():
        if isinstance(tree.get(table), str):
            tree[table] = {key: tree[table]}
        if not isinstance(tree.get(table, {}), dict):
            raise ValueError(f"{table} is {tree[table]!r}, expected a table with {key}")
    for table, key in NAMED_TABLES.items():
        short, long = flags.get(table), flags.get(f"{table}.{key}")
        if short is not None and long is not None and short != long:
            raise ValueError(
                f"--{table} {short} and --{table}.{key} {long} set the same and contradict each other; leave "
                "one out"
            )
    named = flags.get("method", flags.get("method.name"))
    if named is not None and tree.get("method", {}).get("name", "lora") != named:
        tree["method"] = {}  # another method has other fields
    for path, value in flags.items():
        *tables, name = (path, NAMED_TABLES[path]) if path in NAMED_TABLES else path.split(".")
        at = tree
        for table in tables:
            at = at.setdefault(table, {})
            if not isinstance(at, dict):
                raise ValueError(f"--{path}: {table} is a value, not a table")
        at[name] = value
    return tree


def run_config(tree: dict) -> RunConfig:
    return build(RunConfig, override(tree, {}), "")


def build(cls, values: dict, path: str):
    """A dataclass from a table of values or texts; unknown keys and wrong types are errors with the path."""
    if not isinstance(values, dict):
        raise ValueError(f"{path.rstrip('.')} is {values!r}, expected a table with {', '.join(_names(cls))}")
    if cls is Method:
        return _method(values, path)
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in _names(cls):
            close = difflib.get_close_matches(key, _names(cls), n=1, cutoff=0.5)
            hint = f"did you mean {path}{close[0]}?" if close else f"known: {', '.join(_names(cls))}"
            raise ValueError(f"unknown setting {path}{key}; {hint}")
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(
                f"setting {path}{f.name} is missing; give it in the config or as --{path}{f.name}"
            )
    return cls(**{key: _value(hints[key], value, path + key) for key, value in values.items()})


def _method(values: dict, path: str) -> Method:
    values = dict(values)
    return build(_method_class(values.pop("name", LoRA.name), path), values, path)


def _method_class(name, path: str) -> type[Method]:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"{path}name is {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]


def _names(cls) -> list[str]:
    return ["name"] if cls is Method else [f.name for f in fields(cls)]


def _value(hint, value, path: str):
    """One value in its field's type; texts from flags are read as that type."""
    if isinstance(hint, UnionType):  # of a table and None, which leaving it out means
        hint = typing.get_args(hint)[0]
    if is_dataclass(hint):
        return build(hint, value, path + ".")
    if typing.get_origin(hint) is tuple:
        items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
        if not isinstance(items, list | tuple) or any(type(i) not in (str, int) for i in items):
            raise ValueError(f"{path} is {value!r}, expected a list")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path} is {value!r}, expected a table")
        kind = typing.get_args(hint)[1]
        return {rule: _value(kind, item, f"{path}.{rule}") for rule, item in _leaves(value).items()}
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{path} is {value!r}, expected {hint.__name__}")
    return value


def _leaves(table: dict, before: str = "") -> dict:
    """{"self_attn": {"q_proj": 4}} -> {"self_attn.q_proj": 4}: rules hold dots, as paths of tables do."""
    found = {}
    for key, value in table.items():
        found |= _leaves(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found
