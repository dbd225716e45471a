"""The command on heads: a trained classifier through verify and merge, and what is refused."""

import json

import pytest
import torch

import minift
from minift.cli import main


@pytest.fixture
def trained(run_folder):
    """An adapter of a new classifier in out/, trained by the command."""
    rows = [{"text": f"number {i}", "label": "even" if i % 2 == 0 else "odd"} for i in range(8)]
    (run_folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (run_folder / "run.toml").read_text().replace('"rows.jsonl"', '"labels.jsonl"')
    (run_folder / "classify.toml").write_text('head = "sequence_classification"\n' + config)
    assert main(["train", "classify.toml"]) == 0
    return run_folder


def test_an_adapter_says_the_head_that_its_base_needs(trained, capsys):
    assert main(["verify", "out", "--model", "model"]) == 0
    said = capsys.readouterr().out
    assert "merged: the logits of" in said
    assert main(["merge", "model", "--adapter", "out", "--output", "whole", "--dtype", "float32"]) == 0
    whole = minift.load_model("whole")
    assert whole.head_kind == "sequence_classification" and whole.labels == ("even", "odd")
    base = minift.load_model("model", head="sequence_classification", labels=("even", "odd"))
    minift.load_adapter(base, "out")
    ids = torch.arange(2, 9)[None]
    # merged and apart differ by the rounding of W + B A: a few hundred roundings of fp32
    assert (whole(ids) - base(ids)).abs().max() < 300 * 2.0**-24 * base(ids).abs().max()


def test_labels_in_another_order_are_refused(trained):
    base = minift.load_model("model", head="sequence_classification", labels=("odd", "even"))
    with pytest.raises(ValueError, match=r"trained with the labels \['even', 'odd'\], and the model has"):
        minift.load_adapter(base, "out")
    minift.load_adapter(base, "out", check_base=False)


def test_a_head_in_the_metadata_that_is_none_is_refused(trained, capsys):
    path = trained / "out" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'\\"labels\\": [\\"even\\"', b'\\"labels\\": [    1234'))
    assert main(["merge", "model", "--adapter", "out", "--output", "whole"]) == 2
    assert "it names a head and its labels" in capsys.readouterr().err


def test_a_perplexity_needs_a_language_model(trained, capsys):
    assert main(["merge", "model", "--adapter", "out", "--output", "whole"]) == 0
    assert main(["quantize", "whole", "--report", "report"]) == 2
    assert "is LlamaForSequenceClassification; leave out --report" in capsys.readouterr().err
