"""What the command does with adapters: every method trains, checks on load, verify, tokens."""

import json

import pytest

from minift import cli
from minift.methods import METHODS

TINY = ["--dtype", "float32", "--max-new-tokens", "2"]
ON_LLAMA = [name for name in METHODS if name not in ("bitfit", "qlora", "full")]


@pytest.mark.parametrize("name", ON_LLAMA)
def test_every_method_trains_and_its_adapter_generates_and_verifies(run_folder, capsys, name):
    more = ["--method.tinit", "1", "--method.tfinal", "1", "--train.epochs", "3"] if name == "adalora" else []
    if name.endswith("tuning") and name != "ln_tuning":
        more = ["--method.num_virtual_tokens", "5"]
    assert cli.main(["train", "run.toml", "--method", name, *more]) == 0
    said = capsys.readouterr()
    assert "trainable params:" in said.out, said.err
    assert cli.main(["generate", "model", "1+1=", "--adapter", "out", *TINY]) == 0
    (run_folder / "text.txt").write_text("a few words of text " * 9)
    capsys.readouterr()
    assert cli.main(["verify", "out", "--text", "text.txt"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "the adapter moves the base's by up to" in said
    assert ("merged: the logits" in said) == (not METHODS[name].unmergeable)


def test_a_template_and_a_base_that_differ_need_to_be_asked_for(run_folder, capsys):
    settings = json.loads((run_folder / "model" / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = run_folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**settings, "chat_template": template}))
    assert cli.main(["train", "run.toml"]) == 0
    words = ["generate", "model", "1+1=", "--adapter", "out", *TINY]
    assert cli.main(words) == 0
    assert cli.main([*words, "--chat"]) == 2
    assert "was trained with no chat template" in capsys.readouterr().err
    assert cli.main([*words, "--chat", "--any-template"]) == 0
    assert cli.main(["train", "run.toml", "--overwrite", "--train.template", "chat"]) == 0
    assert cli.main([*words, "--chat"]) == 0
    path.write_text(json.dumps({**settings, "chat_template": template + "."}))
    assert cli.main([*words, "--chat"]) == 2
    assert "trained with another chat template" in capsys.readouterr().err
    assert cli.main(["quantize", "model", "--output", "four", "--dtype", "float32"]) == 0
    assert cli.main(["generate", "four", "1+1=", "--adapter", "out", "--any-template", *TINY]) == 2
    assert "was trained on another base than this one" in capsys.readouterr().err
    assert cli.main(["generate", "four", "1", "--adapter", "out", "--any-template", "--any-base", *TINY]) == 0


def test_the_nearest_tokens_of_a_prompt_are_printed(run_folder, capsys):
    words = ["--method.num_virtual_tokens", "4", "--method.init", "text", "--method.init_text", "1+2="]
    assert cli.main(["train", "run.toml", "--method", "prompt_tuning", *words]) == 0
    capsys.readouterr()
    assert cli.main(["tokens", "model", "--adapter", "out", "--k", "2"]) == 0
    said = capsys.readouterr().out
    assert "nearest tokens" in said and "'+'" in said and len(said.strip().splitlines()) == 5


def test_verify_says_what_is_missing(run_folder, capsys):
    assert cli.main(["verify", "nowhere"]) == 2
    assert "adapter_config.json is missing" in capsys.readouterr().err
    assert cli.main(["train", "run.toml"]) == 0
    config = run_folder / "out" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert cli.main(["verify", "out"]) == 2
    assert "does not name its base; give it as --model" in capsys.readouterr().err
    assert cli.main(["tokens", "model", "--adapter", "out"]) == 2
    assert "has no prompt embeddings" in capsys.readouterr().err


def test_verify_takes_the_base_as_it_was_quantized(run_folder, capsys):
    assert cli.main(["train", "run.toml", "--method", "qlora", "--method.block_size", "32"]) == 0
    assert cli.main(["verify", "out"]) == 2
    assert "trained on another base" in capsys.readouterr().err
    assert cli.main(["verify", "out", "--quantize", "nf4", "--quantize.block_size", "32"]) == 0
    assert "merged: the logits" in capsys.readouterr().out


def test_full_fine_tuning_writes_a_model_that_generates(run_folder, capsys):
    assert cli.main(["train", "run.toml", "--method", "full"]) == 0
    assert "model, log and plot are in out" in capsys.readouterr().out
    assert cli.main(["generate", "out/model", "1+1=", *TINY]) == 0


@pytest.mark.parametrize("verb", ["train", "plan", "params"])
def test_help_of_verbs_that_take_settings(capsys, verb):
    assert cli.main([verb, "--help"]) == 0
    assert "minift VERB" in capsys.readouterr().out
