"""Quantizing while loading is loading, then quantizing: the same bytes, and nothing half-loaded."""

import pytest
import torch
from conftest import tiny_llama
from tokenizers import Tokenizer as Backend
from tokenizers import models

import minift
from minift.models import weights as weights_on_disk
from minift.quant import Quantization

IDS = torch.arange(24).view(2, 12) % 97


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "quantize", ["nf4", "int8", Quantization("fp4", 128, False, only=("*.mlp.*",), skip=("down_proj",))]
)
def test_the_bytes_are_those_of_a_dense_load_quantized_afterwards(tmp_path, dtype, quantize):
    minift.save_model(tiny_llama(), tmp_path)
    loaded = minift.load_model(tmp_path, dtype, quantize=quantize)
    recipe = quantize if isinstance(quantize, Quantization) else Quantization(quantize)
    after = minift.load_model(tmp_path, dtype)
    table = minift.quantize_model(after, **vars(recipe))
    assert {*loaded.quantization_table} == {*table} and loaded.quantization == (recipe,)
    ours, theirs = dict(loaded.named_parameters()), dict(after.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(loaded(IDS), after(IDS)) and not any(m.training for m in loaded.modules())


def test_a_bad_recipe_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    minift.save_model(tiny_llama(), tmp_path)
    monkeypatch.setattr(weights_on_disk, "fill", None)  # cannot be called
    with pytest.raises(ValueError, match="format 'int3' is not known"):
        minift.load_model(tmp_path, quantize="int3")
    with pytest.raises(ValueError, match=r"only \['query'\] match no linear layer"):
        minift.load_model(tmp_path, quantize=Quantization(only=("query",)))


def test_a_saved_tokenizer_is_the_tokenizer(tmp_path):
    backend = Backend(models.BPE({"<s>": 0, "</s>": 1, "<x>": 2, "a": 3, "b": 4, "ab": 5}, [("a", "b")]))
    backend.add_special_tokens(["<s>", "</s>", "<x>"])
    ours = minift.Tokenizer(backend, 0, (1, 2), 2, "{{ messages[0].content }}")
    minift.save_tokenizer(ours, tmp_path)
    again = minift.load_tokenizer(tmp_path)
    assert again.encode("<s>abba</s>") == ours.encode("<s>abba</s>") == [0, 5, 4, 3, 1]
    assert (again.bos_id, again.eos_ids, again.pad_id) == (0, (1, 2), 2)
    assert again.chat_template == ours.chat_template
