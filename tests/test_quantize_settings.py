"""[quantize] in a config, --quantize on the command line, and the record that a run leaves of it."""

import json

import pytest
import torch
from conftest import CharTokenizer, tiny_llama
from safetensors.torch import load_file

import minift
from minift import cli, load
from minift.config import override, run_config
from minift.quant import Quantization

ROWS = [{"prompt": f"count {i}", "completion": f"number {i}"} for i in range(6)]


@pytest.mark.parametrize("tree", [{"quantize": "int8"}, {"quantize": {"format": "int8"}}])
def test_a_format_alone_stands_for_the_table(tree):
    config = run_config({"data": "d", **tree})
    assert config.quantize == config.base_quantization == Quantization("int8")


def test_flags_reach_every_field():
    flags = {"quantize": "fp4", "quantize.block_size": "128", "quantize.double_quant": "false"}
    config = run_config(override({"data": "d"}, {**flags, "quantize.skip": "q_proj,k_proj"}))
    assert config.base_quantization == Quantization("fp4", 128, False, skip=("q_proj", "k_proj"))


def test_qlora_brings_its_own_quantization_and_lora_none():
    assert run_config({"data": "d"}).base_quantization is None
    qlora = run_config({"data": "d", "method": {"name": "qlora", "block_size": 32}})
    assert qlora.base_quantization == Quantization("nf4", 32) and qlora.quantize is None
    assert run_config({"data": "d", "quantize": {"block_size": 128}}).quantize == Quantization("nf4", 128)


@pytest.mark.parametrize(
    "tree, sentence",
    [
        ({"quantize": "nf5"}, "format 'nf5' is not known; known formats: nf4, fp4, int8, int8_dynamic"),
        ({"quantize": {"format": ""}}, "format '' is not known"),
        ({"quantize": {"format": "nf4", "block_size": 100}}, "block_size is 100; supported: 32"),
        (
            {"quantize": {"format": "nf4", "blocksize": 64}},
            "unknown setting quantize.blocksize; did you mean",
        ),
        ({"quantize": 4}, "quantize is 4, expected a table with format"),
        ({"method": {"name": "qlora", "format": "int4"}}, "format 'int4' is not known"),
    ],
)
def test_bad_settings_are_one_sentence(tree, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_config({"data": "d", **tree})


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_tokenizer", lambda source: CharTokenizer())
    minift.save_model(tiny_llama(), tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def train(base, output, *words):
    settings = [] if "--model" in words else ["--model", base / "base"]
    settings += ["--data", base / "rows.jsonl", "--train.output", base / output]
    settings += ["--train.template", "none", "--train.max_length", 64, "--train.max_steps", 2]
    (base / "run.toml").write_text("")
    return cli.main([str(word) for word in ("train", base / "run.toml", *settings, *words)])


@pytest.mark.parametrize("words", [["--quantize", "nf4"], ["--method", "qlora", "--method.block_size", "32"]])
def test_a_run_on_a_quantized_base_is_recorded_and_repeats_to_the_bit(base, capsys, words):
    assert train(base, "out", *words) == 0
    assert "bits per weight" in capsys.readouterr().out
    recorded = json.loads((base / "out" / "config.json").read_text())
    assert recorded["quantize"]["format"] == "nf4"
    again = ["train", base / "out" / "config.json", "--train.output", base / "again"]
    assert cli.main([str(word) for word in again]) == 0
    first, second = (load_file(base / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_base_and_a_method_that_disagree_are_refused(base, capsys):
    assert train(base, "out", "--quantize", "int8", "--method", "qlora") == 2
    assert "let them agree, or apply lora" in capsys.readouterr().err and not (base / "out").exists()


def test_full_fine_tuning_of_a_quantized_base_is_refused(base, capsys):
    assert train(base, "out", "--quantize", "nf4", "--method", "full") == 2
    assert "is quantized; full fine-tuning needs dense weights" in capsys.readouterr().err


def test_qlora_trains_on_a_four_bit_checkpoint_as_it_is(base):
    minift.save_model(minift.load_model(base / "base", "bfloat16", quantize="nf4"), base / "four")
    words = ["--method", "qlora", "--model", base / "four"]
    assert train(base, "out", *words) == 0
    recorded = json.loads((base / "out" / "config.json").read_text())
    assert "quantize" not in recorded
    again = ["train", base / "out" / "config.json", "--train.output", base / "again"]
    assert cli.main([str(word) for word in again]) == 0


def test_a_plan_checks_the_rules_of_quantization(base, capsys):
    (base / "run.toml").write_text("")
    words = ["plan", base / "run.toml", "--model", base / "base", "--data", "d", "--quantize.only", "query"]
    assert cli.main([str(word) for word in words]) == 2
    assert "only ['query'] match no linear layer" in capsys.readouterr().err
