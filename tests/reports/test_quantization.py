"""minift quantize and minift merge on a tiny model: what they print and write, and their errors."""

import json
import math
from dataclasses import fields

import pytest
import torch
from conftest import CharTokenizer, tiny_llama

import minift
from minift.cli import main
from minift.methods.base import trainable
from minift.quant import Quantization
from minift.reports import merging, probe, quantization
from minift.reports.probe import read_text
from minift.reports.quantization import text_nats
from minift.words import QUANTIZATION_FIELDS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for module in (merging, quantization):
        monkeypatch.setattr(module, "load_tokenizer", lambda source: CharTokenizer())
        monkeypatch.setattr(
            module, "save_tokenizer", lambda t, path: (path / "tokenizer.json").write_text("-")
        )
    for module in (probe, quantization):
        monkeypatch.setattr(module, "read_text", lambda text: "the cat sat on the mat. " * 20)
    minift.save_model(tiny_llama(), tmp_path / "base")
    return tmp_path


def run(*words):
    return main([str(word) for word in words])


def test_quantize_prints_the_table_and_writes_a_checkpoint(folder, capsys):
    assert run("quantize", folder / "base", "--output", folder / "four", "--block_size", 32) == 0
    text = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in text and "bits per weight: 4.3" in text
    again = minift.load_model(folder / "four")
    assert (folder / "four" / "tokenizer.json").exists() and "some rows are not whole blocks" in text
    assert run("quantize", folder / "base", "--output", folder / "four") == 2  # nothing is overwritten
    assert "exists already; give another folder" in capsys.readouterr().err
    assert again.model.layers[0].mlp.up_proj.layout.block_size == 32


def test_the_report_has_every_layer_and_both_perplexities(folder, capsys):
    assert run("quantize", folder / "base", "--format", "int8", "--report", folder / "report") == 0
    result = json.loads((folder / "report" / "quantization.json").read_text())
    assert len(result["layers"]) == 14 and all(row["of_bound"] <= 1 for row in result["layers"])
    before, after = result["perplexity"]["before"], result["perplexity"]["after"]
    assert 0.9 < after / before < 1.1 and before != after
    assert f"{before:.3f} -> {after:.3f}" in capsys.readouterr().out
    assert (folder / "report" / "quantization.txt").exists()
    assert (folder / "report" / "quantization.png").read_bytes()[1:4] == b"PNG"


def test_the_nats_of_a_text_are_those_of_its_windows():
    model, tokenizer = tiny_llama(), CharTokenizer()
    text = "some text " * 20
    ids = torch.tensor(tokenizer.encode(text))[:130]
    expected = 0.0
    for start in (0, 64, 128):  # the context of the tiny model is 64 tokens
        part = ids[start : start + 64]
        logp = model(part[None])[0].log_softmax(-1)
        expected -= sum(logp[i, part[i + 1]].item() for i in range(len(part) - 1))
    nats, tokens = text_nats(model, tokenizer, text, tokens=130)
    assert tokens == 127 and nats == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="perplexity needs two"):
        text_nats(model, tokenizer, "a")


@pytest.mark.parametrize("mode", ["dequantized", "requantized", "original"])
def test_merge_prints_its_errors_and_saves(folder, capsys, mode):
    model = minift.load_model(folder / "base", "bfloat16", quantize="nf4")
    minift.apply(model, minift.QLoRA(r=2))
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.02)
    minift.save_adapter(model, folder / "adapter")
    words = ["merge", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged"]
    assert run(*words, "--quantize", "nf4", "--mode", mode) == 0
    text = capsys.readouterr().out
    assert text.count("model.layers.") == 14 and f"{mode}: logits of 64 tokens differ by at most" in text
    merged = minift.load_model(folder / "merged", "bfloat16")
    assert hasattr(merged.model.layers[0].mlp.up_proj, "layout") == (mode == "requantized")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["quantize", "base", "--format", "nf5"], "format 'nf5' is not known; known formats: nf4"),
        (["quantize", "base", "--format", ""], "format '' is not known"),
        (["quantize", "base", "--block_size", "65"], "block_size is 65; supported: 32"),
        (["quantize", "base", "--only", "query"], "match no linear layer; nearest"),
        (["quantize", "base", "--text", "a.txt"], "give --report as well"),
        (
            ["quantize", "base", "--format", "int8", "--output", "four"],
            "holds nf4 or fp4, not int8; leave out --output",
        ),
        (["merge", "base", "--output", "m"], "required: --adapter"),
        (
            ["merge", "base", "--adapter", "a", "--output", "m", "--lr", "32"],
            "unrecognized arguments: --lr 32",
        ),
        (["merge", "base", "--adapter", "a", "--output", "m", "--quantize", "nf5"], "'nf5' is not known"),
        (["quantize", "base", "--blocksize", "32"], "unrecognized arguments: --blocksize 32"),
        (["merge", "base", "--adapter", "a", "--output", "m"], "adapter_config.json is missing"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(folder)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (folder / "four").exists() and not (folder / "m").exists()


def test_what_could_not_be_saved_is_refused_before_the_merge(folder, capsys):
    model = minift.load_model(folder / "base", "bfloat16", quantize="int8")
    minift.apply(model, minift.LoRA(r=2))
    minift.save_adapter(model, folder / "adapter")
    words = ["merge", folder / "base", "--adapter", folder / "adapter", "--output", folder / "merged"]
    assert run(*words, "--quantize", "int8") == 2
    printed = capsys.readouterr()
    assert "k_proj would stay int8, and a saved model holds nf4 or fp4" in printed.err and not printed.out


def test_the_difference_of_logits_is_that_of_a_worked_example():
    before = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    after = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 2.0, 0.0]])
    # row 1: p = 1/3 each, q = 1/2, 1/4, 1/4; KL(p || q) = (log(2/3) + 2 log(4/3)) / 3
    first = (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3
    p = [math.e / (math.e + 2), 1 / (math.e + 2), 1 / (math.e + 2)]
    q = [x / (2 + math.e**2) for x in (1, math.e**2, 1)]
    second = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    text = merging.logit_error(before, after)
    assert f"KL divergence {(first + second) / 2:.3e} nats a token" in text
    assert "at most 2.000e+00" in text and "another best token at 1 of 2" in text


def test_flags_of_quantization_stand_anywhere_and_are_its_fields(folder, capsys):
    assert tuple(f.name for f in fields(Quantization)) == QUANTIZATION_FIELDS
    words = [
        "--quantize",
        "nf4",
        "--quantize.skip",
        "down_proj",
        folder / "base",
        "a cat",
        "--dtype",
        "float32",
    ]
    assert run("generate", *words, "--max-new-tokens", 1) == 2  # the folder has no tokenizer
    assert "tokenizer.json is missing" in capsys.readouterr().err
    assert run("quantize", "--block_size", 32, "--double_quant", "false", folder / "base") == 0
    assert "bits per weight: 5.0000" in capsys.readouterr().out


def test_texts_are_files_of_utf8_or_pythons_reference(tmp_path):
    assert len(read_text()) > 100_000
    with pytest.raises(ValueError, match="no such file"):
        read_text("nowhere.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_text(str(tmp_path / "bytes"))
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_text(str(tmp_path / "empty"))
