"""A classifier, end to end: it learns, says how well, resumes to the bit, and its folder loads again."""

import json

import pytest
import torch
from conftest import CharTokenizer, tiny_llama
from safetensors.torch import load_file

import minift
from minift import cli
from minift.data.rows import write_rows
from minift.methods.base import trainable
from minift.metrics.uncertainty import wilson
from minift.models.bert import Bert, BertConfig
from minift.training import loop
from minift.training.evaluation import encode, evaluate_loss, row_logits
from minift.training.loop import NonFiniteLoss
from minift.training.settings import TrainConfig

NAMES = ("high", "low")


class Letters(CharTokenizer):
    def encode_texts(self, text, pair=None, most=None):
        ids = self.encode(text)
        return ids, [0] * len(ids)


def row(i):
    """Letters from the start of the alphabet are low, others high."""
    low = i % 3 > 0
    return {
        "text": "".join(chr((97 if low else 110) + (i * k) % 7) for k in range(3, 6)),
        "label": NAMES[low],
    }


ROWS = [row(i) for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    minift.save_model(tiny_llama(vocab_size=128), folder)
    return folder


def fresh(base, method=None, **changes):
    asked = {"head": "sequence_classification", "labels": NAMES, **changes}
    model = minift.load_model(base, **asked)
    minift.apply(model, method or minift.LoRA(r=2, dropout=0.1))
    return model


def config(output, **changes):
    values = {"batch_size": 6, "epochs": 6, "learning_rate": 0.02, "max_length": 32, "micro_batch_tokens": 12}
    return TrainConfig(output=str(output), **{**values, **changes})


def run(model, output, rows=ROWS, resume=False, **changes):
    tokenizer, c = Letters(), config(output, **changes)
    return minift.train(model, tokenizer, rows, c, valid=rows, resume=resume, quiet=True)


@pytest.mark.parametrize(
    "method",
    [
        minift.LoRA(r=2),
        minift.Selective(),
        minift.Full(),
        minift.LNTuning(),
        minift.Bottleneck(bottleneck_dim=4),
    ],
    ids=lambda method: method.name,
)
def test_every_kind_of_method_learns_a_separable_task_with_its_new_head(base, tmp_path, method):
    model = fresh(base, method)
    head = {n for n, p in trainable(model).items() if "score" in n}
    assert head, "the new head trains with every method"
    metrics = run(model, tmp_path, epochs=20)
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_f1_macro"] == 1.0


def test_bitfit_trains_a_new_head_as_a_whole_and_once(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    minift.save_model(Bert(config, "masked_lm"), tmp_path)
    model = minift.load_model(tmp_path, head="sequence_classification", num_labels=3)
    plan = minift.apply(model, minift.BitFit())
    new = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {site.path for site in plan.head} == new and not new & {site.path for site in plan.sites}
    assert sum(p.numel() for p in trainable(model).values()) == plan.trainable


def test_the_metrics_are_those_of_the_rows(base, tmp_path):
    model = fresh(base)
    metrics = run(model, tmp_path, epochs=1, learning_rate=1e-6)
    examples = encode(model, Letters(), ROWS, config(tmp_path))
    logits = row_logits(model, examples, 0, 7)
    assert torch.allclose(logits[3], model(torch.tensor([examples[3].ids]))[0], atol=1e-5)
    labels = torch.tensor([NAMES.index(r["label"]) for r in ROWS])
    right = (logits.argmax(1) == labels).sum().item()
    assert metrics["eval_accuracy"] == right / len(ROWS) and 0 < right < len(ROWS)
    assert metrics["eval_accuracy_interval"] == list(wilson(right, len(ROWS)))
    nats = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["eval_loss"] == pytest.approx(nats, rel=1e-6)  # sums of 24 fp32 terms
    loss = evaluate_loss(model, Letters(), ROWS, config(tmp_path))
    assert loss == pytest.approx(nats, rel=1e-5) and "eval_perplexity" not in metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_resuming_continues_to_the_bit_with_the_head(base, tmp_path, monkeypatch):
    whole = fresh(base)
    want = run(whole, tmp_path / "whole", epochs=2)
    real = loop.Run.gradients

    def gradients(self, batch, step):
        if step == 3:
            raise NonFiniteLoss("stopped for the test")
        return real(self, batch, step)

    monkeypatch.setattr(loop.Run, "gradients", gradients)
    with pytest.raises(NonFiniteLoss, match="3 of 8 steps are saved"):
        run(fresh(base), tmp_path / "cut", epochs=2)
    monkeypatch.setattr(loop.Run, "gradients", real)
    with pytest.raises(ValueError, match="labels"):
        other = fresh(base, labels=("low", "high"))
        run(other, tmp_path / "cut", epochs=2, resume=True)
    model = fresh(base)
    got = run(model, tmp_path / "cut", epochs=2, resume=True)
    same = ("eval_loss", "eval_accuracy", "train_loss")
    assert [got[k] for k in same] == [want[k] for k in same]
    pairs = zip(trainable(model).values(), trainable(whole).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_training_wrote_loads_again_with_its_names(base, tmp_path):
    ids = torch.tensor([[70, 80, 90]])
    lora, full = fresh(base), fresh(base, minift.Full())
    run(lora, tmp_path / "lora", epochs=1), run(full, tmp_path / "full", epochs=1)
    written = json.loads((tmp_path / "lora" / "config.json").read_text())
    assert (written["head"], written["labels"]) == ("sequence_classification", list(NAMES))
    again = minift.load_model(base, head=written["head"], labels=written["labels"])
    minift.load_adapter(again, tmp_path / "lora")
    assert torch.equal(again(ids), lora(ids))
    loaded = minift.load_model(tmp_path / "full" / "model")
    assert loaded.labels == NAMES and torch.equal(loaded(ids), full(ids))


def test_one_output_learns_numbers(base, tmp_path):
    rows = [{"text": r["text"], "label": 0.5 if r["label"] == "low" else -1} for r in ROWS]
    model = minift.load_model(base, head="regression")
    minift.apply(model, minift.LoRA(r=2))
    before = evaluate_loss(model, Letters(), rows, config(tmp_path))
    logits = row_logits(model, encode(model, Letters(), rows, config(tmp_path)), 0, 100)
    errors = [(x.item() - r["label"]) ** 2 for x, r in zip(logits[:, 0], rows, strict=True)]
    assert before == pytest.approx(sum(errors) / len(rows), rel=1e-5)
    metrics = run(model, tmp_path, rows, epochs=20)
    assert metrics["eval_loss"] < before / 10 and "eval_accuracy" not in metrics


def test_rows_that_do_not_fit_the_head_stop_before_anything_is_written(base, tmp_path):
    for rows, sentence in (
        ([*ROWS, {"text": "a", "label": "middle"}], "row 24: label 'middle' is none of the model's 2 labels"),
        ([{"prompt": "a", "completion": "b"}], "row 0: no field 'text'"),
        ([{"text": "", "label": "low"}], "row 0: the text has 0 tokens"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(fresh(base), tmp_path / "run", rows)
    with pytest.raises(ValueError, match="template 'chat' is for prompts"):
        run(fresh(base), tmp_path / "run", template="chat")
    with pytest.raises(ValueError, match="no rows for head 'token_classification', only for causal_lm"):
        run(fresh(base, head="token_classification"), tmp_path / "run")
    model = minift.load_model(base)
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="train.truncate cuts the texts of classifiers"):
        run(model, tmp_path / "run", [{"prompt": "a", "completion": "b"}], truncate=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def classifier_folder(run_folder):
    write_rows(run_folder / "texts.jsonl", ROWS)
    head = 'head = "sequence_classification"\n'
    text = (run_folder / "run.toml").read_text().replace("rows.jsonl", "texts.jsonl")
    (run_folder / "run.toml").write_text(head + text)
    return run_folder


def test_the_command_trains_a_classifier_and_its_config_repeats_it(classifier_folder, capsys):
    assert cli.main(["plan", "run.toml"]) == 0
    assert "score.weight" in (said := capsys.readouterr().out) and "new head" in said
    assert cli.main(["train", "run.toml", "--valid", "texts.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "new head" in said and "eval_accuracy_interval [" in said and "eval_f1_macro" in said
    resolved = json.loads((classifier_folder / "out" / "config.json").read_text())
    assert resolved["labels"] == ["high", "low"]
    assert cli.main(["train", "out/config.json", "--train.output", "again"]) == 0
    first, again = (load_file(classifier_folder / f / "adapter_model.safetensors") for f in ("out", "again"))
    assert any("score" in name for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)


BAD = {
    "label not in training": (["train", "run.toml", "--valid", "more.jsonl"], "more.jsonl:1: label 'middle'"),
    "too few names": (
        ["train", "run.toml", "--labels", "low,middle"],
        "label 'high' is none of the model's 2",
    ),
    "contradiction": (["train", "run.toml", "--labels", "a,b", "--num_labels", "3"], "num_labels"),
    "head without rows": (
        ["train", "run.toml", "--head", "token_classification", "--num_labels", "2"],
        "no rows for head 'token_classification'",
    ),
    "unknown head": (["train", "run.toml", "--head", "classifier"], "head 'classifier' is not one of"),
    "texts for a number": (["train", "run.toml", "--head", "regression"], "the model has one output"),
    "plan without labels": (
        ["plan", "--model", "model", "--head", "sequence_classification"],
        "say how many outputs",
    ),
    "head of a preset": (["plan", "--model", "llama-3-8b", "--head", "none"], "has its published head alone"),
}


@pytest.mark.parametrize("words, sentence", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(classifier_folder, capsys, words, sentence):
    write_rows(classifier_folder / "more.jsonl", [{"text": "a", "label": "middle"}])
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (classifier_folder / "out").exists()
