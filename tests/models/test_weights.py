"""Loading and saving: strict, streamed, and nothing half-written."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_llama
from safetensors.torch import load_file, save_file

import minift
from minift.models.gguf_file import read_gguf
from minift.models.gguf_llama import GGUF_NAMES, gguf_rows


@pytest.fixture
def folder(tmp_path, model):
    minift.save_model(model, tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_are_bitwise(tmp_path, tied, dtype):
    model = tiny_llama(getattr(torch, dtype), tie_word_embeddings=tied)
    minift.save_model(model, tmp_path)
    loaded = minift.load_model(tmp_path, dtype=dtype)
    assert same(model, loaded) and loaded.config == model.config
    assert (loaded.head.weight is loaded.embed.weight) == tied


def test_loading_rounds_once_to_the_asked_dtype(folder, model):
    loaded = minift.load_model(folder, dtype="bfloat16")
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16())


def test_shards_and_chunks_of_rows(folder, model, monkeypatch):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    index = {"weight_map": {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}}
    for shard in set(index["weight_map"].values()):
        save_file({n: state[n] for n in names if index["weight_map"][n] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr("minift.models.weights.CHUNK_BYTES", 4 * 3 * 32)  # three rows of width 32
    assert same(model, minift.load_model(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        minift.load_model(folder)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no plain file name"):
        minift.load_model(folder)


def swap(state, name, value):
    state[name] = value


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(NORM), f"missing {NORM}"),
        (lambda s: swap(s, "extra.weight", torch.zeros(2)), "unexpected extra.weight"),
        (lambda s: swap(s, NORM, torch.ones(31)), rf"{NORM} has shape \(31,\)"),
        (lambda s: swap(s, NORM, torch.ones(32, dtype=torch.int64)), "stored as torch.int64"),
        (lambda s: swap(s, NORM, torch.tensor([1.0] * 31 + [float("nan")])), r"not finite at \[31\]"),
        (
            lambda s: swap(s, NORM, torch.full((32,), 1e39, dtype=torch.float64)),
            r"not finite at \[0\] in float32",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        minift.load_model(folder)


def test_known_unused_keys_are_ignored_by_name(folder, model):
    rewrite(folder, lambda s: swap(s, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)))
    assert same(model, minift.load_model(folder))


def test_a_stored_copy_of_a_tied_head_must_be_the_embedding(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    minift.save_model(model, tmp_path)
    rewrite(tmp_path, lambda s: swap(s, "lm_head.weight", s["model.embed_tokens.weight"].clone()))
    assert same(model, minift.load_model(tmp_path))
    rewrite(tmp_path, lambda s: swap(s, "lm_head.weight", s["lm_head.weight"] + 1))
    with pytest.raises(ValueError, match="stores different weights"):
        minift.load_model(tmp_path)


def test_missing_truncated_and_unsupported_files(folder, tmp_path):
    data = (folder / "model.safetensors").read_bytes()
    for cut in (5, 100, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="damaged or truncated"):
            minift.load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="model.safetensors is missing; pytorch_model.bin is a pickle"):
        minift.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPTJForCausalLM"]}))
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"'GPTJForCausalLM' is not supported; supported: LlamaForCausalLM"):
        minift.load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        minift.load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        minift.load_model(folder)
    with pytest.raises(ValueError, match="no model at .*nowhere"):
        minift.load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        minift.load_model(folder, dtype="int8")


def test_a_model_with_adapters_is_not_saved_as_a_model(model, tmp_path):
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="minift.merge"):
        minift.save_model(model, tmp_path)


def write_gguf(path, model, kind):
    """The model as another program would write it: GGUF names, q and k interleaved."""
    gguf = pytest.importorskip("gguf")
    c, back = model.config, {ours: theirs for theirs, ours in GGUF_NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_token_list(["a", "b c", ""])
    for name, p in model.named_parameters():
        parts = name.removesuffix(".weight").split(".")
        theirs = back[".".join(parts[3:])] if "layers" in parts else back[".".join(parts)]
        weight = p.detach()
        order = gguf_rows(name, c) if "layers" in parts else None
        if order is not None:
            weight = torch.empty_like(weight).index_copy_(0, order, weight)
        data = weight.numpy()
        quantized = data.ndim == 2 and kind != "F32"
        kind_ = getattr(gguf.GGMLQuantizationType, kind if quantized else "F32")
        packed = gguf.quants.quantize(data, kind_) if quantized else data
        prefix = f"blk.{parts[2]}." if "layers" in parts else ""
        writer.add_tensor(f"{prefix}{theirs}.weight", packed, raw_dtype=kind_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_a_gguf_file_gives_the_same_model(tmp_path, kind, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr("minift.models.weights.CHUNK_BYTES", 4 * 5 * 32)
    model = tiny_llama(intermediate_size=64, tie_word_embeddings=kind == "F16")
    write_gguf(tmp_path / "m.gguf", model, kind)
    loaded = minift.load_model(tmp_path / "m.gguf")
    assert loaded.config == model.config
    for name, p in model.named_parameters():
        data, kind_ = p.detach().numpy(), getattr(gguf.GGMLQuantizationType, kind)
        quantized = data.ndim == 2 and kind != "F32"
        want = gguf.quants.dequantize(gguf.quants.quantize(data, kind_), kind_) if quantized else data
        assert np.array_equal(loaded.get_parameter(name).detach().numpy(), want), name


def test_a_gguf_file_reads_as_the_gguf_package_reads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_llama(), "F16")
    metadata, tensors = read_gguf(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    for t in reader.tensors:
        assert tensors[t.name].shape == tuple(reversed(t.shape.tolist()))
        assert tensors[t.name].data.tobytes() == t.data.tobytes()


def test_every_truncation_of_a_gguf_file_is_noticed(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny_llama(num_hidden_layers=1), "F32")
    data = path.read_bytes()
    tensors = read_gguf(path)[1]
    end = max(int(t.data.ctypes.data + t.data.nbytes) for t in tensors.values()) - min(
        int(t.data.ctypes.data) for t in tensors.values()
    )
    for cut in [*range(0, 1500, 7), len(data) // 2, len(data) - end // 2]:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="truncated|not a GGUF|damaged"):
            read_gguf(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + data[8:])
    with pytest.raises(ValueError, match="version 9"):
        read_gguf(path)


def test_an_interrupted_write_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("minift.models.weights.write_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        minift.save_model(tiny_llama(seed=1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_tiny_config_is_what_its_fields_say():
    assert tiny_config().num_attention_heads * tiny_config().head_dim == tiny_config().hidden_size


def test_saving_over_a_sharded_model_takes_the_place_of_its_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    other = tiny_llama(seed=1)
    minift.save_model(other, folder)
    assert same(other, minift.load_model(folder))


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        minift.load_model(folder, device=device)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"tie_word_embeddings": "no"},
        {"hidden_size": 32.5},
        {"rope_parameters": [1]},
        {"architectures": 5},
        {"vocab_size": True},
    ],
)
def test_settings_of_another_type_are_refused(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="config.json|not supported"):
        minift.load_model(folder)
