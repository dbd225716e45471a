"""The loop: accumulation, order, resume to the bit, what it writes, what stops it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CharTokenizer, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

import minift
from minift.data.collate import Example, collate, encode_row, micro_batches
from minift.methods.base import trainable
from minift.training import loop, objective
from minift.training.checkpoint import checkpoints
from minift.training.loop import NonFiniteLoss
from minift.training.objective import Objective
from minift.training.settings import TrainConfig

ROWS = [{"prompt": "ab" * (1 + i % 4), "completion": "cde"[: 1 + i % 3]} for i in range(10)]


def fresh(dropout=0.2, dtype=torch.float32):
    model = tiny_llama(dtype, vocab_size=128)
    minift.apply(model, minift.LoRA(r=2, dropout=dropout))
    return model


def config(output, **changes):
    values = {
        "output": str(output),
        "batch_size": 3,
        "epochs": 2,
        "learning_rate": 0.01,
        "max_length": 32,
        "micro_batch_tokens": 16,
    }
    return TrainConfig(**{**values, **changes})


def run(model, output, rows=ROWS, **keywords):
    return minift.train(
        model, CharTokenizer(), rows, config(output, **keywords.pop("config", {})), quiet=True, **keywords
    )


def test_the_objective_is_the_summed_loss_of_supervised_tokens():
    model = tiny_llama(torch.float64, vocab_size=128)
    batch = collate([Example([5, 6, 7, 1], 2, ""), Example([9, 8, 1], 0, "")], 0)
    total, tokens = Objective(model)(batch)
    logits = model(batch["input_ids"]).log_softmax(-1)
    want = -(logits[0, 1, 7] + logits[0, 2, 1] + logits[1, 0, 8] + logits[1, 1, 1])
    assert tokens == 4
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=0)  # logits are taken to fp32


def test_logits_in_chunks_change_nothing(monkeypatch):
    model = fresh(dropout=0.0)
    batch = collate([Example(list(range(2, 30)), 3, ""), Example(list(range(40, 60)), 0, "")], 0)
    whole, _ = Objective(model)(batch)
    whole.backward()
    gradients = [p.grad.clone() for p in trainable(model).values()]
    model.zero_grad()
    monkeypatch.setattr(objective, "CHUNK", 7)
    chunked, _ = Objective(model)(batch)
    chunked.backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    for p, g in zip(trainable(model).values(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=7), st.integers(1, 60))
def test_accumulation_is_the_big_batch(sizes, max_tokens):
    """Any cut of an effective batch gives its gradient; fp64 but for the fp32 logits of the loss."""
    model = tiny_llama(torch.float64, vocab_size=128)
    minift.apply(model, minift.LoRA(r=2))
    for name, p in trainable(model).items():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
    examples = [
        Example([2 + (7 * i + j) % 120 for j in range(p + c)], p, "")
        for i, (p, c) in enumerate(sizes)
        if p + c > 1
    ]
    if not examples:
        return
    tokens, gradients = sum(e.supervised for e in examples), []
    for parts in ([examples], micro_batches(examples, max_tokens), [[e] for e in examples]):
        model.zero_grad()
        for part in parts:
            (Objective(model)(collate(part, 0))[0] / tokens).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() <= 2e-6 * gradients[0].abs().max()


def test_a_run_writes_its_folder_and_learns(tmp_path):
    model = fresh()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = run(model, tmp_path / "run", valid=ROWS[:3], config={"epochs": 6, "eval_every": 2})
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "plan.txt",
        "log.jsonl",
        "metrics.json",
        "loss.png",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 25)) and any("eval_loss" in r for r in log)
    assert {
        "total_steps",
        "epoch",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "peak_memory_mib",
        "remaining_s",
    } <= set(steps[0])
    assert steps[-1]["loss"] < steps[0]["loss"] and metrics["train_loss"] == steps[-1]["loss"]
    assert metrics["eval_perplexity"] == pytest.approx(2.718281828459045 ** metrics["eval_loss"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["learning_rate"] == 0.01
    assert "trainable params:" in (tmp_path / "run" / "plan.txt").read_text()
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable(model)) and not model.training
    again = tiny_llama(vocab_size=128)
    minift.load_adapter(again, tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(trainable(again).values(), trainable(model).values(), strict=True)
    )


def test_full_fine_tuning_writes_a_model_that_loads(tmp_path):
    model = tiny_llama(vocab_size=128)
    minift.apply(model, minift.Full())
    run(model, tmp_path, config={"epochs": 1})
    loaded = minift.load_model(tmp_path / "model")
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


def state_after(output, **keywords):
    model = fresh()
    run(model, output, **keywords)
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {n: p.detach() for n, p in trainable(model).items()}, [
        (r["step"], r["loss"], r["lr"]) for r in log
    ]


def test_resuming_after_any_step_continues_to_the_bit(tmp_path, monkeypatch):
    want, log = state_after(tmp_path / "whole")
    real = loop.Run.gradients
    for stop in range(8):

        def gradients(self, batch, step, stop=stop):
            if step == stop:
                raise NonFiniteLoss("stopped for the test")
            return real(self, batch, step)

        output = tmp_path / f"stop-{stop}"
        monkeypatch.setattr(loop.Run, "gradients", gradients)
        with pytest.raises(NonFiniteLoss, match=f"{stop} of 8 steps are saved"):
            run(fresh(), output)
        monkeypatch.setattr(loop.Run, "gradients", real)
        got, resumed_log = state_after(output, resume=True)
        assert resumed_log == log
        assert all(torch.equal(got[n], want[n]) for n in want)


def test_checkpoints_are_kept_two_at_a_time_and_resume_wants_the_same_configuration(tmp_path):
    run(fresh(), tmp_path / "a", config={"save_every": 2})
    assert [p.name for p in checkpoints(tmp_path / "a")] == ["checkpoint-4", "checkpoint-6"]
    with pytest.raises(ValueError, match="is complete"):
        run(fresh(), tmp_path / "a", resume=True)
    (tmp_path / "a" / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"train.learning_rate = 0.01 \(now 0.5\)"):
        run(fresh(), tmp_path / "a", resume=True, config={"learning_rate": 0.5})
    with pytest.raises(ValueError, match="tokens_sha256"):
        run(fresh(), tmp_path / "a", resume=True, rows=ROWS[1:] + ROWS[:1])
    with pytest.raises(ValueError, match="no checkpoint"):
        run(fresh(), tmp_path / "b", resume=True)


def test_an_output_folder_with_files_is_refused_and_overwriting_removes_the_old_run_alone(tmp_path):
    run(fresh(), tmp_path, config={"epochs": 1, "save_every": 1})
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already holds files.*--overwrite.*--resume"):
        run(fresh(), tmp_path)
    run(fresh(), tmp_path, overwrite=True, config={"epochs": 1})
    assert (tmp_path / "mine.txt").read_text() == "keep" and not checkpoints(tmp_path)
    with pytest.raises(ValueError, match="not both"):
        run(fresh(), tmp_path, overwrite=True, resume=True)


def test_an_unwritable_output_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(fresh(), tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write to the output folder"):
        run(fresh(), tmp_path / "file" / "below")


def test_a_non_finite_loss_stops_before_the_step_and_says_where(tmp_path):
    model = fresh()
    model.model.norm.weight.data[0] = float("nan")
    before = [p.detach().clone() for p in trainable(model).values()]
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 1, in the rows row [0-9].*0 of 8 steps"):
        run(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model).values(), strict=True))


def test_a_non_finite_gradient_names_the_parameter(tmp_path, monkeypatch):
    model = fresh()
    name = list(trainable(model))[1]
    trainable(model)[name].register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFiniteLoss, match=f"the gradient of {name} is not finite at step 1"):
        run(model, tmp_path)


def test_bad_input_stops_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="nothing is trainable"):
        model = tiny_llama(vocab_size=128)
        run(model.requires_grad_(False), tmp_path / "a")
    with pytest.raises(ValueError, match="above the model's context of 64"):
        run(fresh(), tmp_path / "a", config={"max_length": 65})
    with pytest.raises(ValueError, match="row 1: no field 'completion'"):
        run(fresh(), tmp_path / "a", rows=[ROWS[0], {"prompt": "x"}])
    with pytest.raises(ValueError, match="row 0: prompt and completion have 44 tokens, the limit is 32"):
        run(fresh(), tmp_path / "a", rows=[{"prompt": "x" * 40, "completion": "abc"}])
    with pytest.raises(ValueError, match="list of rows is empty"):
        run(fresh(), tmp_path / "a", rows=[])
    for field, value in (
        ("epochs", 0),
        ("learning_rate", -1.0),
        ("schedule", "step"),
        ("beta2", 1.0),
        ("max_grad_norm", -1.0),
        ("learning_rate", float("nan")),
    ):
        with pytest.raises(ValueError, match=f"train.{field} is"):
            TrainConfig(**{field: value})
    assert not (tmp_path / "a").exists()


INTERRUPTED = """
import sys; sys.path.insert(0, {tests!r})
from training.test_loop import ROWS, config, fresh
import minift, conftest
try:
    minift.train(fresh(), conftest.CharTokenizer(), ROWS, config({output!r}, epochs=100000, log_every=1))
except KeyboardInterrupt as stop:
    print("SAID:", stop)
"""


def test_ctrl_c_saves_the_adapter_and_says_so(tmp_path):
    program = INTERRUPTED.format(tests=str(Path(__file__).parent.parent), output=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    said = next(line for line in process.stdout if line.startswith("SAID:"))
    process.wait(timeout=60)
    assert "interrupted" in said and "are saved" in said and "--resume" in said
    minift.load_adapter(tiny_llama(vocab_size=128), tmp_path / "run")
    step = int(checkpoints(tmp_path / "run")[-1].name.split("-")[1])
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == step >= 3


def test_evaluation_weights_every_token_alike(tmp_path):
    model, tokenizer = tiny_llama(torch.float64, vocab_size=128), CharTokenizer()
    nats, tokens = 0.0, 0
    for row in ROWS:
        example = encode_row(tokenizer, {**row, "where": ""}, "none", 64)
        total, n = Objective(model)(collate([example], 0))
        nats, tokens = nats + total.item(), tokens + n
    for size in (8, 16, 1000):
        assert minift.evaluate_loss(
            model, tokenizer, ROWS, TrainConfig(micro_batch_tokens=size)
        ) == pytest.approx(nats / tokens, rel=1e-6)
