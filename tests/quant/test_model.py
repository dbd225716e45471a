"""quantize_model: the layers that rules mean, mixed formats, the table, what cannot be quantized."""

import copy

import pytest
import torch
from conftest import tiny_llama
from torch import nn

import minift
from minift.models.interface import dense_weight, parameter_count, set_weight
from minift.models.wrappers import base_layers
from minift.quant import FORMATS, Quantization
from minift.quant.linear import QuantizedLinear
from minift.quant.model import weight_error

IDS = torch.arange(24).view(2, 12) % 97


def quantized(model):
    return {p: m.layout.format.name for p, m in base_layers(model).items() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_model_is_the_model_with_dequantized_weights(format, double_quant, dtype):
    model = tiny_llama(dtype)
    dense = copy.deepcopy(model)
    minift.quantize_model(model, format, 32, double_quant)
    for path, layer in base_layers(model).items():
        if path != "lm_head":
            set_weight(base_layers(dense)[path], dense_weight(layer))
    torch.testing.assert_close(model(IDS), dense(IDS), rtol=0, atol=2e-5 if dtype == torch.float32 else 0.06)
    assert parameter_count(model) == parameter_count(dense)


def test_rules_choose_layers_and_formats_mix():
    model = tiny_llama()
    attention = minift.quantize_model(model, "nf4", only=["q_proj", "k_proj", "v_proj", "o_proj"])
    feed_forward = minift.quantize_model(model, "int8", only="*.mlp.*", skip=["model.layers.1.mlp.down_proj"])
    found = quantized(model)
    assert len(attention) == 8 and len(feed_forward) == 5 and len(found) == 13
    assert {f for p, f in found.items() if "self_attn" in p} == {"nf4"}
    assert {f for p, f in found.items() if "mlp" in p} == {"int8"}
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)
    assert [r.format for r in model.quantization] == ["nf4", "int8"]
    assert torch.isfinite(model(IDS)).all()


def test_the_table_is_the_bytes_and_the_errors():
    model = tiny_llama()
    before = {p: layer.weight.detach().clone() for p, layer in base_layers(model).items()}
    table = minift.quantize_model(model, "nf4")
    for row in table:
        layer = model.get_submodule(row.path)
        W = before[row.path]
        assert row.bytes_after == sum(p.numel() for p in layer.parameters()) == layer.quantized().nbytes
        assert row.bytes_before == 4 * W.numel() == 4 * row.elements
        error = (W - layer.dequantize()).norm() / W.norm()
        assert row.relative == pytest.approx(error.item(), rel=1e-5) and 0.5 < row.of_bound <= 1
    text = str(table)
    assert text.count("\n") == len(table) + 1 and "model.layers.0.mlp.up_proj" in text
    total, after = sum(r.elements for r in table), sum(r.bytes_after for r in table)
    assert f"quantized params: {total:,} || bytes: {4 * total:,} -> {after:,} ||" in text


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_error_is_above_its_proven_bound(format, scale):
    w = scale * torch.randn(70, 130) ** 3
    for double_quant in (False, True):
        relative, of_bound = weight_error(w, minift.quantize_weight(w, format, 32, double_quant))
        assert 0 < relative < 0.35 and 0 < of_bound <= 1


@pytest.mark.parametrize("format", FORMATS)
def test_an_error_is_the_same_however_the_weight_is_cut(format, monkeypatch):
    w = torch.randn(70, 130)
    quantized = minift.quantize_weight(w, format, 32)
    before = w.clone()
    relative, of_bound = weight_error(w, quantized)
    assert torch.equal(w, before)
    monkeypatch.setattr("minift.quant.model.CHUNK", 1000)  # whole blocks of it
    cut, of_bound_cut = weight_error(w, quantized)
    assert cut == pytest.approx(relative, rel=9100 * 2**-52) and of_bound_cut == of_bound  # sums in fp64


def test_on_the_meta_device_only_shapes_are_replaced():
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_llama().config)
    table = minift.quantize_model(model, "nf4")
    assert all(row.relative is None for row in table) and "-" in str(table)
    assert all(p.is_meta for p in model.parameters())


def test_what_cannot_be_quantized_says_why_and_nothing_is_replaced():
    model = tiny_llama()
    for arguments, sentence in [
        ({"format": "nf5"}, "format 'nf5' is not known; known formats: nf4, fp4, int8, int8_dynamic"),
        ({"block_size": 48}, "block_size is 48; supported: 32, 64"),
        ({"only": ["query"]}, r"only \['query'\] match no linear layer; nearest"),
        ({"only": []}, "only is empty"),
        ({"skip": ["nothing"]}, r"skip \['nothing'\] match no linear layer"),
        ({"only": ["q_proj"], "skip": ["q_proj"]}, r"match only layers that skip \['q_proj'\] leave out"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            minift.quantize_model(model, **arguments)
    tied = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its weight with the embedding"):
        minift.quantize_model(tied, only=["lm_head"])
    with pytest.raises(ValueError, match="block_size is 100"):
        Quantization(block_size=100)
    assert not quantized(model) and not quantized(tied) and not model.quantization
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is not finite at \[3, 5\]"):
        minift.quantize_model(model)
    assert not quantized(model)
    model = tiny_llama()
    for change in (lambda w: w.fill_(3e38), lambda w: w.double()):
        layer = model.model.layers[1].mlp.up_proj
        layer.weight = nn.Parameter(change(layer.weight.data))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight.* (overflows fp32|torch.float64)"):
            minift.quantize_model(model)
        assert not quantized(model) and not model.quantization
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_is_quantized_once_and_before_adapters():
    model = tiny_llama()
    minift.quantize_model(model, only=["q_proj"])
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is quantized already \(nf4\)"):
        minift.quantize_model(model)
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(
        ValueError, match=r"v_proj carries an adapter \(LoRALinear\); quantize the model before"
    ):
        minift.quantize_model(model, only=["v_proj"])


def test_dense_weights_can_be_read_and_written_through_a_quantized_layer():
    model = tiny_llama()
    minift.quantize_model(model, "int8", double_quant=False)
    layer = model.model.layers[0].self_attn.q_proj
    W = dense_weight(layer)
    set_weight(layer, 2 * W)  # a power of two: codes stay, scales double
    assert torch.equal(dense_weight(layer), 2 * W)
    wrapped = tiny_llama()
    minift.apply(wrapped, minift.LoRA(r=2))
    with pytest.raises(TypeError, match="LoRALinear has no dense weight"):
        dense_weight(wrapped.model.layers[0].self_attn.q_proj)
