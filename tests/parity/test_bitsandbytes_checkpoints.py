"""4-bit checkpoints beside bitsandbytes and transformers: the same bytes, and each side loads the other's."""

import json

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

import minift
from minift.models.interface import is_quantized
from minift.models.wrappers import base_layers
from minift.quant import bnb, quantize_weight

bitsandbytes = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.parity

IDS = torch.arange(18).view(2, 9)
BOUND = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
}  # |a - b| / |b|, as of dense models
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
# Rows are whole blocks of 64: bitsandbytes 0.50.2 dequantizes others wrongly on AVX-512.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


pytestmark = pytest.mark.usefixtures("eager")


def same(a, b):
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same_tensors(a, b):
    """Names, dtypes, shapes and bytes."""
    assert a.keys() == b.keys()
    return all(a[name].shape == b[name].shape and same(a[name], b[name]) for name in a)


def same_files(a, b):
    return same_tensors(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


def same_weight(ours, theirs):
    """A QuantizedWeight beside a Params4bit."""
    state = theirs.quant_state
    assert (ours.shape, ours.layout.block_size) == (tuple(state.shape), state.blocksize)
    assert (ours.layout.format.name, ours.dtype) == (state.quant_type, state.dtype)
    assert ours.layout.double_quant == state.nested
    pairs = [(ours.packed, theirs.data), (ours.absmax, state.absmax)]
    pairs.append((ours.layout.format.values("cpu"), state.code))
    if state.nested:
        assert state.state2.blocksize == 256
        pairs += [(ours.nested_absmax, state.state2.absmax), (ours.offset, state.offset)]
    return all(same(a, b) for a, b in pairs)


def assert_same_layers(model, peer):
    layers = {path: layer for path, layer in base_layers(model).items() if is_quantized(layer)}
    theirs = {p: m for p, m in peer.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers and layers.keys() == theirs.keys()
    for path, layer in layers.items():
        assert same_weight(layer.quantized(), theirs[path].weight), path


def assert_same_logits(model, peer, dtype):
    """In training mode: on AVX512-BF16 their inference computes in bf16, whatever the dtype."""
    with torch.no_grad():
        a, b = model(IDS), peer.train()(IDS).logits
    assert a.dtype == b.dtype == dtype
    assert (a - b).float().norm() <= BOUND[dtype] * b.float().norm()


def read_by_transformers(folder, dtype, **options):
    options = {"dtype": dtype, "attn_implementation": "eager", "device_map": "cpu", **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def four_bit(kind, nested, dtype, **options):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 65), (64, 96), (130, 257)], ids=str)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind, nested", KINDS)
def test_a_layer_is_stored_as_bitsandbytes_stores_it_byte_for_byte(kind, nested, dtype, shape):
    w = torch.randn(shape).to(dtype)
    layer = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compress_statistics=nested, quant_type=kind
    )
    layer.weight.data = w.clone()
    theirs = layer.to("cpu").state_dict(prefix="a.b.")
    weight = quantize_weight(w, kind, 64, nested)
    ours = bnb.to_state(weight, "a.b")
    assert same_tensors(ours, theirs)
    back = bnb.from_state(dict(theirs), "a.b")
    assert (back.layout, back.dtype) == (weight.layout, weight.dtype)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in weight.tensors.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, nested", KINDS)
def test_a_folder_holds_the_bytes_that_transformers_writes(tmp_path, kind, nested, dtype, tied):
    model = tiny_llama(dtype, **SIZES, tie_word_embeddings=tied)
    minift.save_model(model, tmp_path / "dense")
    config = four_bit(kind, nested, dtype)
    peer = read_by_transformers(tmp_path / "dense", dtype, quantization_config=config)
    peer.save_pretrained(tmp_path / "theirs")
    minift.quantize_model(model, kind, 64, nested)
    minift.save_model(model, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, nested", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_save(tmp_path, tied, kind, nested, dtype, block):
    model = tiny_llama(dtype, **SIZES, tie_word_embeddings=tied)
    minift.quantize_model(model, kind, block, nested)
    minift.save_model(model, tmp_path / "ours")
    peer = read_by_transformers(tmp_path / "ours", "auto")
    assert peer.is_loaded_in_4bit and peer.dtype == dtype
    assert_same_layers(model, peer)
    theirs = peer.state_dict()
    if tied:
        del theirs["lm_head.weight"]
    assert same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), theirs)
    assert_same_logits(model, peer, dtype)


def test_transformers_leaves_dense_what_we_left_dense_and_loads_a_four_bit_head(tmp_path):
    for name, rules in {
        "part": {"only": ["q_proj", "model.layers.1.mlp.*"]},
        "head": {"only": ["all-linear", "lm_head"]},
    }.items():
        model = tiny_llama(**SIZES)
        minift.quantize_model(model, "nf4", **rules)
        minift.save_model(model, tmp_path / name)
        peer = read_by_transformers(tmp_path / name, torch.float32)
        assert_same_layers(model, peer)
        assert_same_logits(model, peer, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, nested", KINDS)
def test_we_load_what_transformers_saves(tmp_path, kind, nested, dtype, tied):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path / "dense")
    quantization = four_bit(kind, nested, dtype)
    peer = read_by_transformers(tmp_path / "dense", dtype, quantization_config=quantization)
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    written = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    for folder in ("one", "sharded"):
        model = minift.load_model(tmp_path / folder, str(dtype).removeprefix("torch."))
        assert (model.head.weight is model.embed.weight) == tied
        assert_same_layers(model, peer)
        dense = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        theirs = dict(peer.named_parameters())
        assert all(same(p, theirs[name]) for name, p in dense.items())
        minift.save_model(model, tmp_path / "again")
        assert same_files(tmp_path / "one", tmp_path / "again")
    ours = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert all(written[field] == value for field, value in ours.items() if field != "llm_int8_skip_modules")
    assert_same_logits(model, peer, dtype)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"load_in_8bit": True}, "load_in_4bit False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}, "storage 'bfloat16'"),
    ],
)
def test_other_checkpoints_of_bitsandbytes_are_refused_by_name(tmp_path, options, word):
    minift.save_model(tiny_llama(**SIZES), tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(**options)
    peer = read_by_transformers(tmp_path / "dense", torch.float32, quantization_config=config)
    peer.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=word):
        minift.load_model(tmp_path / "theirs")
