"""`minift params` and `minift plan`: what a method trains and what that takes, from shapes alone.

Three ways to the same number meet here: the method's law, the formulas of the plan's sites, and the tensors
that it puts around a model on the meta device. Stored bytes are those in memory: of the base in its dtype or
quantized, of the adapter in fp32. File bytes are those of the tensors in the adapter's file (of the model's
own after full fine-tuning), without the file's header.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from minift.fetch import ALIASES
from minift.load import DTYPES, build_model, holds_quantized, load_tokenizer
from minift.methods import apply
from minift.methods.base import Method
from minift.methods.plan import Plan, aligned
from minift.models.interface import LanguageModel, is_quantized
from minift.models.presets import PRESETS, build_preset, nearest_presets
from minift.models.slots import Slot
from minift.models.wrappers import bare_modules, chain, innermost
from minift.quant import Quantization, quantize_model

BY = ("layer", "module")


class Row(NamedTuple):
    name: str
    parameters: int  # what they stand for: a quantized matrix counts as itself, a tied weight once
    trainable: int
    stored_bytes: int
    file_bytes: int


def params(
    source: str,
    method: Method,
    recipe: Quantization | None = None,
    dtype: str = "bfloat16",
    by: str = "",
    as_json: bool = False,
    head: dict | None = None,
) -> str:
    """The report of `minift params`, as text."""
    if by and by not in BY:
        raise ValueError(f"--by {by!r} is not one of {', '.join(BY)}")
    if is_stored_quantized(source):
        raise ValueError(
            f"{source} is a 4-bit checkpoint, and shapes do not say its bytes; give the model that it was "
            "made from, with --quantize"
        )
    model, plan = applied(source, method, recipe, dtype, head)
    rows = grouped(model, by)
    total = Row("all", *map(sum, zip(*(row[1:] for row in rows), strict=True)))
    tensors = (total.parameters, total.trainable)
    assert (plan.total, plan.trainable) == tensors, f"{plan.totals()}, and the tensors are {tensors}"
    if as_json:
        facts = {
            "model": source,
            "dtype": dtype,
            "quantize": recipe and asdict(recipe),
            "method": {"name": method.name, **asdict(method)},
            "law": method.law,
            "formula": formula(plan),
        }
        return json.dumps({**facts, "rows": [row._asdict() for row in (*rows, total)]}, indent=1)
    head = (by, "parameters", "trainable", "stored bytes", "file bytes")
    table = [head, *((row.name, *(f"{n:,}" for n in row[1:])) for row in (*rows, total))]
    said = f"{source}, {method.name}: {method.law}\n{formula(plan)} = {plan.trainable:,}"
    return f"{said}\n\n{aligned(table, right=(1, 2, 3, 4))}\n\n{plan.totals()}"


def plan_table(
    source: str,
    method: Method,
    recipe: Quantization | None = None,
    dtype: str = "bfloat16",
    head: dict | None = None,
) -> str:
    """The report of `minift plan`: a row for each site, in the model's order, the same at every call."""
    stored = is_stored_quantized(source)
    model, plan = applied(source, method, None if stored else recipe, dtype, head)
    return f"{plan.table(bases={} if stored else storage(model))}\n{plan.totals()}"


def applied(
    source: str, method: Method, recipe: Quantization | None, dtype: str, head: dict | None = None
) -> tuple[LanguageModel, Plan]:
    """The model on the meta device with the method around it; `head` is what `load_model` is asked for."""
    model = shapes(source, dtype, recipe, head)
    if getattr(method, "init_text", "") and is_on_disk(source):
        method = method.with_tokenizer(load_tokenizer(source))
    plan = apply(model, method)
    if not plan.trainable:
        raise ValueError(f"{method.name} as configured trains nothing on {source}")
    return model, plan


def storage(model: LanguageModel) -> dict[str, str]:
    """Module or parameter -> what the base keeps there: a dtype or a quantized format."""
    found = {}
    for path, module in bare_modules(model).items():
        layer = innermost(module)
        for name, p in layer.named_parameters(recurse=False):
            found[f"{path}.{name}"] = str(p.dtype).removeprefix("torch.")
        found[path] = layer.layout.format.name if is_quantized(layer) else found.get(f"{path}.weight", "-")
    return found


def is_stored_quantized(source: str) -> bool:
    return is_on_disk(source) and holds_quantized(source)


def is_on_disk(source: str) -> bool:
    return Path(source).expanduser().exists() or source in ALIASES


def shapes(source: str, dtype: str, recipe: Quantization | None, head: dict | None = None) -> LanguageModel:
    """A folder, .gguf file, alias or preset on the meta device, quantized as the recipe says."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not is_on_disk(source) and source not in PRESETS:
        raise ValueError(
            f"no model {source!r}: give a preset (nearest: {', '.join(nearest_presets(source))}), a folder "
            f"with config.json and *.safetensors, a .gguf file, or one of {', '.join(ALIASES)}"
        )
    if head and not is_on_disk(source):
        raise ValueError(f"preset {source!r} has its published head alone; give a folder to ask for another")
    model = build_model(source, **(head or {})) if is_on_disk(source) else build_preset(source)
    model = model.to(DTYPES[dtype])
    if recipe:
        quantize_model(model, **asdict(recipe))
    return model


def formula(plan: Plan) -> str:
    """The sites' formulas with their numbers, equal ones together: 32 x 8 (4096 + 4096) + ..."""
    counts = Counter(
        site.formula or str(site.parameters) for site in (*plan.sites, *plan.head) if site.parameters
    )
    return " + ".join(_times(n, text) for text, n in counts.items())


def _times(n: int, text: str) -> str:
    if n == 1:
        return text
    is_sum = "+" in re.sub(r"\([^()]*\)", "", text)
    return f"{n} x ({text})" if is_sum else f"{n} x {text}"


def grouped(model: LanguageModel, by: str = "") -> list[Row]:
    """Rows for the base and the adapter, for each block, or for each module, in the model's order."""
    sums = {}
    for path, row in pieces(model):
        name = {"layer": layer_of(model, path) or row.name, "module": path or row.name}.get(by, row.name)
        before = sums.get(name, (0, 0, 0, 0))
        sums[name] = tuple(a + b for a, b in zip(before, row[1:], strict=True))
    return [Row(name, *numbers) for name, numbers in sums.items() if any(numbers)]


def layer_of(model: LanguageModel, path: str) -> str:
    """The block that a module lies in, or the module itself outside the blocks."""
    if model.block_index(path) is None:
        return path
    return re.match(r".*?\.\d+(?=\.)", path).group()


def pieces(model: LanguageModel) -> Iterator[tuple[str, Row]]:
    """(path, what stands there): the bare module's own tensors, then those that the adapter put around."""
    [adapter] = model.adapters.values()
    seen, whole = set(), not adapter.method.adapter_file
    for path, module in bare_modules(model).items():
        layer = innermost(module)
        own = _fresh(layer.parameters(recurse=False), seen)
        matrix = layer.in_features * layer.out_features if is_quantized(layer) else 0
        floats = sum(p.numel() for p in own if p.is_floating_point()) + matrix
        yield path, Row("base", floats, _trainable(own), _bytes(own), _bytes(own) if whole else 0)
        for wrapper in reversed(chain(module)):
            yield path, _added(wrapper, adapter.method.name, seen)
    for slot in model.slots:
        yield "", _added(slot, adapter.method.name, seen)


def _added(part, name: str, seen: set) -> Row:
    own = _fresh((p for key, p in part.named_parameters() if not key.startswith("base.")), seen)
    kept = _fresh((b for key, b in part.named_buffers() if not key.startswith("base.")), seen)
    replaced = 0 if isinstance(part, Slot) else part.replaced()
    numbers = sum(p.numel() for p in own) - replaced
    return Row(name, numbers, _trainable(own), _bytes(own) + _bytes(kept), _bytes(part.state().values()))


def _fresh(tensors, seen: set) -> list:
    """Those that were not counted before."""
    found = [t for t in tensors if id(t) not in seen]
    seen |= {id(t) for t in found}
    return found


def _trainable(tensors) -> int:
    return sum(t.numel() for t in tensors if t.requires_grad)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
