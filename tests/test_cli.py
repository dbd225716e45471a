"""The command line: every bad input is one sentence on stderr, exit status 2, and nothing half-written."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import minift
from minift import cli


def test_train_then_generate_with_the_adapter(run_folder, capsys):
    assert (
        cli.main(["train", "run.toml", "--method.r", "4", "--train.epochs=2", "--valid", "rows.jsonl"]) == 0
    )
    said = capsys.readouterr().out
    assert "trainable params: 896 ||" in said and "eval_perplexity" in said  # 2 x (4 (32 + 32) + 4 (32 + 16))
    resolved = json.loads((run_folder / "out" / "config.json").read_text())
    assert resolved["method"]["r"] == 4 and resolved["train"]["epochs"] == 2 and resolved["model"] == "model"
    assert (
        cli.main(
            ["generate", "model", "1+1=", "--adapter", "out", "--dtype", "float32", "--max-new-tokens", "3"]
        )
        == 0
    )
    assert cli.main(["train", "out/config.json", "--train.output", "again"]) == 0
    first, again = (load_file(run_folder / f / "adapter_model.safetensors") for f in ("out", "again"))
    assert all(
        torch.equal(first[name], again[name]) for name in first
    )  # config.json repeats the run to the bit


def test_plan_prints_and_writes_nothing(run_folder, capsys):
    assert cli.main(["plan", "run.toml", "--method.target_modules", "all-linear"]) == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert not (run_folder / "out").exists()


def test_full_fine_tuning_and_another_method_from_the_command_line(run_folder):
    assert cli.main(["train", "run.toml", "--method", "full"]) == 0
    assert minift.load_model("out/model").embed.weight.shape == (257, 32)


BAD = {
    "unknown verb": (["tune"], "unknown verb 'tune'; known: demo, fetch"),
    "unknown setting": (
        ["train", "run.toml", "--method.rr", "2"],
        "unknown setting method.rr; did you mean method.r",
    ),
    "unknown method": (["train", "run.toml", "--method", "mora"], "known methods: full, selective, lora"),
    "no config": (["train", "nowhere.toml"], "nowhere.toml: no such config file"),
    "no model": (["train", "run.toml", "--model", "nowhere"], "no model at 'nowhere'"),
    "not fetched": (["train", "run.toml", "--model", "smollm2"], "minift fetch smollm2"),
    "no data": (["train", "run.toml", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
    "rank of zero": (["train", "run.toml", "--method.r", "0"], "r is 0"),
    "rank too high": (["train", "run.toml", "--method.r", "17"], "r is 17, above the smaller side of"),
    "dead rule": (
        ["train", "run.toml", "--method.target_modules", "query"],
        "match no linear layer or embedding; nearest",
    ),
    "above the context": (
        ["train", "run.toml", "--train.max_length", "65"],
        "above the model's context of 64",
    ),
    "no template": (["train", "run.toml", "--train.template", "chat"], "has no chat template"),
    "wrong dtype": (["train", "run.toml", "--dtype", "int8"], "dtype 'int8' is not one of"),
    "wrong type": (["train", "run.toml", "--train.epochs", "two"], "train.epochs is 'two', expected int"),
    "stray word": (["train", "run.toml", "fast"], "unexpected argument 'fast'"),
    "unwritable output": (
        ["train", "run.toml", "--train.output", "run.toml/x"],
        "cannot write to the output folder",
    ),
    "long prompt": (
        ["generate", "model", "x" * 80, "--max-new-tokens", "1"],
        "exceed the model's context of 64",
    ),
    "no adapter": (["generate", "model", "x", "--adapter", "nowhere"], "adapter_config.json is missing"),
    "nothing to fetch": (["fetch", "llama"], "known: smollm2, minilm"),
    "missing argument": (["fetch"], "required: name"),
}


@pytest.mark.parametrize("words, sentence", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_status_2(run_folder, capsys, words, sentence):
    before = set(run_folder.rglob("*"))
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("minift: ") and sentence in said and said.count("\n") == 1
    assert set(run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda f: (f / "model" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "model" / "model.safetensors").write_bytes(b"x" * 50), "damaged or truncated"),
        (lambda f: (f / "rows.jsonl").write_text(""), "rows.jsonl is empty"),
        (lambda f: (f / "rows.jsonl").write_text('{"prompt": "a"}\n'), "rows.jsonl:1: no field 'completion'"),
        (lambda f: (f / "run.toml").write_text("r = = 2"), "run.toml is not TOML"),
        (lambda f: (f / "out").mkdir() or (f / "out" / "log.jsonl").write_text(""), "--overwrite"),
    ],
)
def test_damaged_inputs_are_one_sentence(run_folder, capsys, damage, sentence):
    damage(run_folder)
    assert cli.main(["train", "run.toml"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not (run_folder / "out" / "config.json").exists()


def test_overwrite_and_resume_are_flags(run_folder, capsys):
    assert cli.main(["train", "run.toml"]) == 0
    assert cli.main(["train", "run.toml"]) == 2
    assert cli.main(["train", "run.toml", "--overwrite"]) == 0
    assert cli.main(["train", "run.toml", "--resume"]) == 2
    assert "is complete" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert cli.main([]) == 0 and cli.main(["--version"]) == 0
    assert minift.__version__ in capsys.readouterr().out


def test_the_installed_command_prints_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "minift.cli", "fetch", "llama"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("minift: ")
