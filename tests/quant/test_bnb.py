"""bitsandbytes 4-bit checkpoints: there and back bit for bit, and damage of every kind refused by name."""

import json

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

import minift
from minift.load import DTYPES
from minift.models.interface import is_quantized
from minift.models.wrappers import base_layers
from minift.quant import bnb, quantize_weight

IDS = torch.arange(18).view(2, 9)
PATH = "model.layers.1.mlp.up_proj"
NAME = PATH + ".weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"
SHAPES = [(1, 1), (3, 5), (1, 63), (64, 64), (7, 65), (31, 33), (130, 257)]


def same_weight(a, b):
    assert (a.layout, a.dtype) == (b.layout, b.dtype)
    assert a.tensors.keys() == b.tensors.keys()
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def quantized(model):
    return {path: layer.quantized() for path, layer in base_layers(model).items() if is_quantized(layer)}


def stored(nested=True):
    """A layer's tensors in a checkpoint."""
    torch.manual_seed(1)
    return bnb.to_state(quantize_weight(torch.randn(130, 129), "nf4", 64, nested), PATH)


def as_tensor(text):
    return torch.tensor(list(text.encode() if isinstance(text, str) else text), dtype=torch.uint8)


def with_facts(state, **changes):
    """`state` with fields of its JSON changed; one that is to go is `...`."""
    facts = {**json.loads(bytes(state[STATE].tolist())), **changes}
    facts = {field: value for field, value in facts.items() if value is not ...}
    return {**state, STATE: as_tensor(json.dumps(facts))}


def refused(state, *words):
    with pytest.raises(ValueError) as caught:
        bnb.from_state(state, PATH)
    message = str(caught.value)
    assert NAME in message and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_comes_back_bit_for_bit(kind, nested, block, shape):
    for dtype in DTYPES.values():
        weight = quantize_weight(torch.randn(shape).to(dtype), kind, block, nested)
        state = bnb.to_state(weight, PATH)
        assert state[NAME].shape == (-(-weight.layout.n // 2), 1)
        assert len(state) == (6 if nested else 4)
        assert same_weight(bnb.from_state(state, PATH), weight)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind, nested", [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_model_loads_as_it_was(tmp_path, dtype, kind, nested, tied):
    model = tiny_llama(DTYPES[dtype], tie_word_embeddings=tied)
    minift.quantize_model(model, kind, 32, nested)
    minift.save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["load_in_4bit"]) == ("bitsandbytes", True)
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == (kind, nested)
    assert config["bnb_4bit_compute_dtype"] == dtype and config["llm_int8_skip_modules"] == ["lm_head"]
    loaded = minift.load_model(tmp_path, dtype)
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) and p.dtype == theirs[name].dtype for name, p in ours.items())
    before, after = quantized(model), quantized(loaded)
    assert len(before) == 14 and before.keys() == after.keys()
    assert all(same_weight(weight, after[path]) for path, weight in before.items())
    assert torch.equal(model(IDS), loaded(IDS))


def test_a_quantized_head_is_saved_too(tmp_path):
    model = tiny_llama()
    minift.quantize_model(model, "nf4", only=["all-linear", "lm_head"])
    minift.save_model(model, tmp_path)
    loaded = minift.load_model(tmp_path)
    assert is_quantized(loaded.head) and torch.equal(model(IDS), loaded(IDS))


def test_another_dtype_changes_what_is_computed_and_not_what_is_stored(tmp_path):
    model = tiny_llama(torch.bfloat16)
    minift.quantize_model(model, "nf4")
    minift.save_model(model, tmp_path)
    loaded = minift.load_model(tmp_path, "float32")
    for path, weight in quantized(model).items():
        layer = loaded.get_submodule(path)
        assert layer.compute_dtype == torch.float32
        assert all(torch.equal(getattr(layer, name), tensor) for name, tensor in weight.tensors.items())


@pytest.mark.parametrize("nested", [False, True])
def test_missing_and_unexpected_tensors_are_named(nested):
    state = stored(nested)
    for key in state.keys() - {STATE}:
        refused({k: v for k, v in state.items() if k != key}, f"'{key}'")
    refused({k: v for k, v in state.items() if k != STATE}, "quant_state")
    refused({**state, NAME + ".SCB": torch.ones(3)}, f"'{NAME}.SCB'")
    refused({**state, STATE.replace("nf4", "fp4"): state[STATE]}, "bitsandbytes__nf4", "bitsandbytes__fp4")
    other = {k.replace("__nf4", "__int4"): v for k, v in state.items()}
    refused(other, "bitsandbytes__int4", "nf4, fp4")


def test_parts_of_the_second_quantization_without_the_rest_are_refused():
    flat, nested = stored(False), stored(True)
    refused({**flat, **{k: v for k, v in nested.items() if "nested" in k}}, f"{NAME}.nested_absmax")
    refused({**nested, STATE: flat[STATE]}, f"{NAME}.nested_absmax")
    refused({**flat, STATE: nested[STATE]}, f"{NAME}.nested_absmax")
    refused({**nested, f"{NAME}.absmax": flat[f"{NAME}.absmax"]}, "absmax")


@pytest.mark.parametrize("nested", [False, True])
def test_wrong_counts_are_refused(nested):
    state = stored(nested)
    for part, called in [("", "packed"), (".absmax", "absmax"), (".nested_absmax", "nested_absmax")]:
        if NAME + part in state:
            whole = state[NAME + part]
            refused({**state, NAME + part: whole[:-1]}, called)
            refused({**state, NAME + part: torch.cat((whole, whole[:1]))}, called)
    refused({**state, NAME: state[NAME].view(torch.int8)}, "torch.int8")
    refused(with_facts(state, shape=[130, 128]), "(130, 128)")
    refused(with_facts(state, blocksize=128), "blocks of 128")


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map"])
def test_another_codebook_is_refused(part):
    state, key = stored(), f"{NAME}.{part}"
    moved = state[key].clone()
    moved[3] = moved[3].nextafter(moved[4])
    for other in (moved, state[key].flip(0), state[key][:-1], state[key].double(), state[key].view(-1, 1)):
        refused({**state, key: other}, part)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_no_numbers_are_refused(nested, value):
    state, key = stored(nested), f"{NAME}.nested_absmax" if nested else f"{NAME}.absmax"
    broken = state[key].clone()
    broken[-1] = value
    refused({**state, key: broken}, key, "finite")
    refused({**state, key: state[key].bfloat16()}, key, "torch.bfloat16")


@pytest.mark.parametrize(
    "stored_facts",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'"nf4"',
        b"null",
        b"[" * 100000,
        torch.zeros(4),
        torch.zeros(2, 2).byte(),
    ],
)
def test_a_quant_state_that_is_no_table_is_refused(stored_facts):
    broken = as_tensor(stored_facts) if isinstance(stored_facts, bytes) else stored_facts
    refused({**stored(), STATE: broken}, "quant_state", "JSON")


@pytest.mark.parametrize(
    "changes, word",
    [
        *(({field: ...}, "quant_state has") for field in ("quant_type", "blocksize", "dtype", "shape")),
        *(
            ({field: ...}, "quant_state has")
            for field in ("nested_blocksize", "nested_dtype", "nested_offset")
        ),
        ({"extra": 1}, "extra"),
        ({"quant_type": "fp4"}, "quant_type 'fp4'"),
        ({"quant_type": None}, "quant_type None"),
        *(({"shape": shape}, "shape") for shape in ([16770], [130, 129, 1], [0, 129], [-130, -129])),
        *(({"shape": shape}, "shape") for shape in (None, "130", [130.0, 129], [True, 16770], ["130", 129])),
        *(({"dtype": dtype}, "dtype") for dtype in ("float64", "int8", None, ["float32"], "load")),
        *(({"blocksize": block}, "block_size") for block in (0, 48, 8192, "64", None, True, [64], 64.0)),
        ({"nested_blocksize": 128}, "nested_blocksize 128"),
        ({"nested_dtype": "float16"}, "'float16'"),
        *(({"nested_offset": offset}, "nested_offset") for offset in (1e39, "0.5", None, True)),
        *(({"nested_offset": offset}, "JSON") for offset in (float("nan"), float("inf"), 10**400)),
    ],
    ids=str,
)
def test_fields_of_the_quant_state_that_are_wrong_are_refused(changes, word):
    refused(with_facts(stored(), **changes), word)


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    minift.quantize_model(model, "nf4", 32)
    minift.save_model(model, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "found",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_4bit": True},
        "gptq",
        {},
    ],
    ids=str,
)
def test_other_quantization_configs_are_refused(folder, found):
    edit_config(folder, quantization_config=found)
    with pytest.raises(ValueError, match="quantization_config") as caught:
        minift.load_model(folder)
    assert "bitsandbytes 4-bit with uint8 storage" in str(caught.value)


def test_four_bits_announced_and_not_there_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    minift.save_model(tiny_llama(), folder)
    edit_config(folder, quantization_config=config["quantization_config"])
    with pytest.raises(ValueError, match="no tensor has a quant_state"):
        minift.load_model(folder)


def test_a_matrix_that_is_not_the_config_s_is_refused(folder):
    edit_config(folder, intermediate_size=47)
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight is a 4-bit matrix .*; the config asks for"):
        minift.load_model(folder)
    edit_config(folder, intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"layers\.1\.\S+\.weight is 4-bit, and the model has no linear layer"
    ):
        minift.load_model(folder)


@pytest.mark.parametrize("part", ["", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4"])
def test_a_tensor_without_dimensions_is_refused(folder, part):
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME + part] = tensors[NAME + part].view(-1)[0].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=NAME):
        minift.load_model(folder)


def test_a_tied_head_of_four_bits_is_refused(tmp_path):
    model = tiny_llama()
    minift.quantize_model(model, "nf4", only=["lm_head"])
    minift.save_model(model, tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is 4-bit, but config\.json ties it"):
        minift.load_model(tmp_path)


@pytest.mark.parametrize(
    "second, words",
    [
        ({"format": "fp4"}, "mixes fp4 with double quantization and nf4 with double quantization"),
        ({"double_quant": False}, "mixes nf4 without double quantization and nf4 with double quantization"),
        ({"format": "int8"}, "v_proj is quantized to int8, which bitsandbytes checkpoints cannot hold"),
        ({"format": "int8_dynamic"}, "v_proj is quantized to int8_dynamic, which bitsandbytes"),
    ],
)
def test_a_model_that_no_such_checkpoint_can_hold_is_not_saved(tmp_path, second, words):
    model = tiny_llama()
    minift.quantize_model(model, "nf4", only=["q_proj"])
    minift.quantize_model(model, **second, only=["v_proj"])
    with pytest.raises(ValueError, match=words):
        minift.save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantizing_what_is_four_bit_already_is_refused(folder):
    for recipe in ("nf4", "int8", minift.Quantization("fp4", only=("q_proj",))):
        with pytest.raises(ValueError, match=r"self_attn\.q_proj is quantized already \(nf4\)"):
            minift.load_model(folder, quantize=recipe)
