"""bitsandbytes 4-bit checkpoints, bit for bit, as version 0.50 and transformers lay them out.

    <layer>.weight                 uint8 (ceil(n/2), 1), two codes a byte, the first in the high nibble
    <layer>.weight.absmax          fp32 (blocks,), or uint8 codes of it under double quantization
    <layer>.weight.quant_map       fp32 (16,), the codebook
    <layer>.weight.nested_absmax, .nested_quant_map     fp32 (groups,), (256,), under double quantization
    <layer>.weight.quant_state.bitsandbytes__nf4 (or __fp4)    JSON as uint8: type, block size, dtype, shape

bitsandbytes loads such a state without looking at its counts; here each of them is checked.
"""

import json

import torch

from minift.models.json_file import parse_json
from minift.quant.base import NESTED_BLOCK, Layout
from minift.quant.int8 import INT8_DYNAMIC
from minift.quant.weight import FORMATS, QuantizedWeight, as_bytes

STATE = ".quant_state.bitsandbytes__"
STORABLE = ("nf4", "fp4")
DTYPES = ("float32", "bfloat16", "float16")
JSON_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def to_state(weight: QuantizedWeight, path: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for a layer's quantized weight in a checkpoint; `path` is the layer's."""
    layout, device = weight.layout, weight.packed.device
    if layout.format.name not in STORABLE:
        raise ValueError(
            f"{path} is quantized to {layout.format.name}, which bitsandbytes checkpoints cannot hold; they "
            f"hold {' and '.join(STORABLE)}"
        )
    facts = {
        "quant_type": layout.format.name,
        "blocksize": layout.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(layout.shape),
    }
    name = f"{path}.weight"
    state = {
        name: weight.packed.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": layout.format.values(device).clone(),
    }
    if layout.double_quant:
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        facts["nested_offset"] = weight.offset.item()
        state[f"{name}.nested_absmax"] = weight.nested_absmax
        state[f"{name}.nested_quant_map"] = INT8_DYNAMIC.values(device).clone()
    packed_facts = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8, device="cpu")
    return {**state, f"{name}{STATE}{layout.format.name}": packed_facts}


def quantized_paths(names) -> list[str]:
    """The layers that a checkpoint's tensor names say are 4-bit."""
    return [name.partition(".weight" + STATE)[0] for name in names if ".weight" + STATE in name]


def from_state(state: dict[str, torch.Tensor], path: str) -> QuantizedWeight:
    """The inverse of `to_state`. `state` holds every tensor whose name starts with `<path>.weight`."""
    name = f"{path}.weight"
    keys = [key for key in state if STATE in key]
    kind = keys[0].rpartition("__")[2] if len(keys) == 1 else ""
    if kind not in STORABLE:
        raise ValueError(f"{name}: quant_state is one of {', '.join(STORABLE)}; the checkpoint has {keys}")
    facts = _facts(state[keys[0]], name, kind)
    nested = "nested_blocksize" in facts
    parts = ["", ".absmax", ".quant_map", *([".nested_absmax", ".nested_quant_map"] if nested else [])]
    wanted = {name + part for part in parts} | {keys[0]}
    if state.keys() != wanted:
        raise ValueError(f"{name}: missing or unexpected {sorted(state.keys() ^ wanted)}")
    try:
        layout = Layout(FORMATS[kind], tuple(facts["shape"]), facts["blocksize"], nested)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    _check_map(state[f"{name}.quant_map"], layout.format, name, "quant_map")
    if nested:
        _check_map(state[f"{name}.nested_quant_map"], INT8_DYNAMIC, name, "nested_quant_map")
    scales = f"{name}.nested_absmax" if nested else f"{name}.absmax"
    if state[scales].dtype != torch.float32:
        raise ValueError(f"{scales} is {state[scales].dtype}; expected torch.float32")
    if not torch.isfinite(state[scales]).all() or (state[scales] < 0).any():
        raise ValueError(f"{scales} holds numbers that are negative or not finite; the checkpoint is damaged")
    tensors = {"packed": state[name].reshape(-1)}
    if nested:
        offset = torch.tensor([facts["nested_offset"]], dtype=torch.float32, device=state[name].device)
        tensors |= {
            "absmax": state[f"{name}.absmax"],
            "nested_absmax": as_bytes(state[f"{name}.nested_absmax"]),
            "offset": as_bytes(offset),
        }
    else:
        tensors["absmax"] = as_bytes(state[f"{name}.absmax"])
    try:
        return QuantizedWeight(layout, tensors, getattr(torch, facts["dtype"]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _facts(stored: torch.Tensor, name: str, kind: str) -> dict:
    """The JSON of a quant_state, each field checked."""
    try:
        facts = parse_json(stored.cpu().numpy().tobytes()) if stored.dtype == torch.uint8 else None
    except ValueError as error:
        raise ValueError(f"{name}: quant_state is not the JSON of a table: {error}") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{name}: quant_state is not the JSON of a table")
    nested = facts.keys() & NESTED_FIELDS
    expected = JSON_FIELDS | (NESTED_FIELDS if nested else set())
    if facts.keys() != expected:
        raise ValueError(f"{name}: quant_state has {sorted(facts)}, expected {sorted(expected)}")
    shape, offset = facts["shape"], facts.get("nested_offset", 0.0)
    if facts["quant_type"] != kind:
        raise ValueError(f"{name}: quant_type {facts['quant_type']!r} stands under the key of {kind!r}")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(d) is not int or d < 1 for d in shape):
        raise ValueError(f"{name}: shape {shape!r} in quant_state is not that of a matrix")
    if facts["dtype"] not in DTYPES:
        raise ValueError(f"{name}: dtype {facts['dtype']!r} in quant_state; known: {', '.join(DTYPES)}")
    if nested and (facts["nested_blocksize"], facts["nested_dtype"]) != (NESTED_BLOCK, "float32"):
        raise ValueError(
            f"{name}: nested_blocksize {facts['nested_blocksize']!r} of {facts['nested_dtype']!r}; "
            f"supported: {NESTED_BLOCK} of 'float32'"
        )
    if (
        isinstance(offset, bool)
        or not isinstance(offset, int | float)
        or not abs(offset) <= torch.finfo(torch.float32).max
    ):
        raise ValueError(f"{name}: nested_offset {offset!r} in quant_state is not a finite number")
    return facts


def _check_map(stored: torch.Tensor, format, name: str, which: str) -> None:
    if stored.dtype != torch.float32 or not torch.equal(stored.cpu(), format.values("cpu")):
        raise ValueError(
            f"{name}.{which} is not the table of {format.name}; another codebook is not supported"
        )


def to_config(weights: dict[str, QuantizedWeight], dense: list[str]) -> dict:
    """`quantization_config` of config.json, as transformers reads it; `dense` are the layers left out."""
    layouts = [weight.layout for weight in weights.values()]
    kinds = {(layout.format.name, layout.double_quant) for layout in layouts}
    if len(kinds) > 1:
        raise ValueError(
            "a bitsandbytes checkpoint has one 4-bit format for all layers; this model mixes "
            + " and ".join(f"{f} {'with' if d else 'without'} double quantization" for f, d in sorted(kinds))
        )
    [(kind, double)] = kinds
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def check_config(config: dict) -> None:
    """Refuse a quantization_config that is not of bitsandbytes' 4-bit kind."""
    found = config.get("quantization_config")
    if found is None:
        return
    table = found if isinstance(found, dict) else {"quant_method": found}
    method, four_bit = table.get("quant_method"), table.get("load_in_4bit")
    storage = table.get("bnb_4bit_quant_storage", "uint8")
    if method != "bitsandbytes" or not four_bit or storage != "uint8":
        raise ValueError(
            f"config.json: quantization_config of {method!r} (load_in_4bit {four_bit}, storage {storage!r}) "
            "is not supported; supported: bitsandbytes 4-bit with uint8 storage"
        )
