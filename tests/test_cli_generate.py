"""The verb generate: settings as words, text as it comes."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import minift
from minift import cli
from minift.models.t5 import T5, T5Config

TINY = ["generate", "model", "1+1=", "--dtype", "float32", "--max-new-tokens", "9"]


def own(folder, **keywords):
    """The text by the functions."""
    model, tokenizer = minift.load_model(folder / "model"), minift.load_tokenizer(folder / "model")
    ids = minift.generate(model, [tokenizer.encode("1+1=")], 9, tokenizer=tokenizer, **keywords)
    return tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    "words, keywords",
    [
        ([], {}),
        (
            ["--temperature", "1.5", "--top-k", "20", "--seed", "3"],
            {"temperature": 1.5, "top_k": 20, "seed": 3},
        ),
        (
            ["--temperature", "2", "--top-p", "0.9", "--min-p", "0.01"],
            {"temperature": 2, "top_p": 0.9, "min_p": 0.01},
        ),
        (["--repetition-penalty", "1.4"], {"repetition_penalty": 1.4}),
        (["--num-beams", "3", "--length-penalty", "0.5"], {"num_beams": 3, "length_penalty": 0.5}),
        (["--num-beams", "3", "--early-stopping", "true"], {"num_beams": 3, "early_stopping": True}),
        (["--num-beams", "2", "--early-stopping", "never"], {"num_beams": 2, "early_stopping": "never"}),
    ],
)
def test_words_mean_what_the_keywords_mean(run_folder, capsys, words, keywords):
    assert cli.main([*TINY, *words]) == 0
    assert capsys.readouterr().out == own(run_folder, **keywords) + "\n"


def test_stop_strings_end_the_text(run_folder, capsys):
    whole = own(run_folder)
    for stops in ([whole[2]], [whole[4:6], whole[3]]):
        assert cli.main([*TINY, *(word for stop in stops for word in ("--stop", stop))]) == 0
        cut = min(whole.index(stop) for stop in stops)
        assert capsys.readouterr().out == whole[:cut] + "\n"


def test_an_encoder_reads_the_text_with_its_end(run_folder, capsys):
    tokenizer = Tokenizer.from_file("model/tokenizer.json")
    tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4}
    model = T5(T5Config(**sizes, num_layers=1, num_decoder_layers=1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    minift.save_model(model, "t5")
    tokenizer.save("t5/tokenizer.json")
    Path("t5/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    loaded, tokenizer = minift.load_model("t5"), minift.load_tokenizer("t5")
    ids = tokenizer.encode("1+1=", special_tokens=True)
    assert ids[-1] == 0 and len(ids) == 5
    wanted = tokenizer.decode(minift.generate(loaded, [ids], 9, tokenizer=tokenizer)[0])
    assert wanted != tokenizer.decode(minift.generate(loaded, [ids[:-1]], 9, tokenizer=tokenizer)[0])
    assert cli.main(["generate", "t5", *TINY[2:]]) == 0
    assert capsys.readouterr().out == wanted + "\n"
    assert cli.main(["generate", "t5", *TINY[2:], "--chat"]) == 2
    assert "--chat is for decoders" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--num-beams", "2", "--temperature", "0.5"], "num_beams is 2 and temperature is 0.5"),
        (["--num-beams", "2", "--stop", "a"], "num_beams is 2 and stop is ('a',)"),
        (["--top-k", "5"], "top_k is 5 and temperature is 0"),
        (["--early-stopping", "maybe", "--num-beams", "2"], "early_stopping is 'maybe'"),
        (["--stop", ""], "give texts of at least one character"),
        (["--min-p", "low"], "invalid float value: 'low'"),
    ],
)
def test_what_does_not_go_together_is_one_sentence_and_no_text(run_folder, capsys, words, sentence):
    assert cli.main([*TINY, *words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out
